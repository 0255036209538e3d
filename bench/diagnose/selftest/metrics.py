"""The contract of a metric, on random samples of images and of points."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench import registry
from bench.diagnose.selftest.checking import global_random_state, require
from bench.evaluation.target import Tilted
from bench.metric import Evaluation, Measurement, Samples
from bench.models.mixture import Mixture
from bench.reporting.statistics import SCALES
from bench.sampling.noise import generator


def _evaluation(points: bool, *, equal: bool = False, density: bool = True, prompts: int = 4) -> Evaluation:
    """Random samples of all sets: `prompts` prompts of 40, the last half held out."""
    names = [f"prompt {i}" for i in range(prompts) for _ in range(40)]
    splits = ["train" if i < (prompts + 1) // 2 else "test" for i in range(prompts) for _ in range(40)]

    def samples(number: int) -> Samples:
        rng = generator(number, "evaluate", "selftest")
        x = torch.from_numpy(rng.standard_normal((len(names), *((2,) if points else (3, 6, 6))), np.float32))
        images = x if points else (255 * torch.sigmoid(x)).to(torch.uint8)
        rewards = {name: x.flatten(1).mean(1) * scale for name, scale in (("trained", 1.0), ("other", 2.0))}
        kl = torch.from_numpy(rng.standard_normal((len(names), 5), np.float32)).square() * (number != 1)
        records = {"step_kl": kl, "log_ratio": -kl.sum(1)} if density else {}
        records["output_norm"] = 1 + kl
        latents = None if points else mixture.draw(numbers, rng)[0]
        return Samples(images, names, splits, rewards, **records, latents=latents)

    mixture, numbers = _mixture(prompts), torch.arange(prompts).repeat_interleave(40)
    sets: dict[str, Any] = {key: samples(i) for i, key in enumerate(("finetuned", "prior", "reference", "floor"))}
    if equal:
        sets["finetuned"] = samples(1)
    if not points:
        sets["targets"] = {f"prompt {i}": Tilted.flat(mixture, i) for i in range(prompts)}
    modes = torch.tensor([[2.0, 0], [-2, 0], [0, 2]]) if points else None
    return Evaluation(
        **sets, reward="trained", beta=0.5, feature_space="flat", modes=modes,
        prior_on=lambda sampler, purpose: sets[purpose],
        features=lambda samples, space=None: samples.images.flatten(1)[:, :8].float() / 64,
    )  # fmt: skip


def _mixture(prompts: int) -> Mixture:
    """A prior with a known density: two components in four dimensions."""
    rng = generator(0, "select", "selftest mixture")
    means = torch.from_numpy(3 * rng.standard_normal((prompts, 2, 4)))
    shape = prompts, 2, 4, 1
    bases, scales = torch.eye(4)[:, :1].expand(shape), torch.ones(prompts, 2, 1)
    tensors = {"log_weights": torch.zeros(prompts, 2), "means": means, "bases": bases, "scales": scales}
    return Mixture(tensors | {"floor": torch.tensor(0.3)}, ("first", "second"))


def _measure(name: str, **options: Any) -> list[Measurement]:
    metric = registry.load("metrics", name)
    evaluations = [_evaluation(points, **options) for points in (False, True)]
    return [measurement for one in evaluations for measurement in metric(metric.Config())(one)]


def measurements_are_well_formed(name: str) -> None:
    """named after the metric, with n, a known direction, and a finite value or a note"""
    require((registry.load("metrics", name).__doc__ or "").strip(), "the class has no docstring: say what it measures.")
    support = registry.load("metrics", name).support
    require(support in SCALES, f"support is {support!r}, none of {', '.join(SCALES)}.")
    low, high = SCALES[support].ends
    measurements = _measure(name)
    require(measurements, "the metric measured nothing, neither on images nor on points.")
    for one in measurements:
        named = one.name == name or one.name.startswith(f"{name}/")
        require(named, f"the measurement {one.name!r} is not named {name!r} or {name}/….")
        require(one.direction in ("higher", "lower", "none"), f"{one.name}: unknown direction {one.direction!r}.")
        good = one.note if one.value is None else math.isfinite(one.value)
        require(good, f"{one.name}: the value is {one.value}; give a finite one, or None with a note that says why.")
        inside = one.value is None or low <= one.value <= high
        require(inside, f"{one.name}: the value {one.value} is not {support}, as the class declares.")
        require(one.n > 0 or one.value is None, f"{one.name}: n is {one.n}.")
        require(one.standard_error is None or one.standard_error >= 0, f"{one.name}: the standard error is negative.")


def measuring_twice_gives_the_same(name: str) -> None:
    """and changes neither the samples nor global random state"""
    before = global_random_state()
    require(_measure(name) == _measure(name), "two measurements of the same samples differ.")
    require(before == global_random_state(), "global random state was used.")
    metric, evaluation, again = registry.load("metrics", name), _evaluation(False), _evaluation(False)
    metric(metric.Config())(evaluation)
    require(torch.equal(evaluation.finetuned.images, again.finetuned.images), "the samples were changed in place.")


def an_unchanged_model_differs_by_nothing(name: str) -> None:
    """where a paired difference is reported, with its error, it is zero for the prior's own samples"""
    paired = [measurement for measurement in _measure(name, equal=True) if measurement.standard_error is not None]
    off = [measurement.name for measurement in paired if abs(measurement.difference or 0) > 1e-6]
    require(not off, f"the prior against itself differs in {', '.join(off)}.")


def hard_cases_are_notes(name: str) -> None:
    """a sampler without densities, and a single prompt without held-out ones"""
    for options in ({"density": False}, {"prompts": 1}):
        for measurement in _measure(name, **options):
            good = measurement.note if measurement.value is None else math.isfinite(measurement.value)
            require(good, f"{measurement.name}: the value is {measurement.value} and no note says why.")


CHECKS: list[Callable[[str], None]] = [
    measurements_are_well_formed,
    measuring_twice_gives_the_same,
    an_unchanged_model_differs_by_nothing,
    hard_cases_are_notes,
]
