"""Fréchet distance to the prior's own samples."""

from bench import Evaluation, Measurement, Metric
from bench.statistics import frechet_distance


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
