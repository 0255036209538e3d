"""Agreement with numbers that the published methods for flow models produced (`tests/golden/README.md` says how)."""

import json
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from bench.methods.flow_grpo import FlowGRPO, FlowGRPOConfig
from bench.methods.online_dpo import OnlineDPO, OnlineDPOConfig
from bench.methods.velocity_matching import VelocityMatching, VelocityMatchingConfig
from bench.methods.vgg_flow import VGGFlow, VGGFlowConfig
from scaffold import GOLDEN
from torch import Tensor

from bench.core import Core
from bench.models.analytic import GaussianFlowModel
from bench.options import Config
from bench.reward import Reward
from bench.sampling.grids import ddim_kernel
from bench.sampling.kernel import Kernel
from bench.sampling.trajectory import Noised, Trajectory, Transitions
from bench.training.advantages import Deviation, best_and_worst, group_normalised

TOLERANCE = 1e-5


@cache
def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def double(value: list) -> Tensor:
    """Inputs are float32 numbers, used in float64."""
    return torch.tensor(value).double()


def error(ours: Tensor | float, theirs: Tensor | list | float) -> float:
    """Largest relative error over rows, in the Euclidean norm of a row."""
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    ours = torch.as_tensor(ours).detach().double().reshape(theirs.shape)
    rows = len(theirs) if theirs.ndim else 1
    difference, size = (ours - theirs).reshape(rows, -1).norm(dim=1), theirs.reshape(rows, -1).norm(dim=1)
    return float((difference / size.clamp(min=1e-12)).max())


class Nothing(Reward):
    """No reward is asked for."""

    scale, source = "", ""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        raise AssertionError


class Given(GaussianFlowModel):
    """A flow whose predictions are given, by name; `policy` may be differentiated."""

    outputs: dict[str, Tensor]

    def predict(self, z, t, conditioning, *, prior=False, guided=True):
        return self.outputs["prior" if prior else self.name]

    name = "policy"

    @contextmanager
    def using(self, weights):
        self.name = weights["name"]
        yield
        self.name = "policy"


def given_core(levels: Tensor, **outputs: Tensor) -> Core:
    """A core whose step k has the noise level `levels[k]`, each row's own, and whose networks say `outputs`."""
    order, place = levels.unique(), torch.searchsorted(levels.unique(), levels)
    sigmas = torch.cat([order.flip(0), torch.zeros(1, dtype=levels.dtype)])
    model = Given(dtype=torch.float64)
    model.outputs = {name: value.double() for name, value in outputs.items()}
    core = Core(
        model, Kernel(1000 * sigmas[:-1], (1 - sigmas) ** 2, 1.0, "ddim", "flow", sigmas), Nothing(Config()), 1.0
    )
    core.copies.update({name: {"name": name} for name in outputs})
    vars(core)["steps"] = len(order) - 1 - place
    return core


def noised(core: Core, clean: Tensor, noise: Tensor, advantages: Tensor | None = None) -> Noised:
    names = [(str(i), 0) for i in range(len(clean))]
    k = core.steps
    z, target = core.kernel.noised(clean, noise, k), core.kernel.target(clean, noise, k)
    encoded = core.model.encode([""] * len(clean))
    return Noised([p for p, _ in names], names, encoded, torch.arange(len(clean)), k, clean, noise, z, target, None,
                  advantages)  # fmt: skip


def learned(method: VelocityMatching, core: Core, part: Noised) -> tuple[Tensor, Tensor, dict]:
    """The gradient of the mean over rows in the policy's output, as the method's own loss has it; its bracket."""
    vars(core)["diffused"] = lambda data, steps, size: iter([part])
    vars(core)["choose_steps"] = lambda data, fraction, last: torch.zeros(len(part), 1)
    policy = core.model.outputs["policy"] = core.model.outputs["policy"].detach().requires_grad_()
    (loss,) = method.losses(core, part)
    loss.values.mean().backward()
    others = {name: value for name, value in core.model.outputs.items() if name != "policy"}
    bracket, metrics = method.gradient(core, part, policy.detach(), others)
    return policy.grad, bracket, metrics


