"""Backpropagation through the sampler against central differences, on the linear-Gaussian problem in float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bench.methods.backprop.alignprop import AlignProp, AlignPropConfig
from bench.methods.backprop.base import BackpropagationConfig
from bench.methods.backprop.draft import (
    DRaFT,
    DRaFT1,
    DRaFTConfig,
    DRaFTFull,
    DRaFTKL,
    DRaFTKLConfig,
    DRaFTLV,
    DRaFTLVConfig,
)
from bench.methods.backprop.leap_align import LeapAlign
from bench.methods.backprop.refl import ReFL, ReFLConfig
from linear_gaussian import PATHS, places, shift_policy, truth_of
from scaffold import gradients, trainer_of
from torch import Tensor

from bench import Method
from bench.config import resolve
from bench.core import Core
from bench.diagnose.selftest.scaffold import BETA, DIRECTION, Wavy, gaussian_core, method_of, moments, perturb, update
from bench.errors import BenchError
from bench.runs.preflight import preflight
from bench.sampling.noise import Noise
from bench.sampling.trajectory import Batch

ROWS = 6
PLAIN = BackpropagationConfig()
KL = {"kl": 0.7}


def moved_core(steps: int, path: str = "diffusion") -> Core:
    """A policy away from the prior at every step of the sampler."""
    core = gaussian_core(steps, Wavy, path=path)
    for table, value in zip(core.model.adapters().values(), (0.2, -0.1), strict=True):
        table.data[places(core)] = value
    return core


def samples(core: Core, rows: int = ROWS) -> Batch:
    return core.batch((f"prompt {i}", 0) for i in range(rows))


def assert_gradient_of(loss: Callable[[], Tensor], core: Core, method: Method, batch: Batch, rel: float = 1e-6) -> None:
    """The method's loss and gradient are those of `loss`, by central differences in every weight of every step."""
    tables, h = list(core.model.adapters().values()), 1e-5
    total, _ = gradients(method.losses(core, batch), len(batch), tables)
    with torch.no_grad():
        assert total == pytest.approx(loss().item(), rel=1e-7)  # the sampler's first noise is float32
        for table in tables:
            for k, place in enumerate(places(core).tolist()):
                for i in range(table.shape[1]):
                    before = table.data[place, i].item()
                    table.data[place, i] = before + h
                    above = loss().item()
                    table.data[place, i] = before - h
                    difference = (above - loss().item()) / (2 * h)
                    table.data[place, i] = before
                    assert table.grad[place, i].item() == pytest.approx(difference, rel=rel, abs=1e-8), (k, i)


THROUGH_THE_SAMPLER = {
    "draft": DRaFT(DRaFTConfig(depth=2)),
    "draft_1": DRaFT1(PLAIN),
    "draft_full": DRaFTFull(PLAIN),
    "alignprop": AlignProp(AlignPropConfig(start=(0.6, 0.2))),
    "draft with the KL": DRaFT(DRaFTConfig(depth=2, **KL)),
    "draft_1 with the KL": DRaFT1(BackpropagationConfig(**KL)),
    "draft_kl": DRaFTKL(DRaFTKLConfig(**KL)),
    "alignprop with the KL": AlignProp(AlignPropConfig(start=(0.6, 0.2), **KL)),
}


def kl_of(core: Core, z: Tensor, k: int | Tensor, row: Batch) -> Tensor:
    """`|μ_θ − μ_#|² / 2σ_k²` [n], written out; z has no weight's gradient here, but the central differences move it."""
    outputs = [core.predict(z, k, row.conditioning, prior=prior) for prior in (False, True)]
    mean, prior_mean = (core.kernel.mean(z, output, k) for output in outputs)
    return ((mean - prior_mean) ** 2).sum(1) / (2 * core.kernel.std(k, z).flatten() ** 2)


