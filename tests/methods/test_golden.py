"""Agreement with numbers that the published implementations produced (`tests/golden/README.md` says how).

What the published code does differently on purpose or by mistake lives here in subclasses, nowhere in the product.
"""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from bench.methods.adjoint_matching import AdjointMatching, AdjointMatchingConfig, lean_adjoint
from bench.methods.balance.dag_kl import DAGKL
from bench.methods.balance.db import DB
from bench.methods.nabla.base import NablaMethod
from bench.methods.nabla.published import NablaGFNPublished
from bench.methods.nabla.residual import NablaGFNNoFlow
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from scaffold import GOLDEN, pipeline_model
from torch import Tensor

from bench.core import Core
from bench.model import Conditioning
from bench.models.analytic import GaussianModel
from bench.models.stable_diffusion import StableDiffusion
from bench.options import Config
from bench.reward import Reward
from bench.sampling.grids import ddim_kernel, flow_kernel
from bench.sampling.kernel import Kernel, gaussian_log_prob
from bench.sampling.trajectory import Trajectory, Transitions

TOLERANCE = 1e-5  # float32
LAST_TOLERANCE = 5e-5  # float32 at t = 1, where 1 − ᾱ cancels
CANCELLING = ("trust", "loss")  # ε_θ − ε_old leaves two of seven digits, whatever the processor; the loss contains it


@cache
def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def error(ours: Tensor, theirs: Tensor | list) -> float:
    """Largest relative error over rows, in the Euclidean norm of a row."""
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    ours = ours.detach().double().reshape(theirs.shape)
    rows = len(theirs) if theirs.ndim else 1
    difference, size = (ours - theirs).reshape(rows, -1).norm(dim=1), theirs.reshape(rows, -1).norm(dim=1)
    return float((difference / size.clamp(min=1e-30)).max())


def kernel_of(case: dict, dtype: torch.dtype, table: Tensor) -> tuple[Kernel, Tensor]:
    """The kernel of a golden case, and the step of each row."""
    kernel = ddim_kernel(table, case["num_steps"], eta=1.0, steps_offset=1).to(dtype=dtype)
    position = case["position"]
    k = torch.tensor(position if isinstance(position, list) else [position] * 2)
    assert kernel.timesteps[k].tolist() == case["timestep"]
    return kernel, k


