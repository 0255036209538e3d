"""FlowCPS: Flow-GRPO with squared distances in the place of log-densities."""

from torch import Tensor

from bench import Core, Deviation, Transitions, mean_square

from .base import Clip, FlowPolicyGradient, FlowPolicyGradientConfig, KLWeight, old_policy
from .surrogate import Surrogate, clipped


class FlowCPSConfig(FlowPolicyGradientConfig):
    """Options of FlowCPS."""

    deviation: Deviation = Deviation(over="round", epsilon=1e-4)
    kl: KLWeight = 0.004
    clip: Clip = 1e-4


class FlowCPS(FlowPolicyGradient):
    """FlowCPS: Flow-GRPO with squared distances in the place of log-densities.

        ℓ_k = max(−A ρ_k, −A clip(ρ_k, 1 ± c)) + w ‖μ_θ − μ_#‖²,   A = (r − mean of its group) / std of the round
        log ρ_k = ‖z_{k+1} − μ_old‖² − ‖z_{k+1} − μ_θ‖²

    ‖·‖² is a mean over latent elements. Without the densities' factor 1/2σ² a step counts by how far its mean moves,
    not by how far in standard deviations. Published sampler: rule `cps`, η = 0.7.

    Wang and Yu, "Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching", 2025,
    https://arxiv.org/abs/2509.05952
    """

    Config = FlowCPSConfig
    config: FlowCPSConfig

    def surrogate(self, core: Core, part: Transitions, mean: Tensor) -> Surrogate:
        """ℓ_k [n] without its distance to the prior."""
        old_mean, _ = old_policy(core, part)
        log_ratio = mean_square(part.z_next - old_mean) - mean_square(part.z_next - mean)
        return clipped(log_ratio, part.advantages, self.config.clip)

    def kl(self, core: Core, part: Transitions, mean: Tensor, prior_mean: Tensor) -> Tensor:
        """`‖μ_θ − μ_#‖²` [n]."""
        return mean_square(mean - prior_mean)