@pytest.mark.parametrize("name", THROUGH_THE_SAMPLER)
def test_the_gradient_goes_through_the_sampler_from_the_first_step_on(name):
    """The state at each sample's first step is held fixed; its chain from there is written out."""
    core, method = moved_core(5), THROUGH_THE_SAMPLER[name]
    batch = samples(core)
    states, first = core.rollout(batch).latents, method.steps(core, batch)
    assert (len(first.unique()) > 1) == name.startswith("alignprop")
    w = method.config.kl

    def loss() -> Tensor:
        losses = []
        for i, start in enumerate(first.tolist()):
            row, z, kl = batch[i : i + 1], states[i : i + 1, start], torch.zeros(1)
            noise = Noise(core.seed, "train", row.samples)
            for k in range(start, core.kernel.steps):
                kl = kl + kl_of(core, z, k, row)
                mean = core.kernel.mean(z, core.predict(z, k, row.conditioning), k)
                z = mean + core.kernel.std(k, z) * noise(k + 1, (2,)).double()
            reward = core.reward_model(z, row.prompts)
            losses.append(-BETA * reward + w * kl if w else -reward)
        return torch.cat(losses).mean()

    assert_gradient_of(loss, core, method, batch)
    for table in core.model.adapters().values():
        learns = table.grad[places(core)].any(1)
        assert learns.tolist() == [k >= int(first.min()) for k in range(core.kernel.steps)]


@pytest.mark.parametrize(
    ("method", "first"),
    [
        (DRaFT(DRaFTConfig(depth=3)), 1),
        (DRaFT(DRaFTConfig(depth=5)), 0),  # more than there are
        (DRaFT1(PLAIN), 3),
        (DRaFTFull(PLAIN), 0),
    ],
)
def test_the_first_step_with_a_gradient(method, first):
    core = gaussian_core(4)
    assert method.steps(core, samples(core, 2)).tolist() == [first, first]


def test_alignprop_draws_the_published_steps():
    core = gaussian_core(50)
    first = AlignProp(AlignPropConfig()).steps(core, samples(core, 2000)).double()
    assert first.min() >= 1
    assert first.max() == 49
    assert first.mean() == pytest.approx(41.2, abs=0.4)  # int(N(42, 5)), drawn again beyond 49


def test_leap_align_draws_every_pair_of_steps():
    core = gaussian_core(5)
    k, j = LeapAlign(PLAIN).steps(core, samples(core, 300)).unbind(1)
    assert (k < j).all()
    assert len(set(zip(k.tolist(), j.tolist(), strict=True))) == 10


def test_refl_draws_every_late_step():
    core = gaussian_core(8)
    m = ReFL(ReFLConfig(window=0.5)).steps(core, samples(core, 100))
    assert m.unique().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("w", [0.0, 0.7])
def test_draft_lv_averages_over_renoised_copies(w):
    core, method = moved_core(5), DRaFTLV(DRaFTLVConfig(renoise=2, kl=w))
    batch, last = samples(core), 4
    clean = core.rollout(batch).latents[:, -1]

    def loss() -> Tensor:
        losses = []
        for copy in range(2):
            mean, std = core.kernel.noising(clean, last)
            z = mean + std * Noise(core.seed, "renoise", batch.samples)(copy, (2,)).double()
            denoised = core.kernel.mean(z, core.predict(z, last, batch.conditioning), last)
            reward = core.reward_model(denoised, batch.prompts)
            losses.append(-BETA * reward + w * kl_of(core, z, last, batch) if w else -reward)
        assert not torch.allclose(*losses)
        return torch.cat(losses).mean()

    assert_gradient_of(loss, core, method, batch)


