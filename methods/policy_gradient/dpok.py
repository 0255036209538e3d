"""DPOK: policy gradient of the reward minus the KL to the prior."""

from pydantic import Field
from torch import Tensor

from bench import TILT, Batch, Core, Needs, Trajectory, Transitions, gaussian_log_prob, group_baseline

from .base import AdvantageClip, Clip, KLWeight, PolicyGradient, PolicyGradientConfig
from .surrogate import Surrogate, clipped


class DPOKConfig(PolicyGradientConfig):
    """Options of DPOK. The clip range is one for ratios of whole densities, so it has PPO's size."""

    advantage_clip: AdvantageClip = None
    kl: KLWeight = 1.0
    clip: Clip = 0.2
    fraction: float = Field(1.0, ge=0, le=1, description="transitions besides the last (one at least), over K; 0: none")


class DPOK(PolicyGradient):
    """DPOK: policy gradient of βr minus the KL to the prior at the sampled states.

        ℓ_k = max(−A ρ_k, −A clip(ρ_k, 1 ± c)) + KL_k,   A = β (r − mean of the group's other rewards)
        log ρ_k = log p_θ(z_{k+1} | z_k) − log p_old(z_{k+1} | z_k),   KL_k = |μ_θ − μ_#|² / 2σ_k²

    Densities are whole ones, sums over latent elements. The gradient of the KL leaves out that the visited states
    depend on θ, so the optimum is in general not `p_# exp(βr)`. Published sampler: rule `ddim`, η = 1.

    Fan et al., "DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models", NeurIPS 2023,
    https://arxiv.org/abs/2305.16381
    """

    Config = DPOKConfig
    needs = Needs(rewards=True, density=True, record=frozenset({"log_prob"}))
    strength = TILT
    config: DPOKConfig

    def advantages(self, core: Core, data: Trajectory) -> Tensor:
        """A [B], with an unbiased baseline; 0 is the baseline of a prompt's only sample."""
        return core.beta * (data.rewards - group_baseline(data.prompts, data.rewards))

    def steps(self, core: Core, data: Batch) -> Tensor:
        """Random steps, and always the last."""
        return core.choose_steps(data, self.config.fraction)

    def surrogate(self, core: Core, part: Transitions, mean: Tensor) -> Surrogate:
        """ℓ_k [n] without its KL term."""
        log_prob = gaussian_log_prob(part.z_next, mean, core.kernel.std(part.k, part.z))
        return clipped(log_prob - part.log_prob, part.advantages, self.config.clip)

    def kl(self, core: Core, part: Transitions, mean: Tensor, prior_mean: Tensor) -> Tensor:
        """KL_k [n] in nats."""
        std = core.kernel.std(part.k, part.z)
        return ((mean - prior_mean) ** 2 / (2 * std**2)).flatten(1).sum(1)
