"""RVM: reward-based velocity matching, 2026."""

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from bench import Core, Noised, Strength, Trajectory, mean_square

from .forward_process import AdvantageConfig, AdvantageRegression, by_row, clipped_advantages


class RVMConfig(AdvantageConfig):
    """Options of RVM; symbols as in its docstring."""

    scale: float = Field(0.1, gt=0, description="factor of the clipped advantage")
    kl: float = Field(0.1, ge=0, description="λ: weight of the distance to the prior")


class RVM(AdvantageRegression):
    """RVM: a step towards good samples and away from bad ones, kept near the prior.

    The loss is `½ ‖o_θ − sg[o_θ − g]‖²`, whose gradient in o_θ is `g = A (o_θ − u) + λ (o_θ − o_#)`, with the advantage
    `A = scale · clip(·, ±c)`.

    "Reward-based velocity matching", 2026: https://arxiv.org/abs/2608.23664
    """

    Config = RVMConfig
    config: RVMConfig
    references = ("prior",)
    strength = Strength("method.kl", (0.004, 0.02, 0.1, 0.5))

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Add A [B] to the round."""
        return replace(data, advantages=self.config.scale * clipped_advantages(core, data, self.config))

    def loss(
        self, core: Core, part: Noised, policy: Tensor, reference: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        advantage = by_row(part.advantages, policy)
        g = advantage * (policy - part.target) + self.config.kl * (policy - reference["prior"])
        return mean_square(policy - (policy - g).detach()) / 2, {}
