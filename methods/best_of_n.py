"""Best of n and its soft form, the baselines that spend compute at sampling time instead of in training."""

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from bench import Batch, Config, Core, Loss, Method, Needs, Trajectory


class BestOfNConfig(Config):
    """Options of best of n."""

    n: int = Field(8, ge=1, description="samples drawn for every one that is kept")


class BestOfN(Method):
    """Nothing is trained: draw 8 prior samples and keep the one with the highest reward.

    Every finished sample costs n rollouts and n reward calls. Its divergence from the prior is

        KL = log n − (n−1)/n

    for a reward without ties, and less with ties (Beirami et al., 2024, https://arxiv.org/abs/2401.01879). That is the
    KL between samples and not between paths, so the metric `path_kl` does not apply.
    """

    Config = BestOfNConfig
    needs = Needs(training=False)
    config: BestOfNConfig

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """Nothing to train."""
        return iter(())

    def sample(self, core: Core, batch: Batch, **options: Any) -> Trajectory:
        """The best of the sample that the batch names and n − 1 further ones, without records of a path."""
        options["record"] = frozenset()
        best = best_scores = None
        for draw in range(self.config.n):  # the further draws have numbers far above those of all samples
            names = [(prompt, i + (draw << 32)) for prompt, i in batch.samples]
            candidates = core.rollout(core.batch(names), **options)
            parts = candidates.split(core.micro_batch)
            rewards = torch.cat([core.reward(part.latents[:, -1], part.prompts) for part in parts])
            scores = self.scores(core, rewards, names).nan_to_num(-torch.inf)  # a score that is missing is no best one
            if best is None:
                best, best_scores = candidates.latents.clone(), scores
            better = scores > best_scores
            best[better], best_scores = candidates.latents[better], torch.maximum(scores, best_scores)
        return Trajectory(batch.prompts, batch.samples, batch.conditioning, best)

    def scores(self, core: Core, rewards: Tensor, names: list[tuple[str, int]]) -> Tensor:
        """By what the best candidate is chosen, [B]; names: of the candidates."""
        return rewards


class SoftBestOfN(BestOfN):
    """Nothing is trained: draw 8 prior samples and keep one, the likelier the higher its reward.

    Sample i of n is kept with probability

        softmax(β r)_i

    which is the target `p_# exp(βr)` as n grows, the prior at β = 0 and `best_of_n` at β → ∞ (Verdun et al., 2025,
    https://arxiv.org/abs/2505.03156). Of all choices among n draws `best_of_n` has the largest KL, so its formula is a
    bound here.
    """

    def scores(self, core: Core, rewards: Tensor, names: list[tuple[str, int]]) -> Tensor:
        """`βr + Gumbel noise`, whose maximum is at i with probability `softmax(βr)_i`."""
        return core.beta * rewards + gumbel(core, names).to(rewards)


def gumbel(core: Core, names: list[tuple[str, int]]) -> Tensor:
    """Standard Gumbel noise [B], each number named by a candidate."""
    return torch.tensor([core.rng("gumbel", *name).gumbel() for name in names])