@pytest.fixture(scope="module")
def table() -> Tensor:
    """Stable Diffusion's schedule in float32, as diffusers computes it."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    table = torch.cumprod(1 - betas, 0)
    for t, alpha in golden("item1_nabla_step")["alphas_cumprod_f32_at"].items():
        assert table[int(t)].item() == pytest.approx(torch.tensor(alpha).item(), rel=1e-8)
    return table


@pytest.mark.parametrize("case", golden("item1_nabla_step")["cases"], ids=lambda c: f"{c['num_steps']}-{c['position']}")
@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_kernel_and_scores(case, precision, table, record_property):
    data, dtype = golden("item1_nabla_step"), {"f32": torch.float32, "f64": torch.float64}[precision]
    (kernel, k), theirs = kernel_of(case, dtype, table), case[precision]
    z, eps, z_next = (torch.tensor(x).to(dtype) for x in (data["sample"], data["model_output"], case["prev_sample"]))
    std = kernel.std(k, z)
    after = kernel.alphas_cumprod[k + 1]

    def forward(eps: Tensor) -> Tensor:
        return case["strength"] * (kernel.mean(z, eps, k) - z_next) / std**2

    ours = {
        "std": std,
        "alpha_prod_t": kernel.alphas_cumprod[k],
        "alpha_prod_next": after,
        "mean_from_score": kernel.mean(z, eps, k),
        "predict_clean": kernel.clean(z, eps, k),
        "score": forward(eps),
        "score_fn_forward": forward(0.3 * z + 0.1 * torch.sin(z)),
    }
    inner = k < kernel.steps - 1  # the finished sample is its own clean prediction
    ours["predict_clean_next"] = z_next.index_put(
        (inner,), kernel.clean(z_next[inner], eps[inner], (k + 1)[inner]) if inner.any() else z_next[inner]
    )
    z.requires_grad_()
    mean = kernel.mean(z, 0.3 * z + 0.1 * torch.sin(z), k)
    log_prob = case["strength"] * gaussian_log_prob(z_next, mean, std)
    (ours["score_fn_reverse"],) = torch.autograd.grad(log_prob.sum(), z)

    last = not bool(inner.all())
    tolerance = {"f32": LAST_TOLERANCE if last else TOLERANCE, "f64": 1e-10}[precision]
    compared = set(theirs) & set(ours)
    assert len(compared) == len(theirs) - 2 * (precision == "f32")  # f32 has two records of how it was measured
    errors = {name: error(ours[name], theirs[name]) for name in compared}
    record_property("relative_errors", errors)
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize(
    "case", golden("item2_ddpo_logprob")["cases"], ids=lambda c: f"{c['num_steps']}-{c['position']}"
)
@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_log_probabilities_and_their_gradients(case, precision, table, record_property):
    data, dtype = golden("item2_ddpo_logprob"), {"f32": torch.float32, "f64": torch.float64}[precision]
    (kernel, k), theirs = kernel_of(case, dtype, table), case[precision]
    z, eps, z_next = (torch.tensor(x).to(dtype) for x in (data["sample"], data["model_output"], case["prev_sample"]))
    eps.requires_grad_()
    std, mean = kernel.std(k, z), kernel.mean(z, eps, k)

    def averaged(x: Tensor) -> Tensor:
        return gaussian_log_prob(x, mean, std) / z[0].numel()

    log_prob = averaged(z_next)
    (gradient,) = torch.autograd.grad(log_prob.sum(), eps, retain_graph=True)
    rounded = torch.log(torch.sqrt(2 * torch.as_tensor(math.pi))).double()  # their constant, float32 in every run
    errors = {
        "std": error(std, theirs["std"]),
        "log_prob": error(log_prob + (0.5 * math.log(2 * math.pi) - rounded), theirs["log_prob"]),
        "gradient": error(gradient.flatten(1).norm(dim=1), theirs["grad_logprob_wrt_model_output_l2"]),
    }
    if precision == "f32":
        shifted = averaged(z_next + 0.05 * torch.sin(3 * z))
        errors["shifted"] = error(shifted, case["log_prob_shifted_f32"])
    record_property("relative_errors", errors)
    last = case["position"] == case["num_steps"] - 1
    assert max(errors.values()) < {"f32": LAST_TOLERANCE if last else TOLERANCE, "f64": 1e-10}[precision], errors


# A whole training step of ∇-GFlowNet ------------------------------------------------------------------------------


class GoldenReward(Reward):
    """The reward of the golden training step."""

    scale, source = "about 0 to 1", "tests/golden/README.md"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (
            images[:, 0].flatten(1).mean(1)
            - 0.5 * images[:, 2].flatten(1).mean(1)
            + 0.1 * torch.sin(4 * images).flatten(1).mean(1)
        )


class GoldenModel(StableDiffusion):
    """A pipeline whose text embeddings are given, by prompt."""

    embeddings: dict[str, Tensor]

    def encode(self, prompts: list[str]) -> Conditioning:
        return Conditioning({"text": torch.stack([self.embeddings[prompt] for prompt in prompts])})


class LastGamma(NablaMethod):
    """`γ_K = alphas_cumprod[0]` instead of 1."""

    def gamma(self, core: Core, k: Tensor, like: Tensor) -> Tensor:
        alpha = core.kernel.alpha_cumprod(k, like)
        return alpha if self.config.gamma == "alpha" else alpha**0.5


class PublishedNoFlow(LastGamma, NablaGFNNoFlow):
    """The forward loss alone with that peculiarity of the public code."""


class Published(LastGamma, NablaGFNPublished):
    """The published setting with the public code's peculiarities, none of which is an option of ours."""

    strength = 1.0  # of the prior's forward score and of both reverse scores

    def reference_scores(self, core, part, variance):
        return tuple(self.strength * score for score in super().reference_scores(core, part, variance))

    def policy_scores(self, core, part, z, output, mean, variance):
        cotangent = (part.z_next - mean.detach()) / variance
        (score,) = torch.autograd.grad(mean, z, cotangent, retain_graph=True)
        self.policy_score = self.strength * score
        return super().policy_scores(core, part, z, output, mean, variance) - score + self.policy_score

    def transition_losses(self, core, part):
        """Of the reverse loss the last transition has the constant `mean(score²)` of the policy's own score: nothing is
        learned from it. The terminal loss is the sum over last transitions over their number, added to every row."""
        losses, rewards = super().transition_losses(core, part)
        constant = self.config.reverse_weight * (self.policy_score[part.finished] ** 2).flatten(1).mean(1)
        losses["reverse"] = losses["reverse"].index_copy(0, part.finished, constant)
        losses["terminal"] = (losses["terminal"].sum() / (len(part.finished) + 1e-6)).expand(len(part))
        return losses, rewards


