"""DiffusionNFT: Zheng et al., "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", 2025."""

from pydantic import Field
from torch import Tensor

from bench import Batch, Copy, Core, Needs, Noised, Strength, Trajectory, mean_square

from .forward_process import AdvantageConfig, AdvantageRegression


class NFTConfig(AdvantageConfig):
    """Options of DiffusionNFT; symbols as in its docstring."""

    mix: float = Field(1.0, gt=0, description="β: distance of o⁺ and o⁻ from o_old, as a multiple of the policy's")
    kl: float = Field(1e-4, ge=0, description="λ: weight of the distance to the prior")
    old_decay: float = Field(0.5, ge=0, le=1, description="largest decay of the old policy; it grows by .001 an update")
    fraction: float = Field(0.9, gt=0, le=1, description="noise levels per sample and update, over K")


class NFT(AdvantageRegression):
    """DiffusionNFT: regression on good samples and away from bad ones.

    With `r = (1 + clip(A, ±c)/c) / 2` and `o± = o_old ± β (o_θ − o_old)` the loss is

        c/β · [r ‖x̂⁺ − x‖² / w⁺ + (1 − r) ‖x̂⁻ − x‖² / w⁻] + λ ‖o_θ − o_#‖²

    where x̂± is the clean sample that o± means and `w± = mean |x̂± − x|`, without gradient and at least 1e-5. The
    samples are those of the old policy, `o_old ← d o_old + (1 − d) o_θ` after each round.

    Zheng et al., "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", 2025, with the weights and
    defaults of the authors' code: https://arxiv.org/abs/2509.16117
    """

    Config = NFTConfig
    needs = Needs(rewards=True, current=True)
    config: NFTConfig
    references = ("old", "prior")
    strength = Strength("method.kl", (1e-4, 0.1, 0.5, 2.5))

    def copies(self) -> dict[str, Copy]:
        """The old policy, which samples."""
        return {"old": Copy(lambda updates: min(0.001 * updates, self.config.old_decay), rounds=1)}

    def collect(self, core: Core, batch: Batch, number: int) -> Trajectory:
        """Samples of the old policy."""
        return core.rollout(batch, weights="old")

    def loss(
        self, core: Core, part: Noised, policy: Tensor, reference: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        c, beta, old = self.config.advantage_clip, self.config.mix, reference["old"]
        r = (1 + part.advantages) / 2
        positive = weighted_error(core, part, old + beta * (policy - old))
        negative = weighted_error(core, part, old - beta * (policy - old))
        contrast = c / beta * (r * positive + (1 - r) * negative)
        return contrast + self.config.kl * mean_square(policy - reference["prior"]), {}


def weighted_error(core: Core, part: Noised, output: Tensor) -> Tensor:
    """`‖x̂ − x‖² / w` [n], x̂ the clean sample that the output means."""
    error = core.kernel.clean(part.z, output, part.k) - part.clean
    return mean_square(error) / error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
