"""Backpropagation of the reward through sampling.

DRaFT-K and DRaFT-LV: Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", ICLR 2024.
AlignProp: Prabhudesai et al., "Aligning Text-to-Image Diffusion Models with Reward Backpropagation", 2023.
LeapAlign: arXiv 2604.15311.
"""

from collections.abc import Iterator

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bench import Batch, Config, Core, Loss, Method, Needs


class DRaFTConfig(Config):
    """Options of backpropagation through sampling."""

    depth: int = Field(5, ge=0, description="K of DRaFT-K: last sampling steps with gradient; 0 means all")
    start: tuple[float, float] | None = Field(
        None, description="AlignProp: mean and deviation of the first step with gradient, as shares of all; not depth"
    )
    renoise: int = Field(0, ge=0, description="n of DRaFT-LV: new last steps, the first one not counted")
    leap: bool = Field(False, description="LeapAlign: two leaps between random steps, in the place of all steps")

    @model_validator(mode="after")
    def _renoising_is_of_the_last_step(self) -> "DRaFTConfig":
        if self.renoise and (self.depth != 1 or self.start):
            raise ValueError("renoise (DRaFT-LV) repeats the last step alone: use depth: 1 and no start")
        if self.leap and (self.renoise or self.start):
            raise ValueError("leap chooses its own steps: use no start and no renoise")
        if self.start and not all(0 <= share <= 1 for share in self.start):
            raise ValueError("start is a mean and a deviation, both shares of all steps, from 0 to 1")
        return self


class DRaFT(Method):
    """Maximise `E_θ[r(decode(z_K))]` through the last steps of the sampler; loss `−r`. β is not used.

    - DRaFT-K: gradient through the last `depth` steps.
    - AlignProp: from a random step on, drawn for every sample.
    - LeapAlign: `z_k → z_j → z_K` for two random steps k < j of every sample, each leap without noise. The values are
      those of the sampled trajectory, the gradient is that of the leaps (straight-through).
    - DRaFT-LV: gradient through the last step alone, averaged over n states `z̃ ~ p_B(·|z_K)`, each with its mean.
    """

    Config = DRaFTConfig
    needs = Needs(trajectory=False, reward_gradient=True)
    recipe = {"optimizer.lr": 4e-4, "optimizer.weight_decay": 1e-4}
    config: DRaFTConfig

    def unfit(self, steps: int, group: int) -> str | None:
        """AlignProp draws its first step until it is one of 1 … K−1, so one of them must be likely enough."""
        if self.config.start:
            mean, deviation = (share * steps for share in self.config.start)
            if steps < 2 or mean + 3 * deviation < 1 or mean - 3 * deviation >= steps:
                return f"method.start = {self.config.start} draws no step from 1 to {steps - 1}"
        return None

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """Micro-losses, samples with the same first step of the gradient together."""
        if self.config.leap:
            for part in data.split(core.micro_batch):
                rewards = core.reward(self.leap(core, part), part.prompts)
                yield Loss(-rewards, {"reward": rewards.detach()})
            return
        starts = self.starts(core, data)
        for start in starts.unique().tolist():
            for part in data[starts == start].split(core.micro_batch):
                finals = self.finals(core, part, start)
                rewards = torch.stack([core.reward(final, part.prompts) for final in finals]).mean(0)
                yield Loss(-rewards, {"reward": rewards.detach()})

    def leap(self, core: Core, part: Batch) -> Tensor:
        """The sampled clean latents [n, *latent], with the gradient of two leaps."""
        path, n = core.rollout(part), len(part)
        (both,) = path.transitions(core.choose_pair(part), 2 * n)  # rows at k, then rows at j
        k, j = both.k.split(n)
        z, later = both.z.split(n)
        output = core.predict(z, k, part.conditioning)
        clean, noise = core.kernel.clean(z, output, k), core.kernel.noise(z, output, k)
        leap = core.kernel.noised(clean, noise, j)
        z = later + leap - leap.detach()
        clean = core.kernel.clean(z, core.predict(z, j, part.conditioning), j)
        return path.latents[:, -1] + clean - clean.detach()

    def starts(self, core: Core, data: Batch) -> Tensor:
        """Long [B]: the first step with gradient."""
        if self.config.start:
            return core.choose_start(data, *self.config.start)
        steps = core.kernel.steps
        return torch.full((len(data),), steps - min(self.config.depth or steps, steps))

    def finals(self, core: Core, part: Batch, start: int) -> list[Tensor]:
        """Clean latents [n, *latent] whose mean reward is maximised: one, or the n of DRaFT-LV."""
        if not self.config.renoise:
            return [core.rollout(part, grad_from=start).latents[:, -1]]
        clean = core.rollout(part).latents[:, -1]
        states = [core.renoise(part, clean, start, copy) for copy in range(self.config.renoise)]
        return [core.kernel.mean(z, core.predict(z, start, part.conditioning), start) for z in states]
