"""AlignProp: the reward's gradient through the sampler from a random step on."""

from dataclasses import replace

import torch
from pydantic import Field, field_validator
from torch import Tensor

from bench import Batch, Core

from .base import BackpropagationConfig
from .draft import SamplerBackpropagation


class AlignPropConfig(BackpropagationConfig):
    """Options of AlignProp."""

    start: tuple[float, float] = Field(
        (0.84, 0.1), description="mean and deviation of the first step with a gradient, as shares of all steps"
    )

    @field_validator("start")
    @classmethod
    def _are_shares(cls, start: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= share <= 1 for share in start):
            raise ValueError("start is a mean and a deviation, both shares of all steps, from 0 to 1")
        return start


class AlignProp(SamplerBackpropagation):
    """AlignProp: backpropagate the reward through the sampling steps from a random one on.

        L(θ) = −E[ r(z_K) ],   with a gradient from step  T = ⌊N(mean · K, deviation · K)⌋  on

    T is drawn for every sample, repeatedly until 1 ≤ T ≤ K − 1. The published setting, N(42, 5) of 50 steps, is the
    default.

    Prabhudesai et al., "Aligning Text-to-Image Diffusion Models with Reward Backpropagation", 2023,
    https://arxiv.org/abs/2310.03739
    """

    Config = AlignPropConfig
    needs = replace(SamplerBackpropagation.needs, uneven=True)
    recipe = SamplerBackpropagation.recipe | {"optimizer.lr": 1e-3}
    config: AlignPropConfig

    def unfit(self, steps: int, group: int) -> str | None:
        """A step from 1 to K − 1 must lie within three deviations, or the draw would hardly ever end."""
        mean, deviation = (share * steps for share in self.config.start)
        if steps < 2 or mean + 3 * deviation < 1 or mean - 3 * deviation >= steps:
            return f"method.start = {self.config.start} draws no step from 1 to {steps - 1}"
        return None

    def steps(self, core: Core, data: Batch) -> Tensor:
        """T of each sample."""
        return torch.tensor([self.draw_step(core, *name) for name in data.samples])

    def draw_step(self, core: Core, *name: str | int) -> int:
        """T of the sample with this name."""
        mean, deviation = (share * core.kernel.steps for share in self.config.start)
        rng, step = core.rng(*name), 0
        while not 1 <= step < core.kernel.steps:
            step = int(rng.normal(mean, deviation))
        return step
