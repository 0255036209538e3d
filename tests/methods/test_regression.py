"""Regressions on the forward process: their gradients against closed forms, their rounds, a fixed point."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bench.methods.regression.awm import AWM, AWMConfig
from bench.methods.regression.forward_process import Regression, RegressionConfig
from bench.methods.regression.iterative_tilting import IterativeTilting
from bench.methods.regression.nft import NFT, NFTConfig
from bench.methods.regression.ram import RAM
from bench.methods.regression.rvm import RVM, RVMConfig
from bench.methods.regression.tilt_matching import TiltMatching, TiltMatchingConfig
from scaffold import gradients
from torch import Tensor

from bench.core import Core
from bench.diagnose.selftest.scaffold import DIRECTION, Linear
from bench.models.analytic import GaussianFlowModel
from bench.options import Config
from bench.sampling.grids import ddim_kernel, flow_kernel
from bench.sampling.kernel import Kernel
from bench.sampling.noise import Noise
from bench.sampling.trajectory import Noised, Trajectory

BETA, MEAN, STD = 2.0, (0.7, -0.2), 0.6


def kernel_of(output: str) -> Kernel:
    if output == "flow":
        return flow_kernel(6, dtype=torch.float64)
    return ddim_kernel(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64), 6, output=output)


def core_of(kernel: Kernel) -> Core:
    return Core(GaussianFlowModel(2, MEAN, STD, dtype=torch.float64), kernel, Linear(Config()), BETA)


def square(x: Tensor) -> Tensor:
    return x.square().mean(1)


class Outputs:
    """Noised samples of five elements, and what four networks say there."""

    def __init__(self, output: str):
        self.core = core_of(kernel_of(output))
        rng, n = torch.Generator().manual_seed(0), 6
        clean, noise, self.theta, self.old, self.prior, self.ema = torch.randn(6, n, 5, generator=rng).double()
        self.theta.requires_grad_()
        k, self.advantage = torch.arange(n), torch.tensor([0.9, -1, 0.2, -0.3, 0, 0.5], dtype=torch.float64)
        z, self.u = self.core.kernel.noised(clean, noise, k), self.core.kernel.target(clean, noise, k)
        torch.testing.assert_close(self.core.kernel.clean(z, self.u, k), clean)
        torch.testing.assert_close(self.core.kernel.noise(z, self.u, k), noise)
        text = self.core.model.encode([""] * n)
        self.part = Noised([""] * n, [("", 0)] * n, text, k, k, clean, noise, z, self.u, None, self.advantage)

    def of(self, method: Regression) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The method's loss [n], half of its gradient per mean over elements, and what it logs."""
        values, metrics = method.loss(self.core, self.part, self.theta, vars(self))
        (gradient,) = torch.autograd.grad(values.sum(), self.theta, retain_graph=True)
        return values.detach(), gradient * 5 / 2, metrics


@pytest.fixture(params=["epsilon", "v_prediction", "flow"])
def at(request: pytest.FixtureRequest) -> Outputs:
    return Outputs(request.param)


def test_the_gradient_of_nft(at):
    """`c/w` of either end times the derivative of its x̂, whatever the network predicts."""
    c, beta, weight = 3.0, 0.7, 0.02
    slope = at.core.kernel.clean(torch.zeros_like(at.u), torch.ones_like(at.u), at.part.k)  # ∂x̂/∂o
    r, expected = (1 + at.advantage)[:, None] / 2, weight * (at.theta - at.prior)
    for sign, share in ((1, r), (-1, 1 - r)):
        error = at.old + sign * beta * (at.theta - at.old) - at.u
        w = (slope * error).abs().mean(1, keepdim=True)
        expected = expected + sign * c * share * slope**2 / w * error
    _, gradient, _ = at.of(NFT(NFTConfig(advantage_clip=c, mix=beta, kl=weight)))
    torch.testing.assert_close(gradient, expected.detach())


def test_the_gradient_of_awm(at):
    """`A ρ s (ℓ + 1e-10)^{p−1} (o − u)`, and nothing of it where the ratio is clipped on the side that A pulls to."""
    p, clip, power = 0.25, 0.1, -0.75
    level = at.core.kernel.noise_level(at.part.k, at.part.z).flatten()
    now, before = (-level / p * (square(o - at.u) + 1e-10) ** p for o in (at.theta, at.old))
    ratio = torch.exp(now - before)
    clipped = (ratio - 1) * at.advantage.sign() > clip
    assert clipped.any()
    assert ((ratio - 1).abs() > clip)[~clipped].any()
    factor = (at.advantage * ratio * level * (square(at.theta - at.u) + 1e-10) ** power).masked_fill(clipped, 0)
    expected = factor[:, None] * (at.theta - at.u) + 0.3 * (at.theta - at.prior) + 0.6 * (at.theta - at.ema)
    _, gradient, metrics = at.of(AWM(AWMConfig(power=p, ratio_clip=clip, kl=0.3, ema=0.6)))
    torch.testing.assert_close(gradient, expected.detach())
    torch.testing.assert_close(metrics["ratio"], ratio.detach())