# DiffusionNFT ------------------------------------------------------------------------------------------------------

NFT = golden("item8_nft")


@pytest.mark.parametrize("case", [c for c in NFT["loss_cases"] if c["adv_mode"] is None],
                         ids=lambda c: f"{c['beta']}-{c['kl_beta']}-{c['policy'][:5]}")  # fmt: skip
def test_nft(case, record_property):
    given = {name: double(value) for name, value in NFT["loss_inputs"].items()}
    if case["policy"].startswith("on"):
        given["v_theta"] = given["v_old"]
    if case["policy"].startswith("floor"):
        given |= {name: torch.tensor(v, dtype=torch.float64) for name, v in NFT["floor_inputs_f64"].items()}
    core = given_core(given["timesteps"] / 1000, policy=given["v_theta"], old=given["v_old"], prior=given["v_ref"])
    limit = case["adv_clip_max"]
    part = noised(core, given["x0"], given["noise"], given["advantages"].clamp(-limit, limit) / limit)
    anchors = {"old": float(case["beta"]), "prior": case["kl_beta"] / limit}
    settings = {"residual": "old", "weight": "clean", "factor": limit, "anchors": anchors}
    method, theirs = VelocityMatching(VelocityMatchingConfig(**settings)), case["f64"]
    gradient, _, metrics = learned(method, core, part)
    ahead, behind = method.clean_weights(core, part, given["v_theta"], given["v_old"])
    share, square = (1 + part.advantages) / 2, (given["timesteps"] / 1000) ** 2
    errors = {
        "noised": error(part.z, given["xt"]),
        "r": error(share, theirs["r"]),
        "w+": error(ahead, square * share / torch.tensor(theirs["weight_factor"])),
        "w-": error(behind, square * (1 - share) / torch.tensor(theirs["negative_weight_factor"])),
        "distance to the prior": error(metrics["distance/prior"].mean(), theirs["kl_div_loss"]),
        "gradient": error(gradient, theirs["grad_loss_wrt_v_theta"]),
    }
    record_property("relative_errors", errors)
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("name", ["global_std", "prompt_std"])
def test_nft_advantages(name):
    """Those of Flow-GRPO too: population deviations with 1e-4 added."""
    for theirs, prefix in ((NFT["advantage"], ""), (golden("item11_grpo_guard_dppo")["advantages"], "flow_grpo/grpo/")):
        over = {"global_std": "round", "prompt_std": "group"}[name]
        rewards = double(theirs["rewards"])
        ours = group_normalised(theirs["prompts"], rewards, Deviation(over=over, correction=0, epsilon=1e-4))
        assert error(ours[None], [theirs[prefix + name]]) < TOLERANCE


def test_unbiased_deviations():
    theirs = golden("item11_grpo_guard_dppo")["advantages"]
    rewards, prompts = double(theirs["rewards"]), theirs["prompts"]
    for over, name in (("round", "True"), ("group", "False")):
        ours = group_normalised(prompts, rewards, Deviation(over=over, correction=1, epsilon=1e-4))
        assert error(ours[None], [theirs[f"verl_omni/global_std={name}/norm=True"]]) < TOLERANCE
    order = torch.tensor(theirs["grouped_order"])
    ours = group_normalised(prompts, rewards, Deviation(over="group", correction=1, epsilon=1e-8))
    assert error(ours[order][None], [theirs["dancegrpo/use_group=True (grouped order)"]]) < TOLERANCE


def test_copies_follow_as_published():
    nft = VelocityMatching(VelocityMatchingConfig(residual="old", anchors={"old": 1.0}, old_decay=0.5)).copies()["old"]
    assert [nft.decay(n) for n in range(221)] == pytest.approx(NFT["old_policy_decay"]["type1"])
    assert [nft.decay(n) for n in (499, 500, 600)] == pytest.approx(NFT["old_policy_decay"]["type1_at_500_600"])
    ema = VelocityMatching(VelocityMatchingConfig(anchors={"ema": 1.0})).copies()["ema"]
    theirs = golden("item9_awm")["ema_adapter"]
    assert [ema.decay(n) for n in theirs["steps"]] == pytest.approx(theirs["decay"])


