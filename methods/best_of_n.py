"""Best of n, the baseline that spends compute at sampling time instead of in training."""

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field

from bench import Batch, Config, Core, Loss, Method, Needs, Trajectory


class BestOfNConfig(Config):
    """Options of best of n."""

    n: int = Field(8, ge=1, description="samples drawn for every one that is kept")


class BestOfN(Method):
    """Nothing is trained: draw 8 prior samples and keep the one with the highest reward.

    Every finished sample costs n rollouts and n reward calls. Its divergence from the prior is

        KL = log n − (n−1)/n

    for a reward without ties (Beirami et al., 2024, https://arxiv.org/abs/2401.01879). That is the KL between samples
    and not between paths, so the metric `path_kl` does not apply.
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
        best = best_rewards = None
        for draw in range(self.config.n):  # the further draws have numbers far above those of all samples
            candidates = core.rollout(core.batch((prompt, i + (draw << 32)) for prompt, i in batch.samples), **options)
            parts = candidates.split(core.micro_batch)
            rewards = torch.cat([core.reward(part.latents[:, -1], part.prompts) for part in parts])
            if best is None:
                best, best_rewards = candidates.latents.clone(), rewards
            better = rewards > best_rewards
            best[better], best_rewards = candidates.latents[better], torch.maximum(rewards, best_rewards)
        return Trajectory(batch.prompts, batch.samples, batch.conditioning, best)
