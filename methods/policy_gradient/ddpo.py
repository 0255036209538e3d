"""DDPO: policy gradient with the running statistics of each prompt's rewards."""

from typing import Any

from pydantic import Field, model_validator
from torch import Tensor

from bench import Batch, Core, Needs, PromptStatistics, Trajectory, Transitions

from .base import Clip, PolicyGradient, PolicyGradientConfig, mean_log_ratio
from .surrogate import Surrogate, clipped


class DDPOConfig(PolicyGradientConfig):
    """Options of DDPO."""

    clip: Clip = 1e-4
    fraction: float = Field(1.0, ge=0, le=1, description="transitions besides the last (one at least), over K; 0: none")
    buffer: int = Field(32, ge=2, description="rewards kept per prompt")
    minimum: int = Field(16, ge=2, description="entries below which batch statistics stand in")

    @model_validator(mode="after")
    def _the_buffer_holds_enough(self) -> "DDPOConfig":
        if self.minimum > self.buffer:
            raise ValueError(f"minimum = {self.minimum} entries never fit into buffer = {self.buffer}")
        return self


class DDPO(PolicyGradient):
    """DDPO: clipped policy gradient, with each prompt's rewards normalised by their running statistics.

        ℓ_k = max(−A ρ_k, −A clip(ρ_k, 1 ± c)),   A = (r − mean_c) / std_c
        log ρ_k = (log p_θ(z_{k+1} | z_k) − log p_old(z_{k+1} | z_k)) / d

    d is the number of latent elements: the published code averages log-densities, and its clip range of 1e-4 refers to
    that average. mean_c and std_c are those of the last rewards of the prompt c. β is not used: DDPO maximises the
    reward. The published method has no KL term; here it is an option. Published sampler: rule `ddim`, η = 1.

    Black et al., "Training Diffusion Models with Reinforcement Learning", ICLR 2024, https://arxiv.org/abs/2305.13301
    """

    Config = DDPOConfig
    needs = Needs(rewards=True, density=True, record=frozenset({"log_prob"}))
    config: DDPOConfig

    def __init__(self, config: DDPOConfig):
        super().__init__(config)
        self.statistics = PromptStatistics(config.buffer, config.minimum)

    def advantages(self, core: Core, data: Trajectory) -> Tensor:
        """A [B], by the running statistics with this round's rewards added."""
        return self.statistics.advantages(data.prompts, data.rewards)

    def steps(self, core: Core, data: Batch) -> Tensor:
        """Random steps, and always the last."""
        return core.choose_steps(data, self.config.fraction)

    def surrogate(self, core: Core, part: Transitions, mean: Tensor) -> Surrogate:
        """ℓ_k [n]."""
        return clipped(mean_log_ratio(core, part, mean), part.advantages, self.config.clip)

    def state_dict(self) -> dict[str, Any]:
        """The reward buffers."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the reward buffers."""
        self.statistics.load_state_dict(state)