# Advantage weighted matching -----------------------------------------------------------------------------------------

AWM = golden("item9_awm")
POWERS = ("ghuber",)  # their other weightings are not options of ours


@pytest.mark.parametrize(
    "case",
    [
        c for c in AWM["cases"]
        if c["config"]["weighting"] in POWERS and c["config"]["loss_type"] == "exp_first"
        and c["config"]["kl_weight"] == "Uniform"
    ],
    ids=lambda c: "-".join(str(c["config"][key]) for key in ("ghuber_power", "clip_range", "advantage_max", "beta"))
    + c["policy"],
)  # fmt: skip
def test_awm(case, record_property):
    given = {name: double(value) for name, value in AWM["inputs"].items()}
    config, theirs = case["config"], case["f64"]
    old = given["v_theta"] if case["policy"] == "on" else given["v_old"]
    core = given_core(given["timesteps"], policy=given["v_theta"], old=old, prior=given["v_ref"], ema=given["v_ema"])
    scale = 0.2 if config["advantage_max"] else 1.0
    used = (scale * given["advantages"].clamp(-5, 5)).repeat(3)
    part = noised(core, given["x0"], given["noise"], used)
    method = VelocityMatching(
        VelocityMatchingConfig(
            weight="likelihood",
            power=config["ghuber_power"],
            ratio_clip=config["clip_range"],
            anchors={"prior": config["beta"], "ema": config["ema_beta"]},
        )
    )
    gradient, _, metrics = learned(method, core, part)
    errors = {
        "advantages": error(used[None], [theirs["advantages_used"]]),
        "ratio": error(metrics["ratio"], theirs["ratio"]),
        "distance to the prior": error(metrics["distance/prior"].mean(), theirs["kl_loss"]),
        "distance to the average": error(metrics["distance/ema"].mean(), theirs["ema_kl_loss"]),
    }
    if "grad_loss_wrt_v_theta" in theirs:
        errors["gradient"] = error(gradient, theirs["grad_loss_wrt_v_theta"])
    else:
        errors["gradient"] = error(gradient.flatten(1).norm(dim=1), theirs["grad_loss_wrt_v_theta_l2"])
    record_property("relative_errors", errors)
    assert max(errors.values()) < TOLERANCE, errors


# Reward-based velocity matching --------------------------------------------------------------------------------------

RVM = golden("item14_rvm")


@pytest.mark.parametrize("case", RVM["cases"], ids=lambda c: str(c["anchor_beta"]))
def test_rvm(case):
    given = {name: double(value) for name, value in RVM["inputs"].items()}
    core = given_core(given["t"], policy=given["v_theta"], prior=given["v_ref"])
    part = noised(core, given["x0"], given["noise"], given["advantage"])
    method = VelocityMatching(VelocityMatchingConfig(factor=0.5, anchors={"prior": case["anchor_beta"]}))
    gradient, bracket, _ = learned(method, core, part)
    assert error(gradient, case["f64"]["grad_loss_wrt_v_theta"]) < TOLERANCE
    assert error(0.5 * bracket.square().mean(), case["f64"]["loss"]) < TOLERANCE


@pytest.mark.parametrize("case", [c for c in RVM["advantage"]["cases"] if "positive_only" not in c["kwargs"]],
                         ids=lambda c: c["name"])  # fmt: skip
