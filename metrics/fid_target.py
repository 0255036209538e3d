"""Fréchet distance to the target distribution, prior × exp(β r)."""

import torch

from bench import Evaluation, Measurement, Metric
from bench.evaluation.statistics import effective_sample_size, frechet_distance, pooled_rows, tilted_weights


class FidTarget(Metric):
    """Fréchet distance to prior samples re-weighted by `exp(βr)`, self-normalised within each prompt, prompts equal.

    Unlike `fid_prior` it does not punish the tilt that was asked for. The target rests on the two prior sets with noise
    of their own: the set that shares the finetuned samples' noise would flatter a model that hardly changed. n is the
    effective sample size, and below the feature dimension the value is refused. The `prior` of the measurement is the
    untouched prior's distance to the same target.
    """

    direction = "lower"
    support = "positive"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        name = f"fid_target/{evaluation.feature_space}"
        sets = (evaluation.reference, evaluation.floor)
        features = torch.cat([evaluation.features(samples) for samples in sets])
        tilt = evaluation.beta * torch.cat([samples.rewards[evaluation.reward] for samples in sets]).double()
        weights = tilted_weights(tilt, pooled_rows(*sets))
        size, dimension = float(effective_sample_size(weights.log())), features.shape[1]
        note = f"effective sample size {size:.1f} in {dimension} dimensions"
        if size < dimension:
            return [Measurement(name, None, n=int(size), direction=self.direction, note=f"refused: {note}")]
        value = frechet_distance(evaluation.features(evaluation.finetuned), features, weights)
        prior = frechet_distance(evaluation.features(evaluation.prior), features, weights)
        return [Measurement(name, value, prior, value - prior, n=int(size), direction=self.direction, note=note)]
