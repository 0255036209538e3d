"""Flow-DPPO: Flow-GRPO with a bound on the divergence in the place of the clip."""

from pydantic import Field
from torch import Tensor

from bench import Core, Deviation, Transitions

from .base import AdvantageClip, FlowPolicyGradient, FlowPolicyGradientConfig, old_policy
from .surrogate import Surrogate, gaussian_kl, gaussian_log_ratio, masked


class FlowDPPOConfig(FlowPolicyGradientConfig):
    """Options of Flow-DPPO."""

    deviation: Deviation = Deviation(over="round", epsilon=1e-4)
    advantage_clip: AdvantageClip = None
    threshold: float = Field(1e-5, gt=0, description="τ: divergence from which a step may move no further away")


class FlowDPPO(FlowPolicyGradient):
    """Flow-DPPO: Flow-GRPO with a mask by the policies' divergence in the place of the clip.

        ℓ_k = −A ρ_k,  but 0 where  ‖μ_θ − μ_old‖² / 2σ_k² ≥ τ  and  A (ρ_k − 1) > 0
        log ρ_k = (‖z_{k+1} − μ_old‖² − ‖z_{k+1} − μ_θ‖²) / 2σ_k²,   A = (r − mean of its group) / std of the round

    ‖·‖² is a mean over latent elements. Published sampler: rule `euler`, η = 0.7.

    Ping et al., "Flow-DPPO: Divergence Proximal Policy Optimization for Flow Matching Models", 2026,
    https://arxiv.org/abs/2606.11025
    """

    Config = FlowDPPOConfig
    config: FlowDPPOConfig

    def surrogate(self, core: Core, part: Transitions, mean: Tensor) -> Surrogate:
        """ℓ_k [n]."""
        old_mean, std = old_policy(core, part)
        log_ratio = gaussian_log_ratio(part.z_next, mean, old_mean, std)
        kl_old = gaussian_kl(mean, old_mean, std)
        return masked(log_ratio, kl_old, part.advantages, self.config.threshold)
