"""Costs and weights of value matching beside those of the published code, which steps by Euler–Maruyama."""

from types import SimpleNamespace

import torch
from bench.methods.value_matching import ValueMatching, ValueMatchingConfig
from golden_numbers import TOLERANCE, error, golden
from torch import Tensor

PUBLISHED = golden("item18_value_matching")
STEPS = len(PUBLISHED["sigma"])


class GivenSteps:
    """A kernel whose outputs are means already."""

    def __init__(self, deviations: list[float] | Tensor):
        self.deviations = torch.as_tensor(deviations, dtype=torch.float64)

    def mean(self, z: Tensor, output: Tensor, k: int) -> Tensor:
        return output

    def std(self, k: int, z: Tensor) -> Tensor:
        return self.deviations[k]


def trajectory() -> SimpleNamespace:
    """States [n, K+1, d], means of the steered and of the prior's steps, and rewards, of the published run."""
    states, times, drift, before, rewards = (
        torch.tensor(PUBLISHED[name], dtype=torch.float64)
        for name in ("trajectories", "times", "drift", "prior_drift", "rewards")
    )
    dt = times.diff()[:, None, None]
    means, prior_means = (states[:-1] + dt * one for one in (drift, before))
    parts = {"latents": states, "model_output": means, "prior_output": prior_means}
    return SimpleNamespace(**{name: part.transpose(0, 1) for name, part in parts.items()}, rewards=rewards, steps=STEPS)


def test_costs_are_the_published() -> None:
    """But for the length of a step: the published sum has 1/K where the steps are of 0.98/K."""
    data, beta = trajectory(), PUBLISHED["reward_scale"]
    dt = float(torch.tensor(PUBLISHED["times"], dtype=torch.float64).diff().mean())
    kernel = GivenSteps(torch.tensor(PUBLISHED["sigma"], dtype=torch.float64) * dt**0.5)
    ours = ValueMatching(ValueMatchingConfig(target="kl")).costs(SimpleNamespace(kernel=kernel, beta=beta), data)
    end = -beta * data.rewards[:, None]
    assert error((end + (ours - end) / (STEPS * dt)).T, PUBLISHED["costs"]) < TOLERANCE


def test_weights_are_the_published() -> None:
    """From the first state on that is regressed here; at z_0 the published deviation is infinite."""
    deviations = torch.tensor([float(sigma) for sigma in PUBLISHED["weight_sigma"][:STEPS]], dtype=torch.float64)
    core = SimpleNamespace(kernel=GivenSteps(deviations / STEPS**0.5))
    ours = ValueMatching(ValueMatchingConfig()).weights(core, trajectory())
    assert error(ours[1:], PUBLISHED["weights"][1:]) < TOLERANCE
