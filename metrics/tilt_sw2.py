"""Sliced Wasserstein distance to the target distribution, prior × exp(β r)."""

from functools import partial

from bench import Evaluation, Measurement, Metric
from bench.evaluation.statistics import distance_to_target, random_directions, sliced_distance


class TiltSw2(Metric):
    """Sliced 2-Wasserstein distance of points to the target; other samples than points have no such row.

    `(mean over directions of W₂² of the projections)^½` (Rabin et al., 2011) to prior samples with noise of their own,
    weighted by `exp(βr)`. `tilt_sw2/floor` is what as many draws of the target itself score: the least to hope for.
    The error is over samples, those of the target included.
    """

    direction = "lower"
    support = "positive"
    version = 2

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        if evaluation.finetuned.images.ndim != 2:
            return []
        distance = partial(sliced_distance, directions=random_directions(evaluation.finetuned.images.shape[1]))
        return distance_to_target("tilt_sw2", evaluation, distance, direction=self.direction)
