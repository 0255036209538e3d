"""A linear reward on a Gaussian: everything that is known of it in closed form, for any kernel. float64."""

from dataclasses import dataclass

import pytest
import torch
from scaffold import gradients
from torch import Tensor, nn

from bench.core import Core
from bench.diagnose.selftest.scaffold import BETA, DIRECTION
from bench.method import Method
from bench.sampling.trajectory import Trajectory

PATHS = pytest.mark.parametrize("path", ["diffusion", "flow"])  # of every method that declares p*


def places(core: Core) -> Tensor:
    """Long [K]: where the tables of the affine networks hold the steps."""
    return core.kernel.timesteps.round().long()


@dataclass
class Truth:
    """What is known of the linear-Gaussian problem on a kernel's grid.

    variance: `σ_k²` [K]; jacobian: `J_k = ∂μ_#/∂z_k` [K]; gain: `∂μ/∂o` [K]; look: `∂ẑ_#/∂z_k` [K+1], 1 at K;
    flow: `b_k = ∇ log F̃(z_k)` [K+1, d].
    """

    variance: Tensor
    jacobian: Tensor
    gain: Tensor
    look: Tensor
    flow: Tensor


def truth_of(core: Core) -> Truth:
    """From the Gaussian's own formulas: with `α, s` the path's levels and `v` the data's variance, the noise's slope in
    z is `s / (α² v + s²)`, the clean latent's `α v / (α² v + s²)`."""
    alphas, flow = core.kernel.alphas_cumprod, core.model.output == "flow"
    alpha = alphas.sqrt()
    s = 1 - alpha if flow else (1 - alphas).sqrt()
    variance = core.kernel.std(torch.arange(core.kernel.steps), alphas) ** 2
    spread = alphas * core.model.std**2 + s**2
    noise, look = (s / spread)[:-1], (alpha * core.model.std**2 / spread)[:-1]
    ratio = s[1:] * alpha[:-1] / (s[:-1] * alpha[1:])
    side = s[1:] * (1 - core.kernel.eta**2 + (core.kernel.eta * ratio) ** 2).sqrt()
    jacobian = alpha[1:] * look + side * noise
    gradients = [BETA * DIRECTION]
    for j in jacobian.flip(0):
        gradients.insert(0, j * gradients[0])
    # v moves x̂ by −s and ε̂ by α; ε moves x̂ by −s/α and itself by 1
    gain = (alpha[:-1] * side - alpha[1:] * s[:-1]) / (1 if flow else alpha[:-1])
    return Truth(variance, jacobian, gain, torch.cat([look, torch.ones_like(look[:1])]), torch.stack(gradients))


def shift_policy(core: Core, drift: Tensor) -> None:
    """Make `μ_θ = μ_# + σ_k² drift_k`, drift [K, d]."""
    truth = truth_of(core)
    change = (truth.variance / truth.gain).unsqueeze(1) * drift
    core.model.adapters()["bias"].data[places(core)] = change


def everything(core: Core) -> list[nn.Parameter]:
    return [*core.model.adapters().values(), *(p for net in core.networks.values() for p in net.parameters())]


def losses_and_departures(core: Core, method: Method, data: Trajectory, tables: list[tuple[Tensor, list[int]]]) -> None:
    """Loss and gradient are zero (1e-10) here, and the loss is positive after a step in any entry of the tables."""
    total, gradient = gradients(method.losses(core, data), len(data), everything(core))
    assert 0 <= total < 1e-10
    assert gradient.abs().max() < 1e-10
    for table, places in tables:
        for place in places:
            before = table.data[place].clone()
            table.data[place] += 0.1
            assert sum(loss.values.sum().item() for loss in method.losses(core, data)) / len(data) > 1e-6
            table.data[place] = before
