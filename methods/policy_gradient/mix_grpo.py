"""MixGRPO: policy gradient within groups, in a moving window of steps that alone have noise."""

import torch
from pydantic import Field
from torch import Tensor

from bench import Batch, Core, Deviation, Needs, Trajectory, Transitions

from .base import ONLY_STEP, Clip, GroupPolicyGradient, GroupPolicyGradientConfig, old_policy
from .surrogate import Surrogate, clipped, gaussian_log_ratio


class MixGRPOConfig(GroupPolicyGradientConfig):
    """Options of MixGRPO."""

    deviation: Deviation = Deviation(over="group", correction=1, epsilon=1e-8)
    clip: Clip = 1e-4
    train_last: bool = Field(False, description="whether the window may reach the last step")
    window: int = Field(4, ge=1, description="steps with noise; the others have none")
    window_rounds: int = Field(25, ge=1, description="rounds after which the window moves by a step")


class MixGRPO(GroupPolicyGradient):
    """MixGRPO: policy gradient within groups, in a moving window of steps; the other steps have no noise.

        ℓ_k = max(−A ρ_k, −A clip(ρ_k, 1 ± c)) for k in the window,   A = (r − mean of its group) / std of its group
        log ρ_k = (‖z_{k+1} − μ_old‖² − ‖z_{k+1} − μ_θ‖²) / 2σ_k²,   σ_k = 0 outside

    ‖·‖² is a mean over latent elements. The window begins with the first step, moves by one step in every
    `window_rounds` rounds, and after the end begins anew. Published sampler: rule `euler`, η = 0.7.

    Li et al., "MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE", 2025,
    https://arxiv.org/abs/2507.21802
    """

    Config = MixGRPOConfig
    needs = Needs(rewards=True, density=True, record=frozenset({"model_output"}))
    config: MixGRPOConfig

    def unfit(self, steps: int, group: int) -> str | None:
        """Where the last step is left out there must be another."""
        return ONLY_STEP if steps == 1 and not self.config.train_last else super().unfit(steps, group)

    def window(self, core: Core, number: int) -> tuple[int, int]:
        """The steps [first, end) with noise in round `number`."""
        count = core.kernel.steps if self.config.train_last else core.kernel.steps - 1
        width = min(self.config.window, count)
        first = number // self.config.window_rounds % (count - width + 1)
        return first, first + width

    def collect(self, core: Core, batch: Batch, number: int) -> Trajectory:
        """Trajectories with noise in this round's window alone."""
        return core.rollout(batch, record=self.needs.record, noisy=self.window(core, number))

    def steps(self, core: Core, data: Batch) -> Tensor:
        """All steps of the window: the one that the trajectories had, or the first round's before there are any."""
        if isinstance(data, Trajectory) and data.noisy is not None:
            return data.noisy.cpu()
        return torch.arange(*self.window(core, 0)).expand(len(data), -1)

    def surrogate(self, core: Core, part: Transitions, mean: Tensor) -> Surrogate:
        """ℓ_k [n]."""
        old_mean, std = old_policy(core, part)
        log_ratio = gaussian_log_ratio(part.z_next, mean, old_mean, std)
        return clipped(log_ratio, part.advantages, self.config.clip)
