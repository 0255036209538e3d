"""Backpropagation through the sampler against central differences, on the linear-Gaussian problem in float64."""

from collections.abc import Callable

import pytest
import torch
from bench.methods.backprop.alignprop import AlignProp, AlignPropConfig
from bench.methods.backprop.draft import DRaFT, DRaFT1, DRaFTConfig, DRaFTFull, DRaFTLV, DRaFTLVConfig
from bench.methods.backprop.leap_align import LeapAlign
from bench.methods.backprop.refl import ReFL, ReFLConfig
from linear_gaussian import places
from scaffold import gradients
from torch import Tensor

from bench import Config, Method
from bench.core import Core
from bench.diagnose.selftest.scaffold import Wavy, gaussian_core
from bench.sampling.noise import Noise
from bench.sampling.trajectory import Batch

ROWS = 6


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
    "draft_1": DRaFT1(Config()),
    "draft_full": DRaFTFull(Config()),
    "alignprop": AlignProp(AlignPropConfig(start=(0.6, 0.2))),
}


@pytest.mark.parametrize("name", THROUGH_THE_SAMPLER)
def test_the_gradient_goes_through_the_sampler_from_the_first_step_on(name):
    """The state at each sample's first step is held fixed; its chain from there is written out."""
    core, method = moved_core(5), THROUGH_THE_SAMPLER[name]
    batch = samples(core)
    states, first = core.rollout(batch).latents, method.steps(core, batch)
    assert (len(first.unique()) > 1) == (name == "alignprop")

    def loss() -> Tensor:
        rewards = []
        for i, start in enumerate(first.tolist()):
            row, z = batch[i : i + 1], states[i : i + 1, start]
            noise = Noise(core.seed, "train", row.samples)
            for k in range(start, core.kernel.steps):
                mean = core.kernel.mean(z, core.predict(z, k, row.conditioning), k)
                z = mean + core.kernel.std(k, z) * noise(k + 1, (2,)).double()
            rewards.append(core.reward_model(z, row.prompts))
        return -torch.cat(rewards).mean()

    assert_gradient_of(loss, core, method, batch)
    for table in core.model.adapters().values():
        learns = table.grad[places(core)].any(1)
        assert learns.tolist() == [k >= int(first.min()) for k in range(core.kernel.steps)]


@pytest.mark.parametrize(
    ("method", "first"),
    [
        (DRaFT(DRaFTConfig(depth=3)), 1),
        (DRaFT(DRaFTConfig(depth=5)), 0),  # more than there are
        (DRaFT1(Config()), 3),
        (DRaFTFull(Config()), 0),
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
    k, j = LeapAlign(Config()).steps(core, samples(core, 300)).unbind(1)
    assert (k < j).all()
    assert len(set(zip(k.tolist(), j.tolist(), strict=True))) == 10


def test_refl_draws_every_late_step():
    core = gaussian_core(8)
    m = ReFL(ReFLConfig(window=0.5)).steps(core, samples(core, 100))
    assert m.unique().tolist() == [4, 5, 6, 7]


def test_draft_lv_averages_over_renoised_copies():
    core, method = moved_core(5), DRaFTLV(DRaFTLVConfig(renoise=2))
    batch, last = samples(core), 4
    clean = core.rollout(batch).latents[:, -1]

    def loss() -> Tensor:
        rewards = []
        for copy in range(2):
            mean, std = core.kernel.noising(clean, last)
            z = mean + std * Noise(core.seed, "renoise", batch.samples)(copy, (2,)).double()
            z = core.kernel.mean(z, core.predict(z, last, batch.conditioning), last)
            rewards.append(core.reward_model(z, batch.prompts))
        assert not torch.allclose(*rewards)
        return -torch.cat(rewards).mean()

    assert_gradient_of(loss, core, method, batch)


@pytest.mark.parametrize("path", ["diffusion", "flow"])
def test_leaps_have_their_own_derivative_and_the_samples_values(path):
    """The gradient is that of `∇r(z_K) · x̂_θ(z_j + leap_θ(z_k) − leap)`, all samples held fixed."""
    core, method = moved_core(5, path), LeapAlign(Config())
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

    def clean() -> Tensor:
        z = z_j + leap() - leap_before
        return kernel.clean(z, core.predict(z, j, batch.conditioning), j)

    with torch.no_grad():
        leap_before = leap()
        clean_before = clean()

    def loss() -> Tensor:
        return -(reward + (reward_gradient * (clean() - clean_before)).sum(1)).mean()

    assert_gradient_of(loss, core, method, batch, rel=1e-5)


@pytest.mark.parametrize("margin", [None, 0.5])
def test_refl_learns_at_one_late_step(margin):
    core, method = moved_core(8), ReFL(ReFLConfig(window=0.5, margin=margin, scale=0.1))
    batch = samples(core)
    m = method.steps(core, batch)
    assert m.min() >= 4
    assert len(m.unique()) > 1
    states = core.rollout(batch).latents[torch.arange(ROWS), m]

    def loss() -> Tensor:
        clean = core.kernel.clean(states, core.predict(states, m, batch.conditioning), m)
        reward = core.reward_model(clean, batch.prompts)
        return 0.1 * (-reward if margin is None else (margin - reward).clamp(min=0)).mean()

    assert_gradient_of(loss, core, method, batch)


@pytest.mark.parametrize(("method", "steps"), [(LeapAlign(Config()), 1), (AlignProp(AlignPropConfig()), 1)])
def test_random_steps_need_enough_of_them(method, steps):
    assert method.unfit(steps, 1)
    assert method.unfit(steps + 1, 1) is None


def test_alignprop_refuses_a_start_that_is_never_drawn():
    assert AlignProp(AlignPropConfig(start=(0.0, 0.0))).unfit(50, 1)
    assert AlignProp(AlignPropConfig(start=(1.0, 0.0))).unfit(50, 1)
    with pytest.raises(ValueError, match="both shares"):
        AlignPropConfig(start=(42, 5))
