"""How far the training's sampler is from the prior before any training."""

from bench import Evaluation, Measurement, Metric
from bench.evaluation.statistics import frechet_distance


class SamplerGap(Metric):
    """Fréchet distance of prior samples of the training's sampler to those of an accurate one.

    The accurate one takes 50 steps, or more if the training does, without noise. Noise is independent, so that the
    value is to be read against the `prior` of the measurement, the floor: two sets of the accurate sampler. It says
    nothing of the finetuned model. Three further sets of prior samples are drawn for it.
    """

    direction = "lower"
    support = "positive"
    prior_is_best = True

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        name = f"sampler_gap/{evaluation.feature_space}"
        if evaluation.prior_on is None:
            return [Measurement(name, None, direction=self.direction, note="nothing to sample the prior with")]
        accurate, again, training = (
            evaluation.features(evaluation.prior_on(*which))
            for which in (("accurate", "reference"), ("accurate", "floor"), ("training", "floor"))
        )
        value, floor = frechet_distance(training, accurate), frechet_distance(again, accurate)
        n, d = accurate.shape
        note = f"rank-deficient covariance: {n} images in {d} dimensions; compare with the floor" if n <= d else ""
        return [Measurement(name, value, floor, value - floor, n=n, direction=self.direction, note=note)]
