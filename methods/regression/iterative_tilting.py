"""Iterative tilting: tilt matching to first order, "Iterative Tilting for Diffusion Fine-Tuning", 2025."""

from dataclasses import replace

from bench import Core, Trajectory, group_baseline

from .tilt_matching import TiltMatching


class IterativeTilting(TiltMatching):
    """Iterative tilting: regression in many stages, each of which tilts the one before by 1 + βr / stages.

    The loss is tilt matching's, `‖o_θ − sg[o_old + R (u − o_θ)]‖²` on samples of o_old, with `R = δ (r − c)`, where
    `δ = β / stages` and c is the mean reward of the prompt's other samples. A stage's fixed point is `E[(1 + R) u | z]
    / E[1 + R | z]`, which tilts by exp(δr) up to an error of order δ²: after all stages the error is of order β δ.

    "Iterative Tilting for Diffusion Fine-Tuning", 2025: https://arxiv.org/abs/2512.03234
    """

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Add R [B] to the round, as its advantages."""
        excess = data.rewards - group_baseline(data.prompts, data.rewards)
        return replace(data, advantages=core.beta / self.config.stages * excess)
