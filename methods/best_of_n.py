"""Best of n: the honest reference for compute that is spent at sampling time instead of in training."""

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field

from bench import Batch, Config, Core, Loss, Method, Needs, Trajectory


class BestOfNConfig(Config):
    """Options of best of n."""

    n: int = Field(8, ge=1, description="samples drawn for every one that is kept")


class BestOfN(Method):
    """Draw n prior samples, keep the one of the highest reward; every finished sample costs n rollouts and n scores.

    For a reward without ties its divergence from the prior is `log n − (n−1)/n` nats (Beirami et al., 2024), a
    statement about samples, so `path_kl` does not apply.
    """

    Config = BestOfNConfig
    needs = Needs(training=False)
    config: BestOfNConfig

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """Nothing to train."""
        return iter(())

    def sample(self, core: Core, batch: Batch, **options: Any) -> Trajectory:
        """The best of the batch's own noise and n − 1 further draws, without records of a path."""
        options["record"] = frozenset()
        best, top = None, None
        for copy in range(self.config.n):  # candidates are named far above every sample number
            named = core.batch((prompt, index + (copy << 32)) for prompt, index in batch.samples)
            found = core.rollout(named, **options)
            parts = found.split(core.micro_batch)
            rewards = torch.cat([core.reward(part.latents[:, -1], part.prompts) for part in parts])
            if best is None:
                best, top = found.latents.clone(), rewards
            better = rewards > top
            best[better], top = found.latents[better], torch.maximum(rewards, top)
        return Trajectory(batch.prompts, batch.samples, batch.conditioning, best)
