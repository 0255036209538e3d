"""CRD: "Diffusion Reinforcement Learning via Centered Reward Distillation", 2026."""

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from bench import Batch, Copy, Core, Needs, Noised, Strength, Trajectory, mean_square

from .forward_process import AdvantageConfig, clipped_advantages
from .group import GroupRegression


class CRDConfig(AdvantageConfig):
    """Options of CRD; symbols as in its docstring."""

    scale: float = Field(1.0, gt=0, description="β: of the implicit reward")
    kl: float = Field(0.1, gt=0, description="λ: weight of the distance to the prior")
    kl_floor: float = Field(1e-4, ge=0, description="that weight at the lowest reward")
    fraction: float = Field(0.9, gt=0, le=1, description="noise levels per sample and update, over K")


class CRD(GroupRegression):
    """CRD: regression of an implicit reward on the reward, both centred within the group.

    The loss is, with `R = (1 + clip(A, ±c)/c) / 2` of the advantage A,

        c/β · [β (ρ − ρ̄) − (R − R̄)]² + (λ₀ + (λ − λ₀) R) ‖o_θ − o_#‖²,
        ρ = ‖o_old − u‖² / w_old − ‖o_θ − u‖² / w_θ

    where ‖·‖² is a mean over latent elements, `w = mean |o − u|`, without gradient and at least 1e-5, and ρ̄ and R̄ are
    means over the group's samples at one noise level; ρ̄ has no gradient. (The published code takes the means over a
    micro-batch of several prompts and levels, and the prior's output with guidance.)

    After each round the old policy and the one that samples follow, each as `o ← δ o + (1 − δ) o_θ`: the old one with
    `δ = .25 + .005 n` after n updates, the other with `.0075 (n − 75)` and at least 0, both at most .999.

    "Diffusion Reinforcement Learning via Centered Reward Distillation", 2026: https://arxiv.org/abs/2603.14128
    """

    Config = CRDConfig
    needs = Needs(rewards=True, whole_update=True, current=True)
    strength = Strength("method.kl", (0.02, 0.1, 0.5, 2.5))
    config: CRDConfig
    references = ("old", "prior")
    shared_noise = False

    def copies(self) -> dict[str, Copy]:
        """The old policy, and the one that samples."""
        sampler = Copy(lambda updates: min(max(0.0075 * (updates - 75), 0.0), 0.999), rounds=1)
        return {"old": Copy(lambda updates: min(0.25 + 0.005 * updates, 0.999), rounds=1), "sampler": sampler}

    def collect(self, core: Core, batch: Batch, number: int) -> Trajectory:
        """Samples of the copy that samples."""
        return core.rollout(batch, weights="sampler")

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Add R [B] to the round, as its advantages."""
        clipped = clipped_advantages(core, data, self.config) / self.config.advantage_clip
        return replace(data, advantages=(1 + clipped) / 2)

    def compared(self, part: Noised, policy: Tensor, reference: dict[str, Tensor]) -> Tensor:
        """`β ρ − R` [n]."""
        implicit = weighted_error(reference["old"], part.target) - weighted_error(policy, part.target)
        return self.config.scale * implicit - part.advantages

    def loss(
        self, part: Noised, policy: Tensor, reference: dict[str, Tensor], q: Tensor, mean: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        config = self.config
        distill = config.advantage_clip / config.scale * (q - mean) ** 2
        weight = config.kl_floor + (config.kl - config.kl_floor) * part.advantages
        return distill + weight * mean_square(policy - reference["prior"]), {"distill": distill.detach()}


def weighted_error(output: Tensor, target: Tensor) -> Tensor:
    """`‖o − u‖² / w` [n]."""
    error = output - target
    return mean_square(error) / error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