def test_rvm_advantages(case):
    """Theirs is given the global deviation; ours computes it."""
    groups = RVM["advantage"]["groups"]
    over = "round" if "normalization_std" in case["kwargs"] else "group"
    prompts = [str(i) for i, group in enumerate(groups) for _ in group]
    rewards = double([reward for group in groups for reward in group])
    core = given_core(double([0.5]), policy=torch.zeros(1, 2), prior=torch.zeros(1, 2))
    config = {"advantage_clip": case["kwargs"].get("clip", 5.0), "scale": case["kwargs"].get("scale", 0.1)}
    method = VelocityMatching(
        VelocityMatchingConfig(deviation=Deviation(over=over, correction=0, epsilon=1e-4), **config)
    )
    data = Trajectory(prompts, [(p, i) for i, p in enumerate(prompts)], core.model.encode(prompts),
                      latents=torch.zeros(len(prompts), 2, 2), rewards=rewards)  # fmt: skip
    ours = method.prepare(core, data).advantages
    theirs = [advantage for group in case["advantages"] for advantage in group]
    assert error(ours[None], [theirs]) < TOLERANCE


# Policy gradient on flows --------------------------------------------------------------------------------------------

GRPO = golden("item11_grpo_guard_dppo")
KINDS = {  # name → rule, η's own, options; what else the file holds differs from ours by design or by defect
    "flow_grpo": ("euler", {"kl": 0.04, "kl_unit": "rate"}),
    "flow_cps": ("cps", {"kl": 0.004, "kl_unit": "square", "density": "square"}),
    "dancegrpo": ("dance", {}),
    "mixgrpo": ("euler", {}),
    "verl_guard": ("euler", {"surrogate": "guard", "clip": 2e-6}),
    "precise_rationorm": ("sde", {"surrogate": "guard", "clip": 4e-6}),
    "verl_dppo": ("euler", {"surrogate": "mask"}),
    "unirl_dppo": ("euler", {"surrogate": "mask"}),
}


def usable(case: dict) -> bool:
    """GRPO-Guard's ports take batch means over mixed steps; UniRL clamps 1 − s at the first."""
    mixed = len(set(case["steps"])) > 1
    own = {"verl_guard": not mixed, "precise_rationorm": not mixed, "unirl_dppo": 0 not in case["steps"]}
    return case["loss_name"] in KINDS and own.get(case["loss_name"], True)


@pytest.mark.parametrize(
    "case",
    [c for c in GRPO["cases"] if usable(c)],
    ids=lambda c: f"{c['loss_name']}-{''.join(map(str, c['steps']))}-{c['policy'][:3]}",
)
def test_policy_gradients(case, record_property):
    given, theirs = {name: double(value) for name, value in GRPO["inputs"].items()}, case["f64"]
    rule, options = KINDS[case["loss_name"]]
    sigmas, k = double(GRPO["grid"]["sigmas"]), torch.tensor(case["steps"])
    kernel = Kernel(1000 * sigmas[:-1], (1 - sigmas) ** 2, case["noise_level"], rule, "flow", sigmas)
    on = case["policy"].startswith("on")
    model = Given(dtype=torch.float64)
    policy = (given["v_old"] if on else given["v_theta"]).clone().requires_grad_()
    model.outputs = {"policy": policy, "prior": given["v_ref"]}
    core = Core(model, kernel, Nothing(Config()), 1.0)
    z = given["sample"]
    z_next = kernel.mean(z, given["v_old"], k) + kernel.std(k, z) * given["noise"]
    limit = None if "dppo" in case["loss_name"] else 5.0
    advantages = given["advantages"] if limit is None else given["advantages"].clamp(-limit, limit)
    names, rows = [(str(i), 0) for i in range(4)], torch.arange(4)
    part = Transitions(
        [p for p, _ in names], names, model.encode([""] * 4), row=rows, k=k, unfinished=rows, finished=rows[:0], z=z,
        z_next=z_next, model_output=given["v_old"], advantages=advantages,
    )  # fmt: skip
    method = FlowGRPO(FlowGRPOConfig(**options))
    values, metrics = method.transition_losses(core, part)
    loss = values.mean()
    if case["loss_name"] == "precise_rationorm":  # divides by |∂μ/∂v| instead
        change = (kernel.mean(z, policy + 1, k) - kernel.mean(z, policy, k)).detach().abs().flatten(1)[:, 0]
        loss = (values * kernel.noise_decrease(k, z).flatten() / change).mean()
    loss.backward()
    errors = {}
    if case["loss_name"] == "mixgrpo":
        errors["policy loss"] = error(loss, theirs["policy_loss"])
    else:
        errors["loss"] = error(loss, theirs["loss"])
        if "grad_loss_wrt_v_theta" in theirs:
            errors["gradient"] = error(policy.grad, theirs["grad_loss_wrt_v_theta"])
        else:
            errors["gradient"] = error(policy.grad.flatten(1).norm(dim=1), theirs["grad_loss_wrt_v_theta_l2"])
    if case["loss_name"] not in ("verl_guard", "precise_rationorm"):
        now, before = (torch.tensor(theirs[name], dtype=torch.float64) for name in ("log_prob", "old_log_prob"))
        difference = now - before
        errors["log-ratio"] = float((metrics["log_ratio"] - difference).abs().max())
    if "ratio" in theirs:
        errors["ratio"] = error(metrics["log_ratio"].exp(), theirs["ratio"])
    if "kl_loss" in theirs and "kl" in metrics:
        errors["kl"] = error(metrics["kl"].mean(), theirs["kl_loss"])
    if on:
        assert torch.equal(metrics["log_ratio"], torch.zeros(4, dtype=torch.float64))
    record_property("relative_errors", errors)
    assert max(errors.values()) < TOLERANCE, errors


