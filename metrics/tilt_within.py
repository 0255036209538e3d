"""How far points lie, and how widely they scatter, inside their modes, against the target, prior × exp(β r)."""

import torch
from torch import Tensor

from bench import Evaluation, Measurement, Metric
from bench.evaluation.statistics import centre_error, distance_to_target, spread_error


class TiltWithin(Metric):
    """`tilt_within/mean` and `tilt_within/spread`: errors that `tilt_tv` cannot see; models with known modes have them.

    A sample belongs to the nearest mode; the target is that of `tilt_tv`. mean: root mean square of the distance of
    means to the target's, in the target's deviations. spread: `|½ log|` of the variance around the samples' own means
    over the target's variance, pooled over modes: 0 for the right width, 0.7 for half of it. Floors as for `tilt_tv`.
    """

    direction = "lower"
    support = "positive"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        if evaluation.modes is None:
            return []
        modes = evaluation.modes.double().cpu()

        def groups(x: Tensor) -> list[tuple[int, Tensor]]:
            nearest = torch.cdist(x.double(), modes).argmin(1)
            return [(j, x[nearest == j].double()) for j in nearest.unique().tolist()]

        def places(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            """Means and deviations of the target in every mode, [M, d]."""
            own = torch.nn.functional.one_hot(torch.cdist(points.double(), modes).argmin(1), len(modes))
            own = own * weights.double()[:, None]
            own = own / own.sum(0).clamp(min=1e-12)
            means = own.T @ points.double()
            return means, (own.T @ points.double().square() - means.square()).clamp(min=0).sqrt()

        def mean(x: Tensor, points: Tensor, weights: Tensor) -> float:
            means, deviations = places(points, weights)
            scale = deviations.square().mean().sqrt()
            return centre_error([(j, own / scale) for j, own in groups(x)], means / scale)

        def spread(x: Tensor, points: Tensor, weights: Tensor) -> float:
            return spread_error(groups(x), places(points, weights)[1])

        return [
            measurement
            for name, distance in {"tilt_within/mean": mean, "tilt_within/spread": spread}.items()
            for measurement in distance_to_target(name, evaluation, distance, direction=self.direction)
        ]