@pytest.fixture(scope="module")
def golden_pipeline(pipeline_folder, tmp_path_factory) -> Path:
    """The random pipeline with the golden autoencoder in it; the denoisers' shapes are the same."""
    step = golden("item4_main")
    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    assert all(pipe.unet.config[name] == value for name, value in step["unet_config"].items() if name != "down_blocks")
    pipe.vae = AutoencoderKL(**step["vae_config"])
    weights = load_file(GOLDEN / "item4_weights.safetensors")
    vae = {name.removeprefix("vae."): w.float() for name, w in weights.items() if name.startswith("vae.")}
    assert not pipe.vae.load_state_dict(vae, strict=False).unexpected_keys
    decoder = {name for name in pipe.vae.state_dict() if name.startswith(("decoder.", "post_quant_conv."))}
    assert decoder == set(vae)
    unet = {
        name.removeprefix("unet.").replace(".base_layer", ""): w.float()
        for name, w in weights.items()
        if name.startswith("unet.") and ".lora_" not in name
    }
    pipe.unet.load_state_dict(unet)
    folder = tmp_path_factory.mktemp("golden")
    pipe.save_pretrained(folder)
    return folder


def golden_step(
    name: str, folder: Path
) -> tuple[NablaMethod, Core, list[tuple[dict, str, Transitions]], dict[str, Tensor]]:
    """The method, its core, the micro-batches `(record, tensor prefix, transitions)` in order, and the tensors."""
    step, tensors = golden(f"item4_{name}"), load_file(GOLDEN / f"item4_{name}_tensors.safetensors")
    config = step["config"]["model"]
    model = pipeline_model(folder, GoldenModel, guidance=step["config"]["sampling"]["guidance_scale"])
    model.embeddings = {"": tensors["neg_prompt_embeds"].reshape(-1, 16, 16)[0]}
    for i in (0, 1):
        model.embeddings |= {f"{i} {row}": e for row, e in enumerate(tensors[f"i{i}.prompt_embeds"])}
    options = {
        "gamma": {"squared": "alpha", "sqrt": "sqrt_alpha"}[config["reward_adaptive_mode"]],
        "trust": config["unet_reg_scale"],
        "weighting": "score",
    }
    if config["no_flow"]:
        method = PublishedNoFlow(PublishedNoFlow.Config(**options))
    else:
        options |= {"reverse_weight": config["reverse_loss_scale"], "channels": config["flow_channel_width"]}
        method = Published(Published.Config(**options))
        method.strength = config["pretrained_strength"]
    kernel = ddim_kernel(model.spec.alphas_cumprod, 10, eta=1.0, steps_offset=1)
    core = Core(model, kernel, GoldenReward(Config()), beta=config["reward_scale"])
    core.networks.update(method.networks(model))
    with safe_open(GOLDEN / "item4_weights.safetensors", "pt") as file:
        scales, weights = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    adapters = model.adapters()
    for key, parameter in adapters.items():
        parameter.data.copy_(weights["unet." + key.replace(".default.", ".pf.")])
    for network in core.networks.values():
        for key, parameter in network.unet.named_parameters():
            parameter.data.copy_(weights[f"flow.{key}"] * float(scales[f"scale.flow.{key}"]))
    parts = []
    for record in step["transitions"]:
        i, prefix = record["micro_batch_i"], f"i{record['micro_batch_i']}_j{record['j']}."
        prompts = [f"{i} 0", f"{i} 1"]
        k = torch.tensor([step["timesteps"].index(t) for t in record["timesteps"]])
        part = Transitions(
            prompts,
            [(prompt, 0) for prompt in prompts],
            model.encode(prompts),
            row=torch.arange(2),
            k=k,
            unfinished=(k < 9).nonzero().flatten(),
            finished=(k == 9).nonzero().flatten(),
            z=tensors[prefix + "latents"],
            z_next=tensors[prefix + "next_latents"],
            model_output=tensors[prefix + "unet_outputs"],
        )
        parts.append((record, prefix, part))
    return method, core, parts, tensors


