"""Feynman–Kac steering: an unbiased normaliser whatever the potential, and the target with many particles."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from bench.methods.best_of_n import SoftBestOfN
from bench.methods.fk_steering import FKSteering, _Weights

from bench.config import resolve
from bench.core import Core
from bench.diagnose.selftest.scaffold import BETA, DIRECTION, Linear, gaussian_core, moments
from bench.errors import BenchError
from bench.options import Config
from bench.reporting.budgets import draws
from bench.runs.preflight import check

POTENTIALS = ("difference", "max", "sum", "current")


def method(**options: object) -> FKSteering:
    return FKSteering(FKSteering.Config(**options))


def log_normaliser(core: Core) -> float:
    """`log E_# exp(βr)` of the sampler's own Gaussian samples, float64."""
    mean, variance, _ = moments(core, prior=True)
    return float(BETA * DIRECTION @ mean + BETA**2 * (DIRECTION**2 @ variance) / 2)


@pytest.mark.parametrize("path", ["diffusion", "flow"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_the_normaliser_is_unbiased(path, adaptive, potential):
    core = gaussian_core(5, eta=1.0, path=path)
    steered = method(n=3, potential=potential, adaptive=adaptive)
    assert steered.redraws(5) == [1, 2, 3, 4]
    with torch.no_grad():
        found = steered.particles(core, core.batch(("", i) for i in range(800)))
    assert found.latents.shape == (800, 3, 6, 2)
    assert found.log_normaliser.dtype == torch.float64
    ratios = (found.log_normaliser - log_normaliser(core)).exp()
    error = float(ratios.std()) / len(ratios) ** 0.5
    assert float(ratios.mean()) == pytest.approx(1, abs=4 * error)
    assert error < 0.08  # a wrong weight is seen


@pytest.mark.parametrize("potential", POTENTIALS)
def test_the_potentials_of_a_lineage_multiply_to_the_tilt(potential):
    generator = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(40, generator=generator, dtype=torch.float64)

    weights = _Weights(FKSteering.Config(n=4, potential=potential), 10, normal())
    for _ in range(3):
        weights.look(normal())
        weights.redraw(torch.rand(10, 4, generator=generator, dtype=torch.float64))
        assert not weights.log_weights.any()
    scores = normal()
    weights.finish(scores)
    torch.testing.assert_close(weights.applied, scores.view(10, 4))


def test_many_particles_sample_the_target():
    """Gaussian target: mean_# + βw Var, here with the tilt of z_0, and the prior's variance."""
    core = gaussian_core(6, eta=1.0)
    mean, variance, _ = moments(core, prior=True)
    batch = core.batch(("", i) for i in range(500))
    with torch.no_grad():
        kept = method(n=32).sample(core, batch, purpose="evaluate", seed=1).latents[:, -1]
    error = (variance / len(kept)) ** 0.5
    assert ((kept.mean(0) - mean - BETA * DIRECTION * variance).abs() < 4 * error + 0.04).all()
    assert (kept.var(0) / variance - 1).abs().max() < 0.3


def test_without_redraws_it_is_the_soft_best_of_n_and_alone_the_prior():
    core = gaussian_core(4, eta=1.0)
    batch = core.batch((f"prompt {i % 3}", i) for i in range(20))
    options = {"purpose": "evaluate", "seed": 3, "record": frozenset({"model_output", "prior_output"})}
    with torch.no_grad():
        plain = method(n=5, resample_at=[]).sample(core, batch, **options)
        soft = SoftBestOfN(SoftBestOfN.Config(n=5)).sample(core, batch, **options)
        alone = method(n=1).sample(core, batch, **options)
        own = core.rollout(batch, purpose="evaluate", seed=3)
        cut = replace(core, micro_batch=3, sample_batch=2)
        parts, whole = (method(n=3).sample(one, batch, **options) for one in (cut, core))
    assert torch.equal(plain.latents, soft.latents)
    assert torch.equal(alone.latents, own.latents)
    torch.testing.assert_close(parts.latents, whole.latents)
    assert whole.model_output is None


def test_a_constant_reward_draws_the_prior():
    class Constant(Linear):
        def __call__(self, images, prompts):
            return 0 * images[:, 0] + 7

    core = replace(gaussian_core(5, eta=1.0), reward_model=Constant(Config()))
    with torch.no_grad():
        found = method(n=4).particles(core, core.batch(("", i) for i in range(500)))
    torch.testing.assert_close(found.log_weights, found.log_weights[:, :1].expand(-1, 4))
    torch.testing.assert_close(found.log_normaliser, torch.full((500,), 7 * BETA, dtype=torch.float64))
    ancestors = [len(own[:, 0].unique(dim=0)) for own in found.latents]
    assert np.mean(ancestors) == pytest.approx(1.6, abs=0.5)  # redrawn uniformly four times


def test_its_cost_is_what_a_report_charges():
    core, steered = gaussian_core(10, eta=1.0), method(n=3, resample_at=[0.02, 0.25, 0.5, 0.52, 1.0])
    core.meter.watch(core.model.network)
    before = core.meter.total()
    with torch.no_grad():
        steered.sample(core, core.batch(("", i) for i in range(7)), purpose="evaluate", seed=0)
    after = core.meter.total()
    settings = {"method.n": 3, "method.resample_at": steered.config.resample_at, "sampler.steps": 10}
    row = {"method": "fk_steering", "row": "fk_steering", "beta": 1.0}
    rows = pd.DataFrame([row | {"settings": json.dumps(settings | {"sampler.guidance": 1.0})}])
    cost = draws(rows)["fk_steering"]
    assert after["reward_calls"] - before["reward_calls"] == 7 * cost.calls
    assert after["network_forwards"] - before["network_forwards"] == 7 * cost.nfe
    assert np.isnan(cost.kl)


def test_only_the_evaluation_needs_noise():
    """It trains nothing, so that what it steers, and how many steps it has, are the evaluation's."""

    def of(*assignments: str) -> None:
        check(resolve("fk_steering", suite="gaussian", assignments=assignments))

    of("sampler.eta=0", "evaluation.sampler.eta=1")
    with pytest.raises(BenchError, match=r"use evaluation.sampler.eta > 0, not 0"):
        of("evaluation.sampler.eta=0")
    with pytest.raises(BenchError, match="use soft_best_of_n"):
        of("method.resample_at=[0.1]", "evaluation.sampler.steps=2")


def test_what_it_cannot_do_is_said():
    assert "use soft_best_of_n" in method(resample_at=[0.01]).unfit(20, 1)
    assert method().unfit(20, 1) is None
    core = gaussian_core(4, eta=0.0)
    with pytest.raises(BenchError, match="fk_steering needs transition densities"):
        method().sample(core, core.batch([("", 0)]))
