"""Kernel distance to the prior's own samples."""

from bench import Evaluation, Measurement, Metric, Samples
from bench.evaluation.statistics import distance_to_prior, kernel_distance


class KidPrior(Metric):
    """Unbiased kernel distance (Bińkowski et al., 2018) of the finetuned samples to a prior set on independent noise.

    The floor is made as for `fid_prior`; here it scatters around zero.
    """

    direction = "lower"
    prior_is_best = True
    version = 2

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        def distance(*sets: Samples) -> float:
            return kernel_distance(*map(evaluation.features, sets))

        name = f"kid_prior/{evaluation.feature_space}"
        return distance_to_prior(name, evaluation, distance, direction=self.direction)