# Preferences ---------------------------------------------------------------------------------------------------------

DPO = golden("item12_diffusion_dpo")


def preferred(core: Core, winners: Tensor, losers: Tensor, noise: Tensor, k: Tensor, strength: float) -> tuple:
    """Loss, accuracy, gradient in the outputs (winners first), and the noised samples, of pairs that differ."""
    vars(core)["steps"] = k
    part = noised(core, winners, noise, torch.ones(len(k), dtype=torch.float64))
    core.model.outputs["policy"].requires_grad_()
    values, metrics = OnlineDPO(OnlineDPOConfig(strength=strength)).pair_losses(core, part, losers)
    values.mean().backward()
    accuracy = metrics["accuracy"].mean()
    return values.mean(), accuracy, core.model.outputs["policy"].grad, part.z, core.kernel.noised(losers, noise, k)


@pytest.mark.parametrize("case", DPO["epsilon"]["cases"], ids=lambda c: str(c["beta_dpo"]))
def test_preferences_of_noise(case):
    given, theirs = {name: torch.tensor(value) for name, value in DPO["epsilon"]["inputs"].items()}, case["f64"]
    table = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    kernel = ddim_kernel(table, 1000, steps_offset=0).to(dtype=torch.float64)
    model = Given(dtype=torch.float64)
    model.outputs = {"policy": given["model_pred"].double(), "prior": given["ref_pred"].double()}
    core = Core(model, kernel, Nothing(Config()), 1.0)
    winners, losers = given["latents"].double().chunk(2)
    k = 999 - given["timesteps"][:3].long()
    loss, accuracy, gradient, *states = preferred(
        core, winners, losers, given["noise"][:3].double(), k, float(case["beta_dpo"])
    )
    errors = [error(loss, theirs["loss"]), error(accuracy, theirs["implicit_acc"])]
    if "grad_loss_wrt_model_pred" in theirs:
        errors += [error(gradient, theirs["grad_loss_wrt_model_pred"])]
    else:
        errors += [error(gradient.flatten(1).norm(dim=1), theirs["grad_loss_wrt_model_pred_l2"])]
    errors += [error(torch.cat(states), given["noisy_latents"])]
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("code", ["flow_factory", "verl_omni"])
@pytest.mark.parametrize("place", [0, 1])
def test_preferences_of_velocities(code, place):
    given, case = {name: double(value) for name, value in DPO["flow"]["inputs"].items()}, DPO["flow"][code][place]
    outputs = {name: torch.cat([given[f"{own}_w"], given[f"{own}_l"]]) for name, own in
               (("policy", "theta"), ("prior", "ref"))}  # fmt: skip
    core = given_core(given["sigma"], **outputs)
    loss, accuracy, gradient, *states = preferred(
        core, given["chosen"], given["rejected"], given["noise"], core.steps, float(case["beta"])
    )
    theirs = case["f64"]
    errors = [error(loss, theirs["loss"])]
    errors += [error(accuracy, theirs.get("implicit_accuracy", theirs.get("implicit_acc")))]
    for ours, name in zip(gradient.chunk(2), ("grad_loss_wrt_theta_w", "grad_loss_wrt_theta_l"), strict=True):
        if name in theirs:
            errors.append(error(ours, theirs[name]))
        else:
            errors.append(error(ours.flatten(1).norm(dim=1), theirs[f"{name}_l2"]))
    for ours, name in zip(states, ("noised_chosen", "noised_rejected"), strict=True):
        errors.append(error(ours, DPO["flow"][name]))
    assert max(errors) < TOLERANCE, errors


