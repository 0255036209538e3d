"""RAM: "Reinforce Adjoint Matching: Scaling RL Post-Training of Diffusion and Flow-Matching Models", 2026."""

from dataclasses import replace

from torch import Tensor

from bench import TILT, Core, Noised, Trajectory, group_baseline, mean_square

from .forward_process import Regression, by_row


class RAM(Regression):
    """RAM: regression on the prior's output, corrected by β times the reward above the group's mean.

    The loss is `‖o_θ − sg[o_# + R (u − o_θ)]‖²` with `R = β (r − the mean reward of the prompt's other samples)`. Its
    fixed point is the prior tilted by `exp(βr)` to first order in R alone, so no target is declared.

    Bergmeister et al., "Reinforce Adjoint Matching: Scaling RL Post-Training of Diffusion and Flow-Matching Models",
    2026: https://arxiv.org/abs/2605.10759
    """

    references = ("prior",)
    strength = TILT

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Add R [B] to the round, as its advantages."""
        return replace(data, advantages=core.beta * (data.rewards - group_baseline(data.prompts, data.rewards)))

    def loss(
        self, core: Core, part: Noised, policy: Tensor, reference: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        weight = by_row(part.advantages, policy)
        corrected = reference["prior"] + weight * (part.target - policy)
        return mean_square(policy - corrected.detach()), {}
