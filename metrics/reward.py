"""Reward on every part of the prompts, of each prompt, and every other reward as a check for over-optimisation."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from bench import Evaluation, Measurement, Metric
from bench.evaluation.statistics import error_at_fixed_prompts, mean_and_error, paired, per_prompt


def scored(evaluation: Evaluation, name: str, split: str) -> tuple[dict[str, Tensor], str]:
    """Prompt → its rows that have a score in both sets, two at least; and a note on what is missing, or nothing."""
    there = ~(evaluation.finetuned.rewards[name].isnan() | evaluation.prior.rewards[name].isnan())
    groups = evaluation.finetuned.rows(split)
    kept = {prompt: rows[there[rows]] for prompt, rows in groups.items() if there[rows].sum() >= 2}
    count, left = sum(map(len, groups.values())), sum(map(len, kept.values()))
    note = f"{count - left} of {count} samples are left out: there or on the prior's side a score is missing"
    return kept, note if left < count else ""


class RewardGain(Metric):
    """Mean reward per prompt split, and its paired difference to the prior on the same noise.

    Training prompts are given, so the standard error on them is over the noise; validation and test prompts stand for
    unseen ones, so there it is over prompts.

    The reward that was trained on is `reward/<split>`; any other is `reward/<name>/<split>` and better in neither
    direction: a fall beside a rising trained reward is the mark of over-optimisation. Samples without a score are left
    out with their pair, and a prompt with fewer than two pairs; a note counts them.
    """

    direction = "higher"
    pairs = True

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        finetuned, prior = evaluation.finetuned, evaluation.prior
        trained = evaluation.reward
        names = [trained, *(name for name in finetuned.rewards if name != trained)]
        measurements = []
        for name in names:
            for split in dict.fromkeys(finetuned.splits):
                label = f"reward/{split}" if name == trained else f"reward/{name}/{split}"
                direction = self.direction if name == trained else "none"
                groups, note = scored(evaluation, name, split)
                if not groups:
                    measurements.append(Measurement(label, None, direction=direction, note=note))
                    continue
                measurement = paired(
                    label,
                    per_prompt(finetuned.rewards[name], groups),
                    per_prompt(prior.rewards[name], groups),
                    n=sum(map(len, groups.values())),
                    direction=direction,
                    note=note,
                )
                if split == "train":
                    gain = finetuned.rewards[name] - prior.rewards[name]
                    error, degrees = error_at_fixed_prompts(gain, groups)
                    measurement = replace(measurement, standard_error=error, degrees=degrees)
                measurements.append(measurement)
        return measurements


class RewardPrompts(Metric):
    """The trained reward prompt by prompt, `reward_prompts/<split>/<prompt>`, with an error over the prompt's noise."""

    direction = "higher"
    pairs = True

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        finetuned, prior = (samples.rewards[evaluation.reward] for samples in (evaluation.finetuned, evaluation.prior))
        measurements = []
        for split in dict.fromkeys(evaluation.finetuned.splits):
            groups, note = scored(evaluation, evaluation.reward, split)
            for prompt, rows in groups.items():
                name, n = f"reward_prompts/{split}/{prompt}", len(rows)
                difference, error = mean_and_error((finetuned[rows] - prior[rows]).double())
                means = float(finetuned[rows].mean()), float(prior[rows].mean())
                degrees = None if error is None else n - 1
                rest: dict[str, Any] = {"n": n, "direction": self.direction, "note": note}
                measurements.append(Measurement(name, *means, difference, error, degrees, **rest))
        return measurements