def test_a_perfect_prediction_has_a_finite_gradient_under_awm(at):
    """The power's own derivative is infinite there."""
    at.theta = at.u.clone().requires_grad_()
    at.old = at.prior = at.ema = at.u
    values, gradient, _ = at.of(AWM(AWMConfig()))
    torch.testing.assert_close(values, -at.advantage)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", ["ram", "rvm", "tilt_matching"])
def test_the_gradients_of_ram_rvm_and_tilt_matching(at, name):
    """`A (o − u) + λ (o − the anchor)`, whose mean square is the loss."""
    weight = 0.3 if name == "rvm" else 1.0
    anchor = at.old if name == "tilt_matching" else at.prior
    method = {
        "ram": RAM(RegressionConfig()),
        "rvm": RVM(RVMConfig(kl=weight)),
        "tilt_matching": TiltMatching(TiltMatchingConfig()),
    }[name]
    expected = (at.advantage[:, None] * (at.theta - at.u) + weight * (at.theta - anchor)).detach()
    half = 0.5 if name == "rvm" else 1.0
    values, gradient, _ = at.of(method)
    torch.testing.assert_close(gradient, half * expected)
    torch.testing.assert_close(values, half * square(expected))


def round_of(core: Core) -> Trajectory:
    """Two prompts of three samples, one far above the others."""
    batch = core.batch((prompt, i) for prompt in "ab" for i in range(3))
    rewards = torch.tensor([1.0, 2, 30, -1, 0, 0.5], dtype=torch.float64)
    return replace(core.rollout(batch), rewards=rewards)


METHODS = {
    "nft": NFT(NFTConfig(fraction=0.5)),
    "awm": AWM(AWMConfig(fraction=0.5)),
    "ram": RAM(RegressionConfig(fraction=0.5)),
    "rvm": RVM(RVMConfig(fraction=0.5)),
    "tilt_matching": TiltMatching(TiltMatchingConfig(fraction=0.5)),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_update_is_the_mean_over_samples_and_noise_levels(method):
    """Each sample has one level in each half of the steps; every network predicts at its z, the copies by their own."""
    core = replace(core_of(flow_kernel(4, dtype=torch.float64)), micro_batch=5)
    bias, slope = core.model.adapters().values()
    for move, name in enumerate(("old", "ema"), 1):
        core.copies[name] = {key: p.detach() + move for key, p in core.model.adapters().items()}
    bias.data += 0.3
    data = method.prepare(core, round_of(core))
    steps, draw = method.steps(core, data), Noise(core.seed, "renoise", data.samples)
    assert steps.shape == (6, 2)
    assert {k for row in steps.tolist() for k in row} == set(range(4))
    expected, distances = torch.zeros((), dtype=torch.float64), []
    for column in range(2):
        k, x, noise = steps[:, column], data.latents[:, -1], draw(column, (2,)).double()
        z, u = core.kernel.noised(x, noise, k), core.kernel.target(x, noise, k)
        part = Noised(data.prompts, data.samples, data.conditioning, k, k, x, noise, z, u, None, data.advantages)
        policy = core.predict(z, k, data.conditioning)
        reference = {"prior": core.predict(z, k, data.conditioning, prior=True)}
        reference |= {name: core.predict(z, k, data.conditioning, weights=name) for name in ("old", "ema")}
        values, _ = method.loss(core, part, policy, reference)
        expected = expected + values.sum() / 2 / 6
        distances.append(square(policy.detach() - reference[method.references[0]]))
    theirs = torch.autograd.grad(expected, [bias, slope])
    ours, gradient = gradients(method.losses(core, data), 6, [bias, slope])
    assert ours == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in theirs]))
    logged = torch.cat([loss.metrics[f"distance/{method.references[0]}"] for loss in method.losses(core, data)])
    torch.testing.assert_close(logged, torch.cat(distances))


def test_the_advantages_of_a_round():
    core = core_of(flow_kernel(3, dtype=torch.float64))
    data = round_of(core)
    r = data.rewards.view(2, 3)
    normalised = (r - r.mean(1, keepdim=True)) / (r.std(correction=0) + 1e-4)
    others = (r.sum(1, keepdim=True) - r) / 2
    tilt = torch.exp(BETA / 4 * r)
    expected = {
        NFT(NFTConfig(advantage_clip=0.5)): normalised.clamp(-0.5, 0.5) / 0.5,
        AWM(AWMConfig(advantage_clip=0.5)): normalised.clamp(-0.5, 0.5) / 0.5,
        RVM(RVMConfig(advantage_clip=0.5)): 0.1 * normalised.clamp(-0.5, 0.5),
        RAM(RegressionConfig()): BETA * (r - others),
        TiltMatching(TiltMatchingConfig(stages=4)): tilt / ((tilt.sum(1, keepdim=True) - tilt) / 2) - 1,
    }
    for method, advantages in expected.items():
        torch.testing.assert_close(method.prepare(core, data).advantages, advantages.flatten(), msg=str(method))


