"""Sliced Wasserstein distance to the target distribution, prior × exp(β r)."""

import math

import torch
from torch import Tensor

from bench import Evaluation, Measurement, Metric
from bench.evaluation.statistics import target_points
from bench.sampling.noise import generator

DIRECTIONS = 128


class TiltSw2(Metric):
    """Sliced 2-Wasserstein distance of points to the target; other samples than points have no such row.

    `(mean over directions of W₂² of the projections)^½` (Rabin et al., 2011) to prior samples with noise of their own,
    weighted by `exp(βr)`. `tilt_sw2/floor` is what as many draws of the target itself score: the least to hope for.
    """

    direction = "lower"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        if evaluation.finetuned.images.ndim != 2:
            return []
        points, weights, draws = target_points(evaluation)
        rng = generator(0, "select", "directions")
        directions = torch.from_numpy(rng.standard_normal((points.shape[1], DIRECTIONS)))
        directions = directions / directions.norm(dim=0)
        levels = (torch.arange(len(draws), dtype=torch.float64) + 0.5) / len(draws)
        target, order = (points.double() @ directions).sort(0)
        place = torch.searchsorted(weights[order].cumsum(0).T.contiguous(), levels.repeat(DIRECTIONS, 1))
        quantiles = target.gather(0, place.T.clamp(max=len(target) - 1))

        def distance(x: Tensor) -> float:
            return math.sqrt(float(((x.double() @ directions).sort(0).values - quantiles).square().mean()))

        samples = (evaluation.finetuned.images, evaluation.prior.images, draws)
        value, prior, floor = map(distance, samples)
        return [
            Measurement("tilt_sw2", value, prior, value - prior, n=len(draws), direction=self.direction),
            Measurement("tilt_sw2/floor", floor, n=len(draws), direction="none"),
        ]
