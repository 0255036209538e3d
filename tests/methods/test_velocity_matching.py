"""Regression on the forward process: its gradient against autograd of the published losses, its fixed point."""

import pytest
import torch
from bench.methods.velocity_matching import VelocityMatching, VelocityMatchingConfig
from torch import Tensor

from bench.core import Core
from bench.models.analytic import GaussianFlowModel
from bench.options import Config
from bench.reward import Reward
from bench.sampling.grids import ddim_kernel, flow_kernel
from bench.sampling.kernel import Kernel
from bench.sampling.trajectory import Noised, Trajectory

BETA, DIRECTION, MEAN, STD = 2.0, torch.tensor([1.3, -0.4], dtype=torch.float64), (0.7, -0.2), 0.6


class Linear(Reward):
    """`r(x) = w·x`."""

    scale, source = "any", "test"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images @ DIRECTION


def kernel_of(output: str) -> Kernel:
    if output == "flow":
        return flow_kernel(6, dtype=torch.float64)
    return ddim_kernel(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64), 6, output=output)


@pytest.mark.parametrize("output", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("kind", ["nft", "awm", "ram"])
def test_the_gradient_is_that_of_the_published_loss(kind, output):
    """Whatever the network predicts: the losses are written as the papers have them, on x̂ and by autograd."""
    core = Core(GaussianFlowModel(dtype=torch.float64), kernel_of(output), Linear(Config()), 1.0)
    rng, n = torch.Generator().manual_seed(0), 6
    clean, noise, theta, old, prior, ema = torch.randn(6, n, 5, generator=rng, dtype=torch.float64)
    k, advantages = torch.arange(n), torch.tensor([0.9, -1, 0.2, -0.3, 0, 0.5], dtype=torch.float64)
    theta.requires_grad_()
    z, u = core.kernel.noised(clean, noise, k), core.kernel.target(clean, noise, k)
    torch.testing.assert_close(core.kernel.clean(z, u, k), clean)
    torch.testing.assert_close(core.kernel.noise(z, u, k), noise)
    part = Noised([""] * n, [("", 0)] * n, None, k, k, clean, noise, z, u, None, advantages)

    def square(x: Tensor) -> Tensor:
        return x.square().mean(1)

    if kind == "nft":
        config = {"residual": "old", "weight": "clean", "factor": 5.0, "anchors": {"old": 0.7, "prior": 0.02}}
        r, ends = (1 + advantages) / 2, []
        for sign in (1, -1):
            found = core.kernel.clean(z, old + sign * 0.7 * (theta - old), k)
            ends.append(square(found - clean) / (found - clean).abs().mean(1).clamp(min=1e-5).detach())
        loss = 5 * (r * ends[0] + (1 - r) * ends[1]) / 0.7 + 0.1 * square(theta - prior)
    elif kind == "awm":
        config = {"weight": "likelihood", "anchors": {"prior": 0.3, "ema": 1.0}, "ratio_clip": 0.1}
        level = core.kernel.noise_level(k, z).flatten()
        now, before = (-level / 0.25 * (square(o - u) + 1e-10) ** 0.25 for o in (theta, old))
        ratio = torch.exp(now - before)
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.9, 1.1))
        loss = loss + 0.3 * square(theta - prior) + square(theta - ema)
        assert ((ratio - 1).abs() > 0.1).sum() > 0
    else:
        config = {"anchors": {"prior": 1.0}}
        loss = square(theta - (prior + advantages[:, None] * (u - theta)).detach())
    (expected,) = torch.autograd.grad(loss.sum(), theta)
    method = VelocityMatching(VelocityMatchingConfig(**config))
    others = {"old": old, "prior": prior, "ema": ema}
    bracket, _ = method.gradient(core, part, theta.detach(), others)
    torch.testing.assert_close(2 / 5 * method.config.factor * bracket, expected)


def test_the_tilted_flow_is_the_fixed_point_of_tilt_matching():
    """From exact samples the expected gradient is zero at the anchor tilted by e^{βr}, and not at 0.7 of it.

    `ram` with the same β is not zero there: it tilts to first order alone.
    """
    model = GaussianFlowModel(2, MEAN, STD, dtype=torch.float64)
    core = Core(model, flow_kernel(6, dtype=torch.float64), Linear(Config()), BETA, micro_batch=100_000)
    tilted = GaussianFlowModel(2, (torch.tensor(MEAN) + STD**2 * BETA * DIRECTION).tolist(), STD, dtype=torch.float64)
    zero, text = torch.zeros(6, 2, dtype=torch.float64), model.encode([""] * 6)
    shift = (
        tilted.predict(zero, core.kernel.timesteps, text) - model.predict(zero, core.kernel.timesteps, text)
    ).detach()
    bias, slope = model.adapters().values()
    places = core.kernel.timesteps.round().long()
    core.copies.update({"old": {name: p.detach().clone() for name, p in model.adapters().items()}})
    rng, z_scores = torch.Generator().manual_seed(0), {}
    chunks = []
    for part in range(24):
        names = [(f"{part}", i) for i in range(512)]
        x = torch.tensor(MEAN, dtype=torch.float64) + STD * torch.randn(512, 2, generator=rng, dtype=torch.float64)
        chunks.append(Trajectory([p for p, _ in names], names, model.encode([""] * 512),
                                 latents=torch.stack([x, x], 1), rewards=x @ DIRECTION))  # fmt: skip
    common = {"advantage_clip": None, "scale": 1.0, "fraction": 1.0}
    kinds = {"tilt": {"advantage": "tilt", "anchors": {"old": 1.0}}, "ram": {"advantage": "reward"}}
    for name, share in (("tilt", 1.0), ("tilt", 0.7), ("ram", 1.0)):
        method = VelocityMatching(VelocityMatchingConfig(**kinds[name], **common))
        bias.data[places] = share * shift
        found = []
        for data in chunks:
            bias.grad = slope.grad = None
            for loss in method.losses(core, method.prepare(core, data)):
                (loss.values.sum() / len(data)).backward()
            found.append(torch.cat([bias.grad[places], slope.grad[places]]).flatten())
        stacked = torch.stack(found)
        z_scores[name, share] = float((stacked.mean(0) / (stacked.std(0) / len(found) ** 0.5)).abs().max())
    assert z_scores["tilt", 1.0] < 4, z_scores
    assert z_scores["tilt", 0.7] > 8, z_scores
    assert z_scores["ram", 1.0] > 8, z_scores