def test_who_samples_and_what_the_copies_are():
    """The old policy samples for `nft` and `tilt_matching`; it follows by round, or by stage up to the last."""
    core = core_of(flow_kernel(3, dtype=torch.float64))
    core.copies.update({"old": {name: p.detach() + 1 for name, p in core.model.adapters().items()}})
    batch = core.batch([("a", 0)])
    nft, awm, tilt = NFT(NFTConfig()), AWM(AWMConfig()), TiltMatching(TiltMatchingConfig(stages=3, stage_rounds=5))
    ram, rvm = RAM(RegressionConfig()), RVM(RVMConfig())
    for method in (nft, awm, tilt, ram, rvm):
        sampled = method.collect(core, batch, 0).latents
        expected = core.rollout(batch, weights="old" if method in (nft, tilt) else None).latents
        assert torch.equal(sampled, expected)
        assert set(method.references) - {"prior"} == method.copies().keys()
        assert bool(method.combines()) == (method in (nft, awm, rvm))
    old = {method: method.copies()["old"] for method in (nft, awm, tilt)}
    assert [(copy.interval(60), copy.stages, copy.decay(200)) for copy in old.values()] == [
        (1, None, 0.2),
        (1, None, 0.0),
        (5, 3, 0.0),
    ]
    assert TiltMatching(TiltMatchingConfig(stages=3)).copies()["old"].interval(60) == 20
    assert awm.copies()["ema"].rounds is None


def test_the_tilted_flow_is_the_fixed_point_of_tilt_matching():
    """From exact samples the expected gradient is zero at the prior tilted by e^{βr}, and not at 0.7 of it.

    `ram` with the same β is not zero there: it tilts to first order alone.
    """
    core = core_of(flow_kernel(6, dtype=torch.float64))
    core = replace(core, micro_batch=100_000)
    model = core.model
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
    tilt, ram = TiltMatching(TiltMatchingConfig(stages=1, fraction=1)), RAM(RegressionConfig(fraction=1))
    for method, share in ((tilt, 1.0), (tilt, 0.7), (ram, 1.0)):
        bias.data[places] = share * shift
        gradients = []
        for data in chunks:
            bias.grad = slope.grad = None
            for loss in method.losses(core, method.prepare(core, data)):
                (loss.values.sum() / len(data)).backward()
            gradients.append(torch.cat([bias.grad[places], slope.grad[places]]).flatten())
        stacked = torch.stack(gradients)
        error = stacked.std(0) / len(chunks) ** 0.5
        z_scores[method, share] = float((stacked.mean(0) / error).abs().max())
    assert z_scores[tilt, 1.0] < 4, z_scores
    assert z_scores[tilt, 0.7] > 8, z_scores
    assert z_scores[ram, 1.0] > 8, z_scores


def test_iterative_tilting_is_tilt_matching_to_first_order():
    """Its R is that of tilt matching without the terms of second order in β / stages."""
    core = core_of(flow_kernel(3, dtype=torch.float64))
    data = round_of(core)
    small = replace(core, beta=1e-5)
    exact, linear = TiltMatching(TiltMatchingConfig(stages=4)), IterativeTilting(TiltMatchingConfig(stages=4))
    r = data.rewards.view(2, 3)
    expected = BETA / 4 * (r - (r.sum(1, keepdim=True) - r) / 2)
    torch.testing.assert_close(linear.prepare(core, data).advantages, expected.flatten())
    torch.testing.assert_close(linear.prepare(small, data).advantages, exact.prepare(small, data).advantages,
                               rtol=1e-3, atol=1e-9)  # fmt: skip
    assert not torch.allclose(linear.prepare(core, data).advantages, exact.prepare(core, data).advantages, rtol=0.1)


def test_the_error_of_iterative_tilting_halves_with_twice_the_stages():
    """Each stage reweighs its samples by 1 + R. A Gaussian under `−‖x‖²/2` has the variance `1 / (1/v + β)`; tilt
    matching has it whatever the stages, up to the error of a finite population."""
    count, variance, beta = 1_000, 0.36, 2.0
    core = replace(core_of(flow_kernel(3, dtype=torch.float64)), beta=beta)
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    population = torch.special.ndtri(places) * variance**0.5

    def final_variance(cls: type[TiltMatching], stages: int) -> float:
        method, x = cls(TiltMatchingConfig(stages=stages)), population
        for _ in range(stages):
            data = Trajectory([""] * count, [("", i) for i in range(count)], core.model.encode([""] * count),
                              latents=x.view(-1, 1, 1).expand(-1, 2, 2), rewards=-(x**2) / 2)  # fmt: skip
            weights = 1 + method.prepare(core, data).advantages
            shares = (weights.cumsum(0) - weights / 2) / weights.sum()
            x = torch.from_numpy(np.interp(places, shares, x))  # the quantiles of the reweighted samples
        return float((x**2).mean())

    target = 1 / (1 / variance + beta)
    errors = {stages: final_variance(IterativeTilting, stages) - target for stages in (8, 16)}
    assert 1.9 < errors[8] / errors[16] < 2.3, errors
    assert abs(final_variance(TiltMatching, 4) - target) < abs(errors[16]) / 20
