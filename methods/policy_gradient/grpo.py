"""GRPO: policy gradient with rewards normalised within a prompt's group."""

from pydantic import Field
from torch import Tensor

from bench import Batch, Core, Needs, Transitions

from .base import Clip, GroupPolicyGradient, GroupPolicyGradientConfig, mean_log_ratio
from .surrogate import Surrogate, clipped


class GRPOConfig(GroupPolicyGradientConfig):
    """Options of GRPO."""

    clip: Clip = 1e-4
    fraction: float = Field(0.5, ge=0, le=1, description="transitions besides the last (one at least), over K; 0: none")


class GRPO(GroupPolicyGradient):
    """GRPO: clipped policy gradient, with rewards normalised within a prompt's group.

        ℓ_k = max(−A ρ_k, −A clip(ρ_k, 1 ± c)) + w KL_k,   A = (r − mean of its group) / std of its group
        log ρ_k = (log p_θ(z_{k+1} | z_k) − log p_old(z_{k+1} | z_k)) / d,   KL_k = |μ_θ − μ_#|² / (2 σ_k² d)

    A group is one round's samples of a prompt, d the number of latent elements, w 0 unless it is set. This is the
    method of language models on a sampling chain, with DDPO's densities; any sampler with noise in every step will do.

    Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", 2024,
    https://arxiv.org/abs/2402.03300
    """

    Config = GRPOConfig
    needs = Needs(rewards=True, density=True, record=frozenset({"log_prob"}))
    config: GRPOConfig

    def steps(self, core: Core, data: Batch) -> Tensor:
        """Random steps, and always the last."""
        return core.choose_steps(data, self.config.fraction)

    def surrogate(self, core: Core, part: Transitions, mean: Tensor) -> Surrogate:
        """ℓ_k [n] without its KL term."""
        return clipped(mean_log_ratio(core, part, mean), part.advantages, self.config.clip)
