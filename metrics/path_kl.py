"""Divergence of the finetuned from the prior sampling process."""

from typing import Any

import torch

from bench import Evaluation, Measurement, Metric
from bench.evaluation.statistics import paired_samples

LATE = 2  # the last steps, whose small variances dominate the sum


class PathKl(Metric):
    """`E_θ Σ_k ‖μ_θ − μ_#‖² / 2σ_k²`: the exact KL of the two processes, which share noise law and variances.

    Also split into `late`, the last two steps, and `early`, the rest. The prior's own is zero by definition.
    """

    direction = "lower"
    support = "positive"
    prior_is_best = True
    unit = "nats"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        parts = {"path_kl": slice(None), "path_kl/early": slice(None, -LATE), "path_kl/late": slice(-LATE, None)}
        return _measured(evaluation, parts)


class PathKlSteps(Metric):
    """`path_kl` step by step: `path_kl_steps/01` is the first step's part; the parts of all sum to `path_kl`."""

    direction = "lower"
    support = "positive"
    prior_is_best = True
    unit = "nats"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        step_kl = evaluation.finetuned.step_kl
        steps = 1 if step_kl is None else step_kl.shape[1]
        return _measured(evaluation, {f"path_kl_steps/{k + 1:02}": slice(k, k + 1) for k in range(steps)})


def _measured(evaluation: Evaluation, parts: dict[str, slice]) -> list[Measurement]:
    """A measurement for each of the named parts of the steps."""
    samples = evaluation.finetuned
    rest: dict[str, Any] = {"n": len(samples.prompts), "direction": PathKl.direction, "unit": PathKl.unit}
    if samples.step_kl is None:
        note = "no transition densities (sampler.eta = 0, a step of zero variance, or samples chosen among several)"
        return [Measurement(name, None, note=note, **rest) for name in parts]
    totals = {name: samples.step_kl[:, steps].double().sum(1) for name, steps in parts.items()}
    groups = samples.rows()
    return [paired_samples(name, total, torch.zeros_like(total), groups, **rest) for name, total in totals.items()]
