"""Total variation over modes to the target distribution, prior × exp(β r)."""

import torch
from torch import Tensor

from bench import Evaluation, Measurement, Metric
from bench.evaluation.statistics import distance_to_target


class TiltTv(Metric):
    """`½ Σ_m |share_m − target_m|` over the modes of a prior whose modes are known; other models have no such row.

    A sample belongs to the nearest mode. The target's shares are those of prior samples with noise of their own,
    weighted by `exp(βr)`. `tilt_tv/floor` is what as many draws of the target itself score: the least to hope for.
    The error is over samples, those of the target included.
    """

    direction = "lower"
    support = "share"
    version = 2

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        modes = evaluation.modes
        if modes is None:
            return []

        def shares(x: Tensor, weights: Tensor | None = None) -> Tensor:
            nearest = torch.cdist(x.double(), modes.double().cpu()).argmin(1)
            counts = torch.bincount(nearest, weights, minlength=len(modes)).double()
            return counts / counts.sum()

        def distance(x: Tensor, points: Tensor, weights: Tensor) -> float:
            return float((shares(x) - shares(points, weights)).abs().sum() / 2)

        return distance_to_target("tilt_tv", evaluation, distance, direction=self.direction)
