"""The steps of published samplers of flows, against their numbers."""

import math

import pytest
import torch
from golden_numbers import TOLERANCE, error, golden
from torch import Tensor

from bench.sampling.grids import flow_kernel
from bench.sampling.kernel import Kernel, gaussian_log_prob

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
