"""DGPO: "Reinforcing Diffusion Models by Direct Group Preference Optimization", 2025."""

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from bench import Batch, Copy, Core, Noised, Strength, Trajectory, mean_square

from .forward_process import AdvantageConfig, clipped_advantages
from .group import GroupRegression


class DGPOConfig(AdvantageConfig):
    """Options of DGPO; symbols as in its docstring."""

    strength: float = Field(10.0, gt=0, description="β_d of the group's preference")
    clip: float = Field(0.05, gt=0, description="c: half-width of the range of ρ")
    kl: float = Field(1e-3, ge=0, description="λ: weight of the distance to the prior")
    old_decay: float = Field(0.3, ge=0, le=1, description="largest decay of the old policy; it grows by .001 an update")
    old_from: int = Field(200, ge=0, description="round from which the old policy samples")
    fraction: float = Field(0.4, gt=0, le=1, description="noise levels per sample and update, over K")


class DGPO(GroupRegression):
    """DGPO: the good samples of a group are preferred to its bad ones, at one noise for all.

    With `d = ‖o_θ − u‖²` at `z = αx + sε`, where all samples of the group G have one ε and one noise level, the loss is

        σ(s_G) A d + λ ‖o_θ − o_#‖²,   s_G = β_d · mean over G of A (d − d_#)

    where ‖·‖² is a mean over latent elements, d_# the prior's error, and s_G has no gradient: the first term has the
    gradient of `log(1 + exp s_G) / β_d`. A is the advantage, clipped. Where `ρ = exp(d_old − d)` has moved out of
    1 ± c the way that A asks for, d has no gradient.

    The old policy follows as `o_old ← δ o_old + (1 − δ) o_θ` after every update, and samples in later rounds. Evaluated
    are exponential averages of the adapters, over every update. The published code samples with guidance and leaves it
    out of the loss: `--set train.guidance=1`; its times are 4 of the 7 noisiest of 10, and its averages are over every
    eighth update.

    "Reinforcing Diffusion Models by Direct Group Preference Optimization", 2025: https://arxiv.org/abs/2510.08425
    """

    Config = DGPOConfig
    strength = Strength("method.kl", (1e-3, 0.02, 0.1, 0.5))
    recipe = GroupRegression.recipe | {"train.ema": 0.9, "evaluation.weights": "ema"}
    config: DGPOConfig
    references = ("old", "prior")
    shared_noise = True

    def copies(self) -> dict[str, Copy]:
        """The old policy."""
        return {"old": Copy(lambda updates: min(0.001 * updates, self.config.old_decay))}

    def collect(self, core: Core, batch: Batch, number: int) -> Trajectory:
        """Samples of the policy, later of the old one."""
        return core.rollout(batch, weights="old" if number >= self.config.old_from else None)

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Add A [B] to the round."""
        return replace(data, advantages=clipped_advantages(core, data, self.config))

    def compared(self, part: Noised, policy: Tensor, reference: dict[str, Tensor]) -> Tensor:
        """`A (d − d_#)` [n]."""
        return part.advantages * (mean_square(policy - part.target) - mean_square(reference["prior"] - part.target))

    def loss(
        self, part: Noised, policy: Tensor, reference: dict[str, Tensor], q: Tensor, mean: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class; the weight σ(s_G) and ρ are logged, and which d have no gradient."""
        advantage, error = part.advantages, mean_square(policy - part.target)
        weight = torch.sigmoid(self.config.strength * mean)
        ratio = torch.exp(mean_square(reference["old"] - part.target) - error.detach())
        clipped = torch.where(advantage > 0, ratio > 1 + self.config.clip, ratio < 1 - self.config.clip)
        error = torch.where(clipped, error.detach(), error)
        loss = weight * advantage * error + self.config.kl * mean_square(policy - reference["prior"])
        return loss, {"weight": weight, "ratio": ratio, "clipped": clipped.float()}
