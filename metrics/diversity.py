"""Mean pairwise distance between the images of one prompt."""

import torch
from torch import Tensor

from bench import Evaluation, Measurement, Metric, Samples
from bench.statistics import over_prompts, paired


def mean_distance(features: Tensor) -> Tensor:
    """Mean cosine distance over all pairs of rows of `features` [n, d], n ≥ 2; scalar in [0, 2]."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    n = len(unit)
    similarity = unit @ unit.T
    return 1 - (similarity.sum() - similarity.trace()) / (n * (n - 1))


class Diversity(Metric):
    """Mean pairwise cosine distance of features within a prompt, averaged over prompts, paired with the prior."""

    direction = "higher"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        name = f"diversity/{evaluation.feature_space}"
        groups = evaluation.finetuned.rows()
        if min(map(len, groups.values())) < 2:
            return [Measurement(name, None, direction=self.direction, note="needs two images of every prompt")]

        def measure(samples: Samples) -> Tensor:
            return over_prompts(mean_distance, evaluation.features(samples), groups)

        n = len(evaluation.finetuned.prompts)
        return [paired(name, measure(evaluation.finetuned), measure(evaluation.prior), n=n, direction=self.direction)]
