"""Share of the prior's samples that finetuned samples come near to: variety that artefacts cannot fake."""

import torch
from torch import Tensor

from bench import Evaluation, Measurement, Metric, Samples
from bench.evaluation.statistics import floor, paired_samples, prior_pairs

NEIGHBOURS = 5


def coverage(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """Which rows of `real` [n, d] are covered and which recalled by `fake` [m, d]: 0 or 1, two of [n].

    Covered (Naeem et al., 2020): a fake row lies within the distance of the real row's own k-th neighbour. Recalled
    (Kynkäänniemi et al., 2019): the real row lies within that distance of some fake row from its own k-th neighbour.
    """
    real, fake = real.double(), fake.double()
    across = torch.cdist(real, fake)
    real_reach, fake_reach = (torch.cdist(x, x).kthvalue(neighbours + 1, dim=1).values for x in (real, fake))
    return (across.min(1).values <= real_reach).double(), (across <= fake_reach).any(1).double()


class Coverage(Metric):
    """Coverage, and as a detail recall, of the prior's reference set by samples on other noise; k = 5.

    Unlike a mean distance within a prompt it does not count artefacts as variety. The `prior` of the measurement is
    what the prior's set on the finetuned samples' noise covers: a perfect copy of the prior covers no more.
    """

    direction = "higher"
    support = "share"
    prior_is_best = True

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        name = f"coverage/{evaluation.feature_space}"
        n = len(evaluation.reference.prompts)
        if n <= NEIGHBOURS:
            return [Measurement(name, None, direction=self.direction, note=f"needs more than {NEIGHBOURS} samples")]

        def of(real: Samples, fake: Samples) -> tuple[Tensor, Tensor]:
            return coverage(evaluation.features(real), evaluation.features(fake))

        groups = evaluation.reference.rows()
        sets = (of(evaluation.reference, samples) for samples in (evaluation.finetuned, evaluation.prior))
        (covered, recalled), (before, recalled_before) = sets
        rest = {"n": n, "direction": self.direction}
        return [
            paired_samples(name, covered, before, groups, **rest),
            paired_samples(f"{name}/recall", recalled, recalled_before, groups, **rest),
            floor(name, (float(of(*pair)[0].mean()) for pair in prior_pairs(evaluation)), n=n),
        ]
