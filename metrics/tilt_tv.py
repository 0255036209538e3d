"""Total variation over modes to the target distribution, prior × exp(β r)."""

import torch
from torch import Tensor

from bench import Evaluation, Measurement, Metric
from bench.evaluation.statistics import target_points


class TiltTv(Metric):
    """`½ Σ_m |share_m − target_m|` over the modes of a prior whose modes are known; other models have no such row.

    A sample belongs to the nearest mode. The target's shares are those of prior samples with noise of their own,
    weighted by `exp(βr)`. `tilt_tv/floor` is what as many draws of the target itself score: the least to hope for.
    """

    direction = "lower"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        modes = evaluation.modes
        if modes is None:
            return []
        points, weights, draws = target_points(evaluation)

        def shares(x: Tensor, weights: Tensor | None = None) -> Tensor:
            nearest = torch.cdist(x.double(), modes.double().cpu()).argmin(1)
            counts = torch.bincount(nearest, weights, minlength=len(modes)).double()
            return counts / counts.sum()

        target = shares(points, weights)
        samples = (evaluation.finetuned.images, evaluation.prior.images, draws)
        value, prior, floor = (float((shares(x) - target).abs().sum() / 2) for x in samples)
        n = len(evaluation.finetuned.images)
        return [
            Measurement("tilt_tv", value, prior, value - prior, n=n, direction=self.direction),
            Measurement("tilt_tv/floor", floor, n=n, direction="none"),
        ]