def test_pairs():
    """Best and worst by group; a group without two different scores is told apart from the others."""
    pairing = DPO["pairing"]
    scores, groups = double(pairing["scores"]), [str(uid) for uid in pairing["uid"]]
    best, worst = best_and_worst(groups, scores)
    ours = {groups[i]: (int(best[i]), int(worst[i])) for i in range(len(groups))}
    theirs = {groups[w]: (w, other) for w, other in pairing["flow_factory_pairs"] if scores[w] != scores[other]}
    assert {uid: pair for uid, pair in ours.items() if scores[pair[0]] != scores[pair[1]]} == theirs
    assert len(theirs) == len(set(groups)) - 2  # one has a single sample, one two equal ones


# VGG-Flow ------------------------------------------------------------------------------------------------------------

VGG, PRUNED = golden("item10_vggflow"), golden("item13_rsm_prune")


class Closed(GaussianFlowModel):
    """Velocities `a x + b sin x + c (t/1000) cos x + e`; the unconditional half of the guidance is detached."""

    def __init__(self, inputs: dict):
        super().__init__(dtype=torch.float64)
        self.inputs = inputs
        self.theta, self.reference = (double(inputs[name]) for name in ("theta", "theta_ref"))
        self.theta.requires_grad_()

    def predict(self, z, t, conditioning, *, prior=False, guided=True):
        def velocity(shift: list) -> Tensor:
            a, b, c = self.reference if prior else self.theta
            e = double(shift).view(-1, 1, 1, 1)
            return a * z + b * torch.sin(z) + c * (t.view(-1, 1, 1, 1) / 1000) * torch.cos(z) + e

        null, text = velocity(self.inputs["e_uncond"]).detach(), velocity(self.inputs["e_cond"])
        return null + self.inputs["guidance_scale"] * (text - null)

    def decode(self, z):
        y = z / self.inputs["vae_scaling_factor"] + self.inputs["vae_shift_factor"]
        return ((0.8 * torch.tanh(0.6 * y) + 1) / 2).clamp(0, 1)


class Scaled(Reward):
    """`k_i mean(img + 0.3 sin 3 img) + o_i` of row i."""

    scale, source = "", ""
    rows: tuple[Tensor, Tensor]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        factor, offset = self.rows
        return factor * (images + 0.3 * torch.sin(3 * images)).flatten(1).mean(1) + offset