@pytest.mark.parametrize("w", [0.0, 0.7])
@pytest.mark.parametrize("path", ["diffusion", "flow"])
def test_leaps_have_their_own_derivative_and_the_samples_values(path, w):
    """The gradient is that of `∇r(z_K) · x̂_θ(z_j + leap_θ(z_k) − leap)`, all samples held fixed."""
    core, method = moved_core(5, path), LeapAlign(BackpropagationConfig(kl=w))
    batch, kernel = samples(core), core.kernel
    pairs = method.steps(core, batch)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert len(pairs.unique(dim=0)) > 2
    states, (k, j) = core.rollout(batch).latents, pairs.unbind(1)
    z_k, z_j = (states[torch.arange(ROWS), step] for step in (k, j))
    reward, reward_gradient = core.reward_gradient(states[:, -1], batch.prompts)

    def leap() -> Tensor:
        output = core.predict(z_k, k, batch.conditioning)
        return kernel.noised(kernel.clean(z_k, output, k), kernel.noise(z_k, output, k), j)

    def landing() -> Tensor:
        return z_j + leap() - leap_before

    def clean() -> Tensor:
        z = landing()
        return kernel.clean(z, core.predict(z, j, batch.conditioning), j)

    with torch.no_grad():
        leap_before = leap()
        clean_before = clean()

    def loss() -> Tensor:
        moved = reward + (reward_gradient * (clean() - clean_before)).sum(1)
        kl = kl_of(core, z_k, k, batch) + kl_of(core, landing(), j, batch)
        return (-BETA * moved + w * kl if w else -moved).mean()

    assert_gradient_of(loss, core, method, batch, rel=1e-5)


@pytest.mark.parametrize(("margin", "w"), [(None, 0.0), (0.5, 0.0), (None, 0.7)])
def test_refl_learns_at_one_late_step(margin, w):
    core, method = moved_core(8), ReFL(ReFLConfig(window=0.5, margin=margin, scale=0.1, kl=w))
    batch = samples(core)
    m = method.steps(core, batch)
    assert m.min() >= 4
    assert len(m.unique()) > 1
    states = core.rollout(batch).latents[torch.arange(ROWS), m]

    def loss() -> Tensor:
        clean = core.kernel.clean(states, core.predict(states, m, batch.conditioning), m)
        reward = core.reward_model(clean, batch.prompts)
        plain = -reward if margin is None else (margin - reward).clamp(min=0)
        return 0.1 * (BETA * plain + w * kl_of(core, states, m, batch) if w else plain).mean()

    assert_gradient_of(loss, core, method, batch)


@pytest.mark.parametrize(("method", "steps"), [(LeapAlign(PLAIN), 1), (AlignProp(AlignPropConfig()), 1)])
def test_random_steps_need_enough_of_them(method, steps):
    assert method.unfit(steps, 1)
    assert method.unfit(steps + 1, 1) is None


def test_alignprop_refuses_a_start_that_is_never_drawn():
    assert AlignProp(AlignPropConfig(start=(0.0, 0.0))).unfit(50, 1)
    assert AlignProp(AlignPropConfig(start=(1.0, 0.0))).unfit(50, 1)
    with pytest.raises(ValueError, match="both shares"):
        AlignPropConfig(start=(42, 5))


STEPS = 6


@PATHS
@pytest.mark.parametrize("depth", [STEPS, 3])
def test_the_optimum_of_the_path_kl_has_no_gradient_at_any_sample(path, depth):
    """`μ_# + σ_k² b_{k+1}` at the steps that train: the tilted prior where all do, and a mean in closed form."""
    core, method = gaussian_core(STEPS, path=path), DRaFT(DRaFTConfig(depth=depth, kl=1.0))
    truth, tables = truth_of(core), list(core.model.adapters().values())
    drift = torch.where(torch.arange(STEPS).unsqueeze(1) >= STEPS - depth, truth.flow[1:], 0.0)
    shift_policy(core, drift)
    for row in samples(core).split(1):
        assert gradients(method.losses(core, row), 1, tables)[1].abs().max() < 1e-10
    later = torch.cat([truth.jacobian.flip(0).cumprod(0).flip(0)[1:], torch.ones(1)])  # Π_{j>k} J_j
    spread = (truth.variance * later**2)[STEPS - depth :].sum()
    assert torch.allclose(moments(core)[0] - moments(core, prior=True)[0], BETA * DIRECTION * spread, atol=1e-8)
    shift_policy(core, 1.1 * drift)
    assert gradients(method.losses(core, samples(core)), ROWS, tables)[1].abs().max() > 1e-3


