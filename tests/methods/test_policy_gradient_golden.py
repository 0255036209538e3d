"""Policy gradients against numbers of the published code."""

import math

import pytest
import torch
from bench.methods.policy_gradient.dance_grpo import DanceGRPO
from bench.methods.policy_gradient.flow_cps import FlowCPS
from bench.methods.policy_gradient.flow_dppo import FlowDPPO
from bench.methods.policy_gradient.flow_grpo import FlowGRPO
from bench.methods.policy_gradient.grpo_guard import GRPOGuard
from bench.methods.policy_gradient.mix_grpo import MixGRPO
from golden_numbers import (
    LAST_TOLERANCE,
    TOLERANCE,
    Given,
    Nothing,
    double,
    error,
    golden,
    kernel_of,
)
from torch import Tensor

from bench.core import Core
from bench.options import Config
from bench.sampling.kernel import Kernel, gaussian_log_prob
from bench.sampling.trajectory import Transitions


@pytest.mark.parametrize(
    "case", golden("item2_ddpo_logprob")["cases"], ids=lambda c: f"{c['num_steps']}-{c['position']}"
)
@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_log_probabilities_and_their_gradients(case, precision, sd_alphas_cumprod, record_property):
    data, dtype = golden("item2_ddpo_logprob"), {"f32": torch.float32, "f64": torch.float64}[precision]
    (kernel, k), theirs = kernel_of(case, dtype, sd_alphas_cumprod), case[precision]
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


GRPO = golden("item11_grpo_guard_dppo")
KINDS = {  # name → rule, class, its options; what else the file holds differs from ours by design or by defect
    "flow_grpo": ("euler", FlowGRPO, {}),
    "flow_cps": ("cps", FlowCPS, {}),
    "dancegrpo": ("dance", DanceGRPO, {}),
    "mixgrpo": ("euler", MixGRPO, {}),
    "verl_guard": ("euler", GRPOGuard, {}),
    "precise_rationorm": ("sde", GRPOGuard, {"clip": 4e-6}),
    "verl_dppo": ("euler", FlowDPPO, {}),
    "unirl_dppo": ("euler", FlowDPPO, {}),
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
    rule, kind, options = KINDS[case["loss_name"]]
    sigmas, k = double(GRPO["grid"]["sigmas"]), torch.tensor(case["steps"])
    kernel = Kernel(1000 * sigmas[:-1], (1 - sigmas) ** 2, case["noise_level"], rule, "flow", sigmas)
    on = case["policy"].startswith("on")
    model = Given(dtype=torch.float64)
    policy = (given["v_old"] if on else given["v_theta"]).clone().requires_grad_()
    model.outputs = {"policy": policy, "prior": given["v_ref"]}
    core = Core(model, kernel, Nothing(Config()), 1.0)
    z = given["sample"]
    z_next = kernel.mean(z, given["v_old"], k) + kernel.std(k, z) * given["noise"]
    method = kind(kind.Config(**options))
    limit = method.config.advantage_clip
    advantages = given["advantages"] if limit is None else given["advantages"].clamp(-limit, limit)
    names, rows = [(str(i), 0) for i in range(4)], torch.arange(4)
    part = Transitions(
        [p for p, _ in names], names, model.encode([""] * 4), row=rows, k=k, unfinished=rows, finished=rows[:0], z=z,
        z_next=z_next, model_output=given["v_old"], advantages=advantages,
    )  # fmt: skip
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
