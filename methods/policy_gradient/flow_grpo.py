"""Flow-GRPO: policy gradient within groups, with the KL to the prior by the rate of the sampler's noise."""

from torch import Tensor

from bench import Core, Deviation, Strength, Transitions

from .base import Clip, FlowPolicyGradient, FlowPolicyGradientConfig, KLWeight, kl_by_rate, old_policy
from .surrogate import Surrogate, clipped, gaussian_log_ratio


class FlowGRPOConfig(FlowPolicyGradientConfig):
    """Options of Flow-GRPO."""

    deviation: Deviation = Deviation(over="round", epsilon=1e-4)
    kl: KLWeight = 0.04
    clip: Clip = 1e-4


class FlowGRPO(FlowPolicyGradient):
    """Flow-GRPO: policy gradient within groups, with a KL to the prior by the noise's rate; evaluates an average.

        ℓ_k = max(−A ρ_k, −A clip(ρ_k, 1 ± c)) + w KL_k,   A = (r − mean of its group) / std of the round
        log ρ_k = (‖z_{k+1} − μ_old‖² − ‖z_{k+1} − μ_θ‖²) / 2σ_k²,   KL_k = ‖μ_θ − μ_#‖² / 2g_k²

    ‖·‖² is a mean over latent elements, and `g_k² = σ_k² / (s_k − s_{k+1})` the rate at which the sampler adds noise.
    Evaluated are exponential averages of the adapters, over every update (in the published code over every eighth).
    Published sampler: rule `euler`, η = 0.7.

    Liu et al., "Flow-GRPO: Training Flow Matching Models via Online RL", 2025, https://arxiv.org/abs/2505.05470
    """

    Config = FlowGRPOConfig
    recipe = FlowPolicyGradient.recipe | {"train.ema": 0.9, "evaluation.weights": "ema"}
    strength = Strength("method.kl", (0.04, 0.8, 4.0, 20.0))  # of the noise's rate, which is that of about 20 steps
    config: FlowGRPOConfig

    def surrogate(self, core: Core, part: Transitions, mean: Tensor) -> Surrogate:
        """ℓ_k [n] without its KL term."""
        old_mean, std = old_policy(core, part)
        log_ratio = gaussian_log_ratio(part.z_next, mean, old_mean, std)
        return clipped(log_ratio, part.advantages, self.config.clip)

    def kl(self, core: Core, part: Transitions, mean: Tensor, prior_mean: Tensor) -> Tensor:
        """KL_k [n]."""
        return kl_by_rate(core, part, mean, prior_mean)
