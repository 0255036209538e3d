"""Preferences within a round's groups: Diffusion-DPO (Wallace et al., 2023, arXiv 2311.12908) on own samples."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from bench import Batch, Config, Core, Loss, Method, Needs, Noised, Trajectory, best_and_worst


class OnlineDPOConfig(Config):
    """Options of online DPO."""

    strength: float = Field(5000.0, gt=0, description="β of DPO; published: 5000, and about 100 online on flows")
    fraction: float = Field(0.1, gt=0, le=1, description="times a sample, over K")


class OnlineDPO(Method):
    """`−log σ(−β/2 [(ℓ_θ − ℓ_#)_w − (ℓ_θ − ℓ_#)_l])`, ℓ the mean square error of the output at a noised sample.

    w and l are the best and the worst of a round's samples of a prompt, noised alike, to one time; every sample of the
    group names one draw of noise and times for its pair. A group of equal rewards has no pair: it counts as `tied` and
    teaches nothing.
    """

    Config = OnlineDPOConfig
    needs = Needs(rewards=True)
    recipe = {"optimizer.lr": 3e-4, "optimizer.weight_decay": 1e-4}
    config: OnlineDPOConfig

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Rows of pairs: the loser's sample, then the winner's, as latents; advantages 1, or 0 without a pair."""
        best, worst = best_and_worst(data.prompts, data.rewards)
        finished = data.latents[:, -1]
        samples = torch.stack([finished[worst], finished[best]], 1)
        told_apart = (data.rewards[best] != data.rewards[worst]).to(data.rewards)
        return replace(data, latents=samples, advantages=told_apart)

    def steps(self, core: Core, data: Batch) -> Tensor:
        """The times [B, S] that pairs are noised to, of those of the sampler."""
        return core.choose_steps(data, self.config.fraction, last="like any")

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over pairs: two rows of the network each."""
        steps = self.steps(core, data)
        for part in core.diffused(data, steps, max(1, core.micro_batch // 2)):
            losers = data[part.row % len(data)].latents[:, 0]
            values, metrics = self.pair_losses(core, part, losers)
            yield Loss(values / steps.shape[1], metrics)

    def pair_losses(self, core: Core, part: Noised, losers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each pair [n], winners in `part`, and what is logged of it."""
        z = torch.cat([part.z, core.kernel.noised(losers, part.noise, part.k)])
        target = torch.cat([part.target, core.kernel.target(losers, part.noise, part.k)])
        k, text = torch.cat([part.k, part.k]), part.conditioning.join([part.conditioning, part.conditioning])
        errors, prior_errors = (
            (core.predict(z, k, text, prior=prior) - target).square().flatten(1).mean(1) for prior in (False, True)
        )
        winner, loser = (errors - prior_errors).chunk(2)
        inside = -self.config.strength / 2 * (winner - loser)
        metrics = {"tied": 1 - part.advantages, "accuracy": (inside.detach() > 0).float()}
        return -logsigmoid(inside) * part.advantages, metrics
