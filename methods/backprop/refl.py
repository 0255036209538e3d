"""ReFL: reward feedback learning on a late clean prediction."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, relu

from bench import NFE, Batch, Core, Loss

from .base import BackpropagationConfig, RewardBackpropagation


class ReFLConfig(BackpropagationConfig):
    """Options of ReFL."""

    window: float = Field(0.25, gt=0, le=1, description="share of the last steps among which m is drawn")
    margin: float | None = Field(None, description="loss relu(margin − r) instead of −r; published: 2, for ImageReward")
    scale: float = Field(1.0, gt=0, description="factor of the loss; published: 1e-3")


class ReFL(RewardBackpropagation):
    """ReFL: backpropagate the reward of the clean prediction at one random late step.

        L(θ) = −scale · E[ r(x̂_θ(z_m)) ]    or, with a margin,    scale · E[ relu(margin − r(x̂_θ(z_m))) ]

    z_m is reached without gradient, at a step m that is drawn for every sample. A KL is that at z_m, within the scale;
    the reward sees x̂_θ(z_m) and no sample, so no target is known with it either. The published code samples without
    guidance; here guidance is the sampler's, as for every method.

    Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", NeurIPS 2023,
    https://arxiv.org/abs/2304.05977
    """

    Config = ReFLConfig
    needs = replace(RewardBackpropagation.needs, uneven=True)
    recipe = {"optimizer.lr": 1e-5, "optimizer.weight_decay": 1e-2}
    config: ReFLConfig

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """One micro-loss per micro-batch of samples with the same m."""
        scale, margin = self.config.scale, self.config.margin
        chosen = self.steps(core, data)
        for m in chosen.unique().tolist():
            for part in data[chosen == m].split(core.micro_batch):
                z = core.rollout(part, stop_at=m).latents[:, -1]
                output = core.predict(z, m, part.conditioning)
                reward = core.reward(core.kernel.clean(z, output, m), part.prompts)
                loss = -reward if margin is None else relu(margin - reward)
                yield Loss(scale * self.with_kl(core, part, loss, [(z, output, m)]), {"reward": reward.detach()})

    def steps(self, core: Core, data: Batch) -> Tensor:
        """Long [B], on the CPU: m of each sample, a step among the last `window` of all."""
        steps = core.kernel.steps
        first = min(int(steps * (1 - self.config.window)), steps - 1)
        return torch.tensor([int(core.rng(*name).integers(first, steps)) for name in data.samples])

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The loss samples up to z_m, and predicts there once more, which alone learns."""
        prior, _ = self.prior_nfe(len(batch), 0)
        return NFE(rollout=0, forward=int((self.steps(core, batch) + 1).sum()) + prior, backward=len(batch))
