"""Vendi score: how many different images a prompt's samples amount to."""

import torch
from torch import Tensor

from bench import Evaluation, Measurement, Metric, Samples
from bench.evaluation.statistics import over_prompts, paired


def vendi_score(features: Tensor) -> Tensor:
    """`exp(−Σ λ log λ)` over the eigenvalues λ of K/n, K the cosine similarities of `features` [n, d]; from 1 to n."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp(min=0)
    return torch.special.entr(eigenvalues).sum().exp()


class Vendi(Metric):
    """Vendi score (Friedman and Dieng, 2023) within a prompt, averaged over prompts, paired with the prior."""

    direction = "higher"
    support = "positive"
    prior_is_best = True
    pairs = True
    unit = "images"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        groups = evaluation.finetuned.rows()

        def measure(samples: Samples) -> Tensor:
            return over_prompts(vendi_score, evaluation.features(samples), groups)

        return [
            paired(
                f"vendi/{evaluation.feature_space}",
                measure(evaluation.finetuned),
                measure(evaluation.prior),
                n=len(evaluation.finetuned.prompts),
                direction=self.direction,
                unit=self.unit,
            )
        ]
