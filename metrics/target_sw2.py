"""Sliced Wasserstein distance of latents to the target, prior × exp(β r), where it is known."""

from torch import Tensor

from bench import Evaluation, Measurement, Metric
from bench.evaluation.statistics import random_directions, sliced_distance
from bench.evaluation.target import Tilted, compare


class TargetSw2(Metric):
    """`(mean over directions of W₂² of the projections)^½` (Rabin et al., 2011) to the weighted draws of the target.

    Latents are measured in the prior's deviations, the root mean square over dimensions. It sees shares and shapes.
    """

    target = True
    direction = "lower"
    support = "positive"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        def distance(latents: Tensor, target: Tilted) -> float:
            scale = target.latents.var(0).mean().sqrt()
            directions = random_directions(latents.shape[1])
            return sliced_distance(latents / scale, target.latents / scale, target.weights, directions)

        return compare("target_sw2", evaluation, distance, direction=self.direction)
