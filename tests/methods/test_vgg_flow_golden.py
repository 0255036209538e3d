"""VGG-Flow against numbers of the published code."""

import pytest
import torch
from bench.methods.vgg_flow import VGGFlow, VGGFlowPruned, reward_term
from golden_numbers import TOLERANCE, double, error, golden
from torch import Tensor

from bench.core import Core
from bench.models.analytic import GaussianFlowModel
from bench.options import Config
from bench.reward import Reward
from bench.sampling.kernel import Kernel
from bench.sampling.trajectory import Transitions

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


def vgg_case(file: dict, case: dict) -> tuple[Core, VGGFlow | VGGFlowPruned, Transitions, Tensor]:
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
    method_class, options = VGGFlowPruned, {}
    if config["use_value_net"]:
        method_class, options = VGGFlow, {"terminal": config["coeff_terminal"], "consistency": 0.0}
    largest = config["rgrad_threshold"] if config["quantile_clipping"] else None
    method = method_class(method_class.Config(schedule=config["eta_mode"], largest=largest, **options))
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
    theirs, errors, learned = case["f64"], {}, isinstance(method, VGGFlow)
    if case["config"].get("use_saved_rgrad_x1"):
        rewards, scores = core.reward_gradient(double(file["inputs"]["x1"]), part.prompts)
        norms = scores.flatten(1).norm(dim=1)
        errors |= {"rewards": error(rewards, theirs["rewards"]), "at x1": error(norms, theirs["saved_rgrad_x1_norm"])}
    else:
        output = core.predict(part.z, part.k, part.conditioning).detach()
        rewards, scores = core.reward_gradient(core.kernel.clean(part.z, output, part.k), part.prompts)
        errors["raw gradient"] = error(scores.flatten(1).norm(dim=1), theirs["rgrad_norm"])
    level = (1 - core.kernel.noise_level(part.k, part.z)).flatten()
    eta = level ** {"quad": 2, "linear": 1, "constant": 0}[method.config.schedule]
    pull = reward_term(core, method.config, part.k, scores)
    if learned:
        values, losses = method.transition_losses(core, part)
    else:  # some of theirs have no value network and yet the gradient at the prediction
        values = method.transition_losses(core, part, scores)
        losses = {"velocity": values.detach()}
    values.mean().backward()
    inputs = [part.z, part.k, part.conditioning]
    correction = pull + (core.network("value", part.z, part.k, None) if learned else 0)

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
