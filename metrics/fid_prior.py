"""Fréchet distance to the prior's own samples."""

import torch
from torch import Tensor

from bench import Evaluation, Measurement, Metric, Samples
from bench.evaluation.statistics import frechet_distance, mean_and_error


class FidPrior(Metric):
    """Fréchet distance (Heusel et al., 2017) of the finetuned samples to a prior set on independent noise.

    The `prior` of the measurement is the floor: what a second independent set of the prior itself scores at the same n.
    """

    direction = "lower"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        reference = evaluation.features(evaluation.reference)
        value = frechet_distance(evaluation.features(evaluation.finetuned), reference)
        floor = frechet_distance(evaluation.features(evaluation.floor), reference)
        n, d = reference.shape
        note = f"rank-deficient covariance: {n} images in {d} dimensions; compare with the floor" if n <= d else ""
        name = f"fid_prior/{evaluation.feature_space}"
        return [Measurement(name, value, floor, value - floor, n=n, direction=self.direction, note=note)]


class FidPriorPerPrompt(Metric):
    """Fréchet distance to the prior within each prompt, averaged: what papers on reward finetuning call FID.

    With a few images a prompt the covariances are far from full rank, and values are in the hundreds: only the
    difference to the floor means anything. It is not paired, so its error stands in the note.
    """

    direction = "lower"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        name = f"fid_prior_per_prompt/{evaluation.feature_space}"
        groups = evaluation.finetuned.rows()
        size = min(map(len, groups.values()))
        if size < 2:
            return [Measurement(name, None, direction=self.direction, note="needs two images of every prompt")]
        reference = evaluation.features(evaluation.reference)

        def distances(samples: Samples) -> Tensor:
            own = evaluation.features(samples)
            return torch.tensor([frechet_distance(own[rows], reference[rows]) for rows in groups.values()])

        value, floor = distances(evaluation.finetuned), distances(evaluation.floor)
        difference, error = mean_and_error(value - floor)
        n, d = reference.shape
        notes = [f"rank-deficient covariance: {size} images a prompt in {d} dimensions"] if size <= d else []
        notes += [f"difference to the floor ± {error:.2g} over prompts"] if error is not None else []
        measured = (float(value.mean()), float(floor.mean()), difference)
        return [Measurement(name, *measured, n=n, direction=self.direction, note="; ".join(notes))]
