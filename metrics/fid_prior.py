"""Fréchet distance to the prior's own samples."""

import torch
from torch import Tensor

from bench import Evaluation, Measurement, Metric, Samples
from bench.evaluation.statistics import distance_to_prior, floor, frechet_distance, paired, prior_pairs


class FidPrior(Metric):
    """Fréchet distance (Heusel et al., 2017) of the finetuned samples to a prior set on independent noise.

    The `prior` of the measurement is the prior's set on the finetuned samples' noise, so the difference is paired.
    `fid_prior/<space>/floor` is what independent sets of the prior score at the same n.
    """

    direction = "lower"
    support = "positive"
    prior_is_best = True
    version = 2

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        n, d = evaluation.features(evaluation.reference).shape
        note = f"rank-deficient covariance: {n} images in {d} dimensions; compare with the floor" if n <= d else ""
        name, rest = f"fid_prior/{evaluation.feature_space}", {"direction": self.direction, "note": note}

        def distance(*sets: Samples) -> float:
            return frechet_distance(*map(evaluation.features, sets))

        return distance_to_prior(name, evaluation, distance, **rest)


class FidPriorPerPrompt(Metric):
    """Fréchet distance to the prior within each prompt, averaged: what papers on reward finetuning call FID.

    With a few images a prompt the covariances are far from full rank, and values are in the hundreds: only the
    difference to the prior means anything. Prior and floor are those of `fid_prior`.
    """

    direction = "lower"
    support = "positive"
    prior_is_best = True
    version = 2

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        name = f"fid_prior_per_prompt/{evaluation.feature_space}"
        groups = evaluation.finetuned.rows()
        size = min(map(len, groups.values()))
        if size < 2:
            return [Measurement(name, None, direction=self.direction, note="needs two images of every prompt")]

        def distances(one: Samples, other: Samples) -> Tensor:
            x, y = evaluation.features(one), evaluation.features(other)
            return torch.tensor([frechet_distance(x[rows], y[rows]) for rows in groups.values()])

        n, d = evaluation.features(evaluation.reference).shape
        note = f"rank-deficient covariance: {size} images a prompt in {d} dimensions" if size <= d else ""
        value, prior = (
            distances(samples, evaluation.reference) for samples in (evaluation.finetuned, evaluation.prior)
        )
        return [
            paired(name, value, prior, n=n, direction=self.direction, note=note),
            floor(name, (float(distances(*pair).mean()) for pair in prior_pairs(evaluation)), n=n),
        ]