def gradient_norm(parameters) -> Tensor:
    return torch.stack([p.grad.double().norm() for p in parameters if p.grad is not None]).norm()


@pytest.mark.parametrize("name", ["main", "variant", "noflow"])
def test_training_step(name, golden_pipeline, record_property):
    method, core, parts, tensors = golden_step(name, golden_pipeline)
    step, adapters = golden(f"item4_{name}"), core.model.adapters()
    worst: dict[str, float] = {}

    def compare(what: str, ours: Tensor, theirs: Tensor | float, last: bool) -> None:
        found = error(ours, torch.as_tensor(theirs))
        key = f"{what}, t = 1" if last else what
        worst[key] = max(worst.get(key, 0.0), found)
        tolerance = LAST_TOLERANCE if last or what in CANCELLING else TOLERANCE
        assert found < tolerance, (what, part.k.tolist(), found)

    for record, prefix, part in parts:
        last = any(record["end_mask"])
        score, rewards, _ = method.reward_score(core, part)
        compare("reward score of z_{k+1}", score, tensors[prefix + "score_r_next"], last)
        compare("reward", rewards, record["logr_next"], last)
        losses, _ = method.transition_losses(core, part)
        values, found = sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}
        theirs = record["losses"]
        compare("forward loss", found["forward"].mean(), theirs["loss_forward_mean"], last)
        if core.networks:
            weight = method.config.reverse_weight
            compare("reverse loss", found["reverse"].mean() / weight, theirs["loss_backward_mean"], last)
            if last:
                compare("terminal loss", found["terminal"].mean(), theirs["loss_terminal"], last)
            assert found["terminal"].mean() == pytest.approx(theirs["loss_terminal"], rel=1e-5)
        compare("trust", found["trust"] / method.config.trust, record["unetreg_per_sample"], last)
        compare("loss", values.mean(), theirs["losses_total_before_accum"], last)
        (values.mean() / step["accumulation_steps"]).backward()
        # From here on gradients are sums that contain t = 1.
        compare(
            "norm of the policy's gradient",
            gradient_norm(adapters.values()),
            record["grad_cumulative"]["lora_l2"],
            True,
        )
        for network in core.networks.values():
            norm = gradient_norm(network.parameters())
            compare("norm of the flow's gradient", norm, record["grad_cumulative"]["flow_l2"], True)

    ours = torch.cat([p.grad.flatten() for p in adapters.values()])
    golden_gradient = [tensors["grad_lora_total." + key.replace(".default.", ".pf.")].flatten() for key in adapters]
    compare("policy's gradient", ours[None], torch.cat(golden_gradient)[None], True)
    if core.networks:
        named = dict(core.networks["flow"].unet.named_parameters())
        norms = torch.stack([named[key].grad.norm() for key in step["flow_grad_l2_per_param"]])
        compare(
            "flow's gradient by parameter",
            norms[None],
            torch.tensor([list(step["flow_grad_l2_per_param"].values())]),
            True,
        )
    record_property("relative_errors", worst)


# Adjoint Matching -------------------------------------------------------------------------------------------------


