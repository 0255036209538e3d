"""DanceGRPO: policy gradient within groups whose samples start from one noise."""

from torch import Tensor

from bench import Batch, Core, Deviation, Trajectory, Transitions

from .base import Clip, FlowPolicyGradient, FlowPolicyGradientConfig, old_policy
from .surrogate import Surrogate, clipped, gaussian_log_ratio


class DanceGRPOConfig(FlowPolicyGradientConfig):
    """Options of DanceGRPO."""

    deviation: Deviation = Deviation(over="group", correction=1, epsilon=1e-8)
    clip: Clip = 1e-4


class DanceGRPO(FlowPolicyGradient):
    """DanceGRPO: policy gradient within groups; all samples of a group start from the same noise.

        ℓ_k = max(−A ρ_k, −A clip(ρ_k, 1 ± c)),   A = (r − mean of its group) / std of its group
        log ρ_k = (‖z_{k+1} − μ_old‖² − ‖z_{k+1} − μ_θ‖²) / 2σ_k²,   z_0 the same for the whole group

    ‖·‖² is a mean over latent elements. Published sampler: rule `dance`, η = 0.3.

    Xue et al., "DanceGRPO: Unleashing GRPO on Visual Generation", 2025, https://arxiv.org/abs/2505.07818
    """

    Config = DanceGRPOConfig
    config: DanceGRPOConfig

    def collect(self, core: Core, batch: Batch, number: int) -> Trajectory:
        """Trajectories that start from one z_0 for each prompt, a new one in every round."""
        start = [(prompt, -1 - number) for prompt in batch.prompts]
        return core.rollout(batch, record=self.needs.record, start=start)

    def surrogate(self, core: Core, part: Transitions, mean: Tensor) -> Surrogate:
        """ℓ_k [n]."""
        old_mean, std = old_policy(core, part)
        log_ratio = gaussian_log_ratio(part.z_next, mean, old_mean, std)
        return clipped(log_ratio, part.advantages, self.config.clip)
