"""Flash-GRPO: policy gradient in one step, weighted so that every step's gradient is as large."""

import torch
from pydantic import Field
from torch import Tensor

from bench import Core, Deviation

from .base import Clip
from .one_step import OneStep, OneStepConfig


class FlashGRPOConfig(OneStepConfig):
    """Options of Flash-GRPO."""

    deviation: Deviation = Deviation(over="group", epsilon=1e-4)
    clip: Clip = 1e-3
    pool: float = Field(0.5, gt=0, le=1, description="share of the steps, the first ones, that k is drawn from")


class FlashGRPO(OneStep):
    """Flash-GRPO: policy gradient in one step, weighted so that every step's gradient is as large.

        ℓ = c_k max(−A ρ_k, −A clip(ρ_k, 1 ± c)),   A = (r − mean of its group) / std of its group
        log ρ_k = (‖z_{k+1} − μ_old‖² − ‖z_{k+1} − μ_θ‖²) / 2σ_k²,   c_k ∝ σ_k / |∂μ_k/∂o|

    ‖·‖² is a mean over latent elements, and the mean of c_k over the steps that k is drawn from is 1. The other steps
    have no noise. k is drawn for each prompt and round; the published code draws a round's steps stratified. Published
    sampler: an Euler step whose noise is linear in the level, `g = s_K + (s_1 − s_K) s`.

    "Flash-GRPO: Efficient Alignment for Video Diffusion via One-Step Policy Optimization", 2026,
    https://arxiv.org/abs/2605.15980
    """

    Config = FlashGRPOConfig
    config: FlashGRPOConfig

    def pool(self, core: Core) -> range:
        """The first steps, one at least."""
        return range(max(1, int(core.kernel.steps * self.config.pool + 1e-9)))

    def weight(self, core: Core, k: Tensor, like: Tensor) -> Tensor:
        """c_k [n]."""
        every = torch.cat([deviations_of_output(core, step, like[:1]) for step in self.pool(core)])
        return deviations_of_output(core, k, like) / every.mean()


def deviations_of_output(core: Core, k: int | Tensor, like: Tensor) -> Tensor:
    """`σ_k / |∂μ_k/∂o|` [n]: the change of the output that moves the mean by one deviation."""
    gain = core.kernel.mean(torch.zeros_like(like), torch.ones_like(like), k)
    return (core.kernel.std(k, like) / gain).abs().flatten(1)[:, 0]