class Closed(GaussianModel):
    """The golden predictions: `0.3 z + 0.1 sin z`, finetuned `a z + b sin z + c cos z`."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.tensor([0.35, 0.1, 0.02]))

    def predict(self, z, t, conditioning, *, prior=False, guided=True):
        if prior:
            return 0.3 * z + 0.1 * torch.sin(z)
        a, b, c = self.weights
        return a * z + b * torch.sin(z) + c * torch.cos(z)


class Undulating(Reward):
    """The golden reward, of latents."""

    scale, source = "about 0", "tests/golden/README.md"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (0.5 * images + 0.3 * torch.sin(2 * images)).flatten(1).mean(1)


@pytest.mark.parametrize("case", golden("item5_adjoint_matching")["cases"], ids=lambda c: c["tag"])
def test_adjoint_matching(case, monkeypatch, record_property):
    params, latents = case["params"], torch.tensor(case["trajectory"])
    betas = torch.linspace(params["beta_start"] ** 0.5, params["beta_end"] ** 0.5, 1000) ** 2
    table = torch.cumprod(1 - betas, 0)
    kernel = ddim_kernel(
        table, params["T"], eta=params["eta"], spacing="trailing", final_alpha=float(case["final_alpha_cumprod"][0])
    )
    assert kernel.timesteps.tolist() == case["timesteps"]
    core = Core(Closed(), kernel, Undulating(Config()), beta=params["reward_multiplier"])
    names = [(str(i), 0) for i in range(len(latents))]
    data = Trajectory([prompt for prompt, _ in names], names, torch.zeros(len(latents), 1), latents=latents)
    adjoint, means, rewards = lean_adjoint(core, data)
    std = kernel.std(torch.arange(kernel.steps), latents[0, 1:])
    with torch.no_grad():
        finetuned = [
            kernel.mean(z, core.predict(z, k, data.conditioning), k) for k, z in enumerate(latents.unbind(1)[:-1])
        ]
    errors = {
        "final alpha": error(kernel.alphas_cumprod[-1:], case["final_alpha_cumprod"]),
        "std": error(std.flatten(), case["std_dev_t"]),
        "rewards": error(rewards, case["reward_values"]),
        "adjoint states": error(adjoint.flatten(0, 1), torch.tensor(case["adjoint_states"]).flatten(0, 1)),
        "controls": error(
            ((torch.stack(finetuned, 1) - means) / std).flatten(0, 1),
            torch.tensor(case["control_times_sqrt_dt"]).flatten(0, 1),
        ),
    }

    # Their code pairs step k with a_k, ours with a_{k+1}: hand ours the states one place later.
    def one_later(core: Core, data: Trajectory, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat([adjoint[:, :1], adjoint[:, :-1]], 1), means, rewards

    monkeypatch.setattr("bench.methods.adjoint_matching.lean_adjoint", one_later)
    method, theirs = AdjointMatching(AdjointMatchingConfig(fraction=1)), case["loss_all_timesteps"]
    loss = sum(part.values.sum() for part in method.losses(core, data)) / len(data)
    (gradient,) = torch.autograd.grad(loss, core.model.weights)
    errors["loss"] = error(loss[None], [theirs["loss"]])
    errors["gradient"] = error(gradient, [theirs["grad"][name] for name in "abc"])
    record_property("relative_errors", errors)
    assert max(errors.values()) < TOLERANCE, errors


# DAG-DB and DAG-KL --------------------------------------------------------------------------------------------------


class Guided(Closed):
    """`ε = uncond + w (cond − uncond)` of `a x + b sin x + e`; the conditioning holds both maps e."""

    def __init__(self, guidance: float):
        super().__init__()
        self.weights, self.guidance = torch.nn.Parameter(torch.tensor([0.3, 0.1])), guidance

    def predict(self, z, t, conditioning, *, prior=False, guided=True):
        base = self.weights[0] * z + self.weights[1] * torch.sin(z)
        conditional, unconditional = base + conditioning[:, 0], base + conditioning[:, 1]
        return unconditional + self.guidance * (conditional - unconditional) if guided else conditional


class StoredFlow(DB):
    """DAG-DB on given transitions, with stored flows: there a stub produced them, here they have tests of their own."""

    part: Transitions
    flows: tuple[Tensor, Tensor]

    def steps(self, core, data):
        return torch.zeros(len(data), 1)

    def terms(self, core, data, steps, size, rewards=None):
        output = core.predict(self.part.z, self.part.k, self.part.conditioning)
        yield self.balance(core, self.part, output, torch.zeros(0))

    def flow(self, core, part, z, k, rewards):
        return self.flows[int((k == part.k + 1).all())]


class StoredFlowDAGKL(StoredFlow, DAGKL):
    """The same of DAG-KL."""


@pytest.mark.parametrize("case", golden("item3_dag")["cases"], ids=lambda c: c["tag"])
def test_dag(case, table, record_property):
    params = case["params"]
    kernel = ddim_kernel(table, params["num_steps"], eta=1.0, steps_offset=1)
    k = torch.tensor([kernel.timesteps.tolist().index(time) for time in case["timestep"]])
    core = Core(Guided(params["guidance_scale"]), kernel, Undulating(Config()), beta=params["reward_exp"])
    field = {name: torch.tensor(value) for name, value in case.items() if isinstance(value, list)}
    names = [(str(i), 0) for i in range(3)]
    part = Transitions(
        [prompt for prompt, _ in names], names, torch.stack([field["text_add"], field["neg_add"]], 1),
        row=torch.arange(3), k=k, unfinished=torch.arange(3),
        finished=torch.arange(0), z=field["x_t"], z_next=field["x_prev"], model_output=field["unet_outputs_old"],
        log_prob=field["old_log_probs"] * field["x_t"][0].numel(),
    )  # fmt: skip
    kl = params["klpf"] > 0
    # their trust term is the plain mean of squares, as ours; β is in the stored flows
    method_class, options = StoredFlow, {"trust": params["unetreg"]}
    if kl:
        method_class = StoredFlowDAGKL
        options |= {"clip": params["clip_range"], "policy_weight": params["klpf"]}
        options |= {"advantage_clip": params["adv_clip_max"]}
    method = method_class(method_class.Config(**options))
    leaves = [field[name].clone().requires_grad_() for name in ("flow_model_out", "flow_model_out_next")]
    rewards, ends = [field["reward_hat"], field["reward_hat_next"]], field["end_mask"]
    now, after = (leaf + core.beta * reward for leaf, reward in zip(leaves, rewards, strict=True))
    after = torch.where(ends, core.beta * field["terminal_reward"], after)
    method.part, method.flows = part, (now, after)
    eps = core.predict(part.z, k, part.conditioning)
    std, (back_mean, back_std) = kernel.std(k, part.z), kernel.noising(part.z_next, k)
    count = part.z[0].numel()
    (terms,) = method.terms(core, part, None, 0)
    (loss,) = method.losses(core, part)
    gradients = torch.autograd.grad(loss.values.mean(), [core.model.weights, *leaves])
    clean = kernel.clean(part.z, core.predict(part.z, k, part.conditioning, guided=False), k)
    inner = ~ends  # the last transition's next state is finished
    following = k[inner] + 1
    clean_next = kernel.clean(
        part.z_next[inner],
        core.predict(part.z_next[inner], following, part.conditioning[inner], guided=False),
        following,
    )
    theirs = case["grad_loss"]
    errors = {
        "prediction": error(eps, field["noise_pred"]),
        "mean": error(kernel.mean(part.z, eps, k), field["pf_mean"]),
        "std": error(std.flatten(), field["pf_std"]),
        "noising mean": error(back_mean, field["pb_mean"]),
        "noising std": error(back_std.flatten(), field["pb_std"]),
        "log p_θ": error(terms.log_policy, field["log_pf"]),
        "log p_B": error(gaussian_log_prob(part.z, back_mean, back_std) / count, field["log_pb"]),
        "clean": error(clean, field["x0hat_for_reward"]),
        "next clean": error(clean_next, field["x0hat_next_for_reward"][inner]),
        "flows": max(error(now, field["flow_total"]), error(after, field["flow_next_total"])),
        "losses": error(loss.values, field["losses_before_mean"]),
        "gradient of ε": error(gradients[0], [theirs["a"], theirs["b"]]),
        "gradient of f_φ": error(torch.stack(gradients[1:]), [theirs["flow_model_out"], theirs["flow_model_out_next"]]),
    }
    if kl:
        stored = case["kl"]
        residual = terms.flow + terms.log_policy - terms.log_reference - terms.flow_next
        errors["advantages"] = error(method.advantages(residual.detach(), 3), stored["advantages"])
        errors["policy"] = error(loss.metrics["policy"] / params["klpf"], stored["losses_klpf"])
        ratio = torch.exp(terms.log_policy - part.log_prob / count)
        errors["ratio"] = error(ratio, stored["ratio"])
    record_property("relative_errors", errors)
    assert max(errors.values()) < TOLERANCE, errors


FLOW = golden("item6_flow_grpo")


@pytest.mark.parametrize(
    "case", FLOW["cases"], ids=lambda c: f"{c['shift']}-{c['num_steps']}-{c['positions']}-{c['noise_level']}"
)
def test_flow_grpo_step(case, record_property):
    """Flow-GRPO's grid to the bit, and its Euler step; the stated deviation is without √(−dt)."""
    k = torch.tensor(case["positions"])
    kernel = flow_kernel(case["num_steps"], rule="euler", eta=case["noise_level"], shift=case["shift"], final_noise=0.0)
    schedule = FLOW["schedules"][f"shift{case['shift']}_n{case['num_steps']}"]
    assert kernel.sigmas.tolist() == torch.tensor(schedule["sigmas"]).tolist()
    assert kernel.timesteps.tolist() == torch.tensor(schedule["timesteps"]).tolist()
    z, output, noise, shift = (torch.tensor(FLOW[name]) for name in ("sample", "model_output", "noise", "shift_tensor"))
    mean, std = kernel.mean(z, output, k), kernel.std(k, z)
    drawn = mean + std * noise
    ours = {
        "std_dev_t": std.flatten() / (kernel.sigmas[k] - kernel.sigmas[k + 1]) ** 0.5,
        "prev_sample_mean": mean,
        "prev_sample_sampled": drawn,
        "log_prob_sampled": gaussian_log_prob(drawn, mean, std) / z[0].numel(),
        "log_prob_shifted": gaussian_log_prob(drawn + 0.02 * shift, mean, std) / z[0].numel(),
    }
    errors = {name: error(value, case[name]) for name, value in ours.items() if name in case}
    assert len(errors) >= 3
    record_property("relative_errors", errors)
    assert max(errors.values()) < TOLERANCE, errors


