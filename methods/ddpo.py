"""DDPO: policy gradient on the denoising chain (Black et al., "Training Diffusion Models with Reinforcement Learning",
ICLR 2024)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from bench import Config, Core, Loss, Method, Needs, PromptStatistics, Trajectory, gaussian_log_prob


class DDPOConfig(Config):
    """Options of DDPO. The clip range refers to log-probabilities under `reduction`."""

    clip: float = Field(1e-4, gt=0, description="half-width of the ratio's clip range")
    reduction: Literal["mean", "sum"] = Field("mean", description="of log-probabilities over latent elements")
    advantage_clip: float = Field(5.0, gt=0, description="largest absolute advantage")
    fraction: float = Field(1.0, ge=0, le=1, description="transitions used, besides the last one, over K")
    buffer: int = Field(32, ge=2, description="rewards kept per prompt")
    minimum: int = Field(16, ge=2, description="entries below which batch statistics stand in")


class DDPO(Method):
    """Clipped importance-weighted policy gradient: `max(−A ρ, −A clip(ρ, 1 ± c))`, `ρ = p_θ / p_old` per transition.

    Advantages are rewards normalised per prompt over a running buffer. β is not used: the reward is maximised.
    """

    Config = DDPOConfig
    needs = Needs(rewards=True, density=True, record=frozenset({"log_prob"}))
    recipe = {"optimizer.lr": 3e-4, "optimizer.weight_decay": 1e-4}
    config: DDPOConfig

    def __init__(self, config: DDPOConfig):
        super().__init__(config)
        self.statistics = PromptStatistics(config.buffer, config.minimum)

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Add clipped advantages [B] to the round."""
        limit = self.config.advantage_clip
        return replace(data, advantages=self.statistics.advantages(data.prompts, data.rewards).clamp(-limit, limit))

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over the transitions."""
        clip = self.config.clip
        scale = data.latents[0, 0].numel() if self.config.reduction == "mean" else 1
        steps = core.choose_steps(data, self.config.fraction)
        for part in data.transitions(steps, core.micro_batch):
            eps = core.predict(part.z, part.k, part.conditioning)
            mean, std = core.kernel.mean(part.z, eps, part.k), core.kernel.std(part.k, part.z)
            log_ratio = (gaussian_log_prob(part.z_next, mean, std) - part.log_prob) / scale
            ratio = torch.exp(log_ratio)
            loss = -torch.minimum(part.advantages * ratio, part.advantages * ratio.clamp(1 - clip, 1 + clip))
            clipped = ((ratio.detach() - 1).abs() > clip).float()
            yield Loss(loss / steps.shape[1], {"clipped": clipped, "log_ratio": log_ratio.detach()})

    def state_dict(self) -> dict[str, Any]:
        """The reward buffers."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the reward buffers."""
        self.statistics.load_state_dict(state)
