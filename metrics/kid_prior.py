"""Kernel distance to the prior's own samples."""

from bench import Evaluation, Measurement, Metric
from bench.evaluation.statistics import kernel_distance


class KidPrior(Metric):
    """Unbiased kernel distance (Bińkowski et al., 2018) of the finetuned samples to a prior set on independent noise.

    The `prior` of the measurement is the floor, as for `fid_prior`; here it scatters around zero.
    """

    direction = "lower"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        reference = evaluation.features(evaluation.reference)
        value = kernel_distance(evaluation.features(evaluation.finetuned), reference)
        floor = kernel_distance(evaluation.features(evaluation.floor), reference)
        name = f"kid_prior/{evaluation.feature_space}"
        return [Measurement(name, value, floor, value - floor, n=len(reference), direction=self.direction)]