STEPS = golden("item7_flow_kernels")
RULES = {  # the published samplers that ours has; Precise's dance_precise and MixGRPO's ODE point are theirs alone
    "flow_cps": "cps",
    "precise/precise": "sde",
    "precise/cps": "cps",
    "precise/flow_grpo": "euler",
    "precise/dance_grpo": "dance",
    "dancegrpo": "dance",
    "mixgrpo/flow_sde": "euler",
    "mixgrpo/dance_sde": "dance",
    "nft/ddim": "ddim",
}


@pytest.mark.parametrize(
    "case",
    [case for case in STEPS["cases"] if case["sampler"] in RULES],
    ids=lambda c: f"{c['sampler']}-{c['eta']:.2g}-{c['grid']}",
)
@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_flow_kernels(case, precision, record_property):
    """Mean, deviation, `∂μ/∂v` and log-density of the published steps, the first (s = 1) and the last among them."""
    dtype = {"f32": torch.float32, "f64": torch.float64}[precision]
    sigmas = torch.tensor(STEPS["grids"][case["grid"]]["sigmas"]).to(dtype)
    rule = RULES[case["sampler"]]
    kernel = Kernel(1000 * sigmas[:-1], (1 - sigmas) ** 2, case["eta"], rule, "flow", sigmas)
    k = torch.tensor(STEPS["positions"])
    z, output, noise, shift = (
        torch.tensor(STEPS["inputs"][name]).to(dtype) for name in ("sample", "model_output", "noise", "shift_tensor")
    )
    theirs = {name: value for name, value in case[precision].items() if "nan" not in str(value)}
    mean, std = kernel.mean(z, output, k), kernel.std(k, z)
    inner = std.flatten() > 0  # a last step without noise has no density, or theirs clamps its deviation
    drawn = mean + std * noise

    def log_prob(x: Tensor) -> Tensor:
        value = gaussian_log_prob(x, mean, std) / z[0].numel()
        if case["sampler"] == "flow_cps":  # published without its weight 1/(2σ²) and the constants
            return -(((x - mean) ** 2).flatten(1).mean(1))
        if case["sampler"] == "mixgrpo/dance_sde":  # published without the normaliser
            return value + torch.log(std.flatten()) + 0.5 * math.log(2 * math.pi)
        return value

    ours = {
        "std": std.flatten(),
        "mean": mean,
        "prev_sample": drawn,
        "log_prob": log_prob(drawn),
        "log_prob_shifted": log_prob(drawn + 0.02 * shift),
        "dmu_dv_autograd": (kernel.mean(z, output + 1, k) - mean).flatten(1).mean(1),
    }
    errors = {
        name: error(value[inner], torch.tensor(theirs[name], dtype=dtype)[inner])
        for name, value in ours.items()
        if name in theirs
    }
    assert {"std", "log_prob"} <= set(errors) or case["sampler"] == "nft/ddim"
    record_property("relative_errors", errors)
    tolerance = {"f32": 2e-5, "f64": TOLERANCE}[precision]  # MixGRPO's large noise cancels to 1.2e-5 in float32
    assert max(errors.values()) < tolerance, errors