def test_the_weight_is_the_temperature_of_the_target():
    """Weight w at β has the optimum of weight 1 at β/w."""
    core = gaussian_core(STEPS)
    shift_policy(core, truth_of(core).flow[1:] / 4)
    method = DRaFTKL(DRaFTKLConfig(kl=4.0))
    assert gradients(method.losses(core, samples(core)), ROWS, core.model.adapters().values())[1].abs().max() < 1e-10
    assert [DRaFTKL(DRaFTKLConfig(kl=w)).tilted() for w in (1.0, 4.0, 0.0)] == [True, False, False]
    assert not DRaFTKL(DRaFTKLConfig(penalty="published")).tilted()


def test_the_published_penalty_lacks_the_priors_jacobian():
    """Its optimum goes back along `A_k`, the coefficient of z in μ apart from the network, in the place of J_k."""
    core, w = gaussian_core(STEPS), 0.3
    method, truth = DRaFTFull(BackpropagationConfig(kl=w, penalty="published")), truth_of(core)
    one = torch.ones(1, 2, dtype=torch.float64)
    backward = [BETA * DIRECTION]
    for k in reversed(range(1, STEPS)):
        backward.insert(0, core.kernel.mean(one, 0 * one, k)[0] * backward[0])
    level = torch.stack([core.kernel.noise_level(k, one) for k in range(STEPS)])
    change = 2 * STEPS / w * (level**2 * truth.gain).unsqueeze(1) * torch.stack(backward)  # d = 2
    core.model.adapters()["bias"].data[places(core)] = change
    for row in samples(core).split(1):
        assert gradients(method.losses(core, row), 1, core.model.adapters().values())[1].abs().max() < 1e-9
    assert not method.needs.density


def test_without_its_weight_the_kl_is_not_there():
    """To the bit, whatever β and the penalty."""
    core = moved_core(5)
    batch = samples(core)
    plain = update(core, DRaFTFull(PLAIN), batch)
    for penalty in ("path", "published"):
        other = update(core, DRaFTKL(DRaFTKLConfig(kl=0.0, penalty=penalty)), batch)
        assert other[0] == plain[0]
        assert all(torch.equal(other[1][key], value) for key, value in plain[1].items())


WITH_KL = ["refl", "draft", "draft_1", "draft_kl", "draft_lv", "alignprop", "leap_align"]


@pytest.mark.parametrize("name", WITH_KL)
def test_the_kl_on_a_pipeline(name, core, tmp_path):
    """Whatever the micro-batch; at the prior it is nothing, away from it a gradient towards it."""
    method = method_of(name, kl=3.0)
    data = trainer_of(core, method, tmp_path).sample_round(0)
    plain, _ = update(core, method_of(name, kl=0.0), data)
    assert update(core, method, data)[0] == pytest.approx(core.beta * plain, rel=1e-4)
    perturb(core.model)
    whole, parts = (update(replace(core, micro_batch=size), method, data)[0] for size in (64, 2))
    assert whole == pytest.approx(parts, rel=1e-3)
    assert whole > core.beta * update(core, method_of(name, kl=0.0), data)[0]


@pytest.mark.parametrize("name", WITH_KL)
def test_the_path_kl_needs_noise_in_every_step(name):
    assignments = ["method.kl=1", "sampler.eta=0", "evaluation.metrics=[reward]"]
    with pytest.raises(BenchError, match=r"needs transition densities: use sampler.eta > 0"):
        preflight(resolve(name, suite="ring", assignments=assignments))
    preflight(resolve(name, suite="ring", assignments=[*assignments, "method.penalty=published"]))
