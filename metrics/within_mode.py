"""How far samples lie, and how widely they scatter, inside their components, against the target, prior × exp(β r)."""

from torch import Tensor

from bench import Evaluation, Measurement, Metric
from bench.evaluation.statistics import centre_error, spread_error
from bench.evaluation.target import Tilted, compare


class WithinMode(Metric):
    """`within_mode/mean` and `within_mode/spread`: errors that shares of components cannot see.

    Both are of a sample's coordinates along the principal directions of its component, in the prior's deviations.
    mean: root mean square of the distance of means to the target's. spread: `|½ log|` of the variance around the
    samples' own means over the target's variance, pooled over components: 0 for the right width, 0.7 for half of it.
    """

    target = True
    direction = "lower"
    support = "positive"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        measurements = []
        for name, statistic in {"within_mode/mean": _mean, "within_mode/spread": _spread}.items():
            measurements += compare(name, evaluation, statistic, direction=self.direction)
        return measurements


def _groups(latents: Tensor, target: Tilted) -> list[tuple[int, Tensor]]:
    """Components with samples, and those samples' coordinates [n, R]."""
    posterior = target.posterior(latents)
    nearest = posterior.log_weights.argmax(1)
    return [(j, posterior.coordinates[nearest == j, j].double()) for j in nearest.unique().tolist()]


def _mean(latents: Tensor, target: Tilted) -> float:
    means, _ = target.places
    return centre_error(_groups(latents, target), means)


def _spread(latents: Tensor, target: Tilted) -> float:
    _, deviations = target.places
    return spread_error(_groups(latents, target), deviations)
