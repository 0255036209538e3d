"""Divergence of the finetuned process from the target process, prior × exp(β r)."""

from dataclasses import replace

import torch
from torch import Tensor

from bench import Evaluation, Measurement, Metric, Samples
from bench.evaluation.statistics import (
    effective_sample_size,
    log_mean_exp,
    over_prompts,
    paired_samples,
    pooled_rows,
)

ENOUGH = 100  # effective samples a prompt; below, the log-mean-exp is too biased to print


class TiltGap(Metric):
    """`log E_#[exp(βr)] − (β E_θ[r] − path_kl)`, never negative in population; per prompt, then averaged.

    `tilt_gap` estimates the first term from all prior samples (or from those of a target that is known),
    `tilt_gap/importance` from the finetuned samples with weights `exp(βr) P_#/P_θ`. Each is refused when its smallest
    effective sample size of a prompt is below 100. The difference to the prior on the same noise, `path_kl − β × gain`,
    holds no such term and is always reported.
    """

    direction = "lower"
    unit = "nats"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        finetuned = evaluation.finetuned
        names = ("tilt_gap", "tilt_gap/importance")
        if finetuned.step_kl is None or finetuned.log_ratio is None:
            note = "no transition densities (sampler.eta = 0, a step of zero variance, or samples chosen among several)"
            return [Measurement(name, None, direction=self.direction, unit=self.unit, note=note) for name in names]

        def tilt(samples: Samples) -> Tensor:
            return evaluation.beta * samples.rewards[evaluation.reward].double()

        groups = finetuned.rows()
        above = finetuned.step_kl.double().sum(1) - tilt(finetuned), -tilt(evaluation.prior)
        gap = paired_samples(names[0], *above, groups, direction=self.direction, unit=self.unit)  # but for log Z
        if evaluation.targets is None:
            priors = (evaluation.prior, evaluation.reference, evaluation.floor)
            known = torch.cat([tilt(samples) for samples in priors]), pooled_rows(*priors)
        else:  # many more samples of the prior
            tilts = {prompt: evaluation.targets[prompt].tilt for prompt in groups}
            places = torch.arange(sum(map(len, tilts.values()))).split([len(one) for one in tilts.values()])
            known = torch.cat(list(tilts.values())), dict(zip(tilts, places, strict=True))
        sources = known, (tilt(finetuned) + finetuned.log_ratio.double(), groups)
        return [
            self._measure(replace(gap, name=name), log_weights, rows)
            for name, (log_weights, rows) in zip(names, sources, strict=True)
        ]

    def _measure(self, gap: Measurement, log_weights: Tensor, groups: dict[str, Tensor]) -> Measurement:
        log_z = float(over_prompts(log_mean_exp, log_weights, groups).mean())
        smallest = float(over_prompts(effective_sample_size, log_weights, groups).min())
        enough = smallest >= ENOUGH
        note = f"smallest effective sample size of a prompt {smallest:.1f}"
        return replace(
            gap,
            value=log_z + gap.value if enough else None,
            prior=log_z + gap.prior if enough else None,
            n=len(log_weights),
            note=note if enough else f"refused: {note}, below {ENOUGH}; the difference to the prior does not need it",
        )
