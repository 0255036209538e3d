"""GRPO-Guard: Flow-GRPO with ratios that suit one clip range at every step."""

from torch import Tensor

from bench import Core, Deviation, Transitions

from .base import Clip, FlowPolicyGradient, FlowPolicyGradientConfig, old_policy
from .surrogate import Surrogate, gaussian_kl, gaussian_log_ratio, guarded


class GRPOGuardConfig(FlowPolicyGradientConfig):
    """Options of GRPO-Guard."""

    deviation: Deviation = Deviation(over="round", epsilon=1e-4)
    clip: Clip = 2e-6


class GRPOGuard(FlowPolicyGradient):
    """GRPO-Guard: Flow-GRPO with ratios normalised so that one clip range suits every step.

        ℓ_k = max(−A ρ̃_k, −A clip(ρ̃_k, 1 ± c)) / (s_k − s_{k+1}),   log ρ̃_k = σ_k (log ρ_k + ‖μ_θ − μ_old‖² / 2σ_k²)
        log ρ_k = (‖z_{k+1} − μ_old‖² − ‖z_{k+1} − μ_θ‖²) / 2σ_k²,   A = (r − mean of its group) / std of the round

    ‖·‖² is a mean over latent elements. At samples of the old policy log ρ̃ has mean 0, and the same spread at every
    step for the same move of the mean; the factor 1/(s_k − s_{k+1}) evens out the steps' gradients. Published sampler:
    rule `euler`, η = 0.7.

    Wang et al., "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping", 2025,
    https://arxiv.org/abs/2510.22319
    """

    Config = GRPOGuardConfig
    config: GRPOGuardConfig

    def surrogate(self, core: Core, part: Transitions, mean: Tensor) -> Surrogate:
        """ℓ_k [n]."""
        old_mean, std = old_policy(core, part)
        log_ratio = gaussian_log_ratio(part.z_next, mean, old_mean, std)
        kl_old = gaussian_kl(mean, old_mean, std)
        noise_decrease = core.kernel.noise_decrease(part.k, part.z).flatten()
        return guarded(log_ratio, kl_old, std, noise_decrease, part.advantages, self.config.clip)