def vgg_case(file: dict, case: dict) -> tuple[Core, VGGFlow, Transitions, Tensor]:
    inputs, config = file["inputs"], case["config"]
    sigmas, k = double(file["grid"]["sigmas"]), torch.tensor(case["positions"])
    reward = Scaled(Config())
    reward.rows = tuple(double([row[name] for row in inputs["metadata"]]) for name in "ko")
    kernel = Kernel(1000 * sigmas[:-1], (1 - sigmas) ** 2, 0.0, "ddim", "flow", sigmas)
    core = Core(Closed(inputs), kernel, reward, config["reward_scale"])
    params = double(inputs["value_params"]).requires_grad_()

    def value(name, z, at, conditioning):  # theirs is asked for zero at the last step's state, not after it
        p, q, w = params
        time = kernel.timesteps[at.clamp(max=kernel.steps - 1)].view(-1, 1, 1, 1)
        return p * z + q * torch.sin(z) + w * time / 1000 * torch.cos(z)

    vars(core)["network"] = value
    method = VGGFlow(
        VGGFlowConfig(
            schedule=config["eta_mode"],
            largest=config["rgrad_threshold"] if config["quantile_clipping"] else None,
            gradient_at="sample" if config.get("use_saved_rgrad_x1") else "prediction",
            value_network=config["use_value_net"],
            terminal=config["coeff_terminal"],
            consistency=0.0,
        )
    )
    z, rows = double(inputs["xt"]), torch.arange(2)
    part = Transitions(["a", "b"], [("a", 0), ("b", 0)], core.model.encode(["a", "b"]), row=rows, k=k,
                       unfinished=rows[k < 19], finished=rows[k == 19], z=z, z_next=z)  # fmt: skip
    return core, method, part, params


@pytest.mark.parametrize(
    "file, case",
    [(file, case) for file in (VGG, PRUNED) for case in file["cases"]
     if not case["config"]["reward_masking"] and not case["config"].get("unet_reg_scale")],
    ids=lambda value: "-".join(map(str, [*value["positions"], *value["config"].values()])) if "config" in value else "",
)  # fmt: skip
def test_vgg_flow(file, case, record_property):
    """Every term but the consistency (the golden README's first deviation says what is wrong with that)."""
    core, method, part, params = vgg_case(file, case)
    theirs, known, errors = case["f64"], None, {}
    if method.config.gradient_at == "sample":
        rewards, scores = core.reward_gradient(double(file["inputs"]["x1"]), part.prompts)
        known = rewards, scores
        norms = scores.flatten(1).norm(dim=1)
        errors |= {"rewards": error(rewards, theirs["rewards"]), "at x1": error(norms, theirs["saved_rgrad_x1_norm"])}
    else:
        output = core.predict(part.z, part.k, part.conditioning).detach()
        rewards, scores = core.reward_gradient(core.kernel.clean(part.z, output, part.k), part.prompts)
        errors["raw gradient"] = error(scores.flatten(1).norm(dim=1), theirs["rgrad_norm"])
    level = (1 - core.kernel.noise_level(part.k, part.z)).flatten()
    eta = level ** {"quad": 2, "linear": 1, "constant": 0}[method.config.schedule]
    pull = method.pull(core, part.k, scores)
    values, losses = method.transition_losses(core, part, known)
    values.mean().backward()
    inputs = [part.z, part.k, part.conditioning]
    correction = pull + (core.network("value", part.z, part.k, None) if method.config.value_network else 0)

    full = {
        "rgrad": pull / (-core.beta * eta.view(-1, 1, 1, 1)),
        "velocity_target": core.predict(*inputs, prior=True) + correction,
        "v_theta_cfg": core.predict(*inputs),
    }  # stored for some of the cases
    errors |= {name: error(ours, theirs[name]) for name, ours in full.items() if name in theirs}
    errors |= {
        "velocity": error(losses["velocity"].mean(), theirs.get("loss_raw", theirs.get("loss_velocity"))),
    }
    names = ("grad_params_loss_raw", "grad_params_loss")
    gradient = next(theirs[name] for name in names if name in theirs)[:3]
    errors["gradient of θ"] = error(core.model.theta.grad, gradient)
    if "loss_terminal" in theirs and 19 in case["positions"]:
        scale = method.config.terminal * len(part.finished) / len(part)  # their mean is over last steps alone
        errors["terminal"] = error(losses["terminal"].mean() / scale, theirs["loss_terminal"])
        if "grad_params_loss_terminal" in theirs:
            ours = params.grad / scale
            errors["gradient of ν"] = error(ours, theirs["grad_params_loss_terminal"][3:])
    record_property("relative_errors", errors)
    assert max(errors.values()) < TOLERANCE, errors
