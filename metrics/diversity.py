"""Mean pairwise distance between the images of one prompt."""

import torch
from torch import Tensor

from bench import Evaluation, Measurement, Metric, Samples
from bench.evaluation.statistics import over_prompts, paired


def mean_distance(features: Tensor) -> Tensor:
    """Mean cosine distance over all pairs of rows of `features` [n, d], n ≥ 2; scalar in [0, 2]."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    n = len(unit)
    similarity = unit @ unit.T
    return 1 - (similarity.sum() - similarity.trace()) / (n * (n - 1))


class Diversity(Metric):
    """Mean pairwise cosine distance of features within a prompt, averaged over prompts, paired with the prior."""

    direction = "higher"
    support = "positive"
    prior_is_best = True
    pairs = True
    name = "diversity"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        name = f"{self.name}/{self.space or evaluation.feature_space}"
        groups = evaluation.finetuned.rows()
        if self.space and evaluation.finetuned.images.ndim == 2:
            return [Measurement(name, None, direction=self.direction, note="the samples are points, not images")]
        if min(map(len, groups.values())) < 2:
            return [Measurement(name, None, direction=self.direction, note="needs two images of every prompt")]

        def measure(samples: Samples) -> Tensor:
            return over_prompts(mean_distance, evaluation.features(samples, self.space), groups)

        n = len(evaluation.finetuned.prompts)
        return [paired(name, measure(evaluation.finetuned), measure(evaluation.prior), n=n, direction=self.direction)]


class DiversityDreamSim(Diversity):
    """Mean pairwise distance within a prompt by DreamSim (Fu et al., 2023), which was fitted to human judgements."""

    name = "diversity_dreamsim"
    space = "dreamsim_open_clip_vitb32"


class DiversityClip(Diversity):
    """Mean pairwise cosine distance within a prompt in the image embeddings of CLIP ViT-L/14."""

    name = "diversity_clip"
    space = "clip_vitl14"
