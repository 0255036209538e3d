"""Tilt matching: Potaptchik et al., "Tilt Matching for Scalable Sampling and Fine-Tuning", 2025."""

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from bench import TILT, Batch, Copy, Core, Needs, Noised, Trajectory, group_tilt, mean_square

from .forward_process import Regression, RegressionConfig, by_row


class TiltMatchingConfig(RegressionConfig):
    """Options of tilt matching."""

    stages: int = Field(8, ge=1, description="how many tilts by exp(βr / stages) follow one another")
    stage_rounds: int | None = Field(None, ge=1, description="rounds of a stage; null: all are equal parts of the run")


class TiltMatching(Regression):
    """Tilt matching: regression in stages, each of which tilts the one before by exp(βr / stages).

    The loss is `‖o_θ − sg[o_old + R (u − o_θ)]‖²` on samples of o_old, where 1 + R is `exp(βr/stages)` over its mean
    for the prompt's other samples. o_old starts as the prior; after each stage but the last it becomes the policy.

    Where x has the law of o_old itself, a stage's fixed point is o_old tilted by `exp(βr/stages)`. Samples have that
    law up to the sampler's error, which enters again in every stage, so no target is declared.

    Potaptchik et al., "Tilt Matching for Scalable Sampling and Fine-Tuning", 2025: https://arxiv.org/abs/2512.21829
    """

    Config = TiltMatchingConfig
    config: TiltMatchingConfig
    needs = Needs(rewards=True, denoiser=True, current=True)
    references = ("old",)
    strength = TILT

    def copies(self) -> dict[str, Copy]:
        """The policy at the start of the stage."""
        return {"old": Copy(lambda updates: 0.0, self.config.stage_rounds, self.config.stages)}

    def unfit(self, steps: int, group: int) -> str | None:
        """In a group of one every weight is 1."""
        return "weights over a prompt's other samples need train.samples_per_prompt ≥ 2" if group < 2 else None

    def collect(self, core: Core, batch: Batch, number: int) -> Trajectory:
        """Samples of the policy at the start of the stage."""
        return core.rollout(batch, weights="old")

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Add R [B] to the round, as its advantages."""
        return replace(data, advantages=group_tilt(data.prompts, core.beta / self.config.stages * data.rewards) - 1)

    def loss(
        self, core: Core, part: Noised, policy: Tensor, reference: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        weight = by_row(part.advantages, policy)
        tilted = reference["old"] + weight * (part.target - policy)
        return mean_square(policy - tilted.detach()), {}
