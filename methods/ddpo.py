"""Policy gradient on the denoising chain.

DDPO: Black et al., "Training Diffusion Models with Reinforcement Learning", ICLR 2024. GRPO: Shao et al., 2024, on
diffusion by Xue et al. (DanceGRPO) and Liu et al. (Flow-GRPO), 2025. DPOK: Fan et al., NeurIPS 2023.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from bench import (
    Config,
    Core,
    Deviation,
    Loss,
    Method,
    Needs,
    PromptStatistics,
    Trajectory,
    gaussian_log_prob,
    group_advantages,
    group_baseline,
)


class DDPOConfig(Config):
    """Options of the policy gradient. The clip range refers to log-probabilities under `reduction`."""

    clip: float = Field(1e-4, gt=0, description="half-width of the ratio's clip range")
    reduction: Literal["mean", "sum"] = Field("mean", description="of log-probabilities over latent elements")
    advantage: Literal["buffer", "group", "reward"] = Field(
        "buffer",
        description="rewards normalised over a prompt's running buffer or its group; or β(r − the others' mean)",
    )
    deviation: Deviation = Deviation()
    advantage_clip: float | None = Field(5.0, gt=0, description="largest absolute advantage; null: any")
    kl: float = Field(0.0, ge=0, description="weight of the divergence from the prior, under `reduction`")
    fraction: float = Field(1.0, ge=0, le=1, description="transitions besides the last (one at least), over K; 0: none")
    buffer: int = Field(32, ge=2, description="rewards kept per prompt")
    minimum: int = Field(16, ge=2, description="entries below which batch statistics stand in")


class DDPO(Method):
    """Clipped importance-weighted policy gradient: `max(−A ρ, −A clip(ρ, 1 ± c))`, `ρ = p_θ / p_old` per transition.

    - `ddpo`: A is the reward normalised per prompt over a running buffer; β is not used, the reward is maximised.
    - `grpo`: A is normalised within the group of one round's samples of a prompt; a KL term is an option.
    - `dpok`: `A = β (r − the group's other rewards' mean)`, densities summed, plus `‖μ_θ−μ_#‖²/2σ_k²` at the sampled
      states. The state distribution's own part of the KL gradient is dropped, so the optimum is in general not `p*`.
    """

    Config = DDPOConfig
    needs = Needs(rewards=True, density=True, record=frozenset({"log_prob"}))
    recipe = {"optimizer.lr": 3e-4, "optimizer.weight_decay": 1e-4}
    config: DDPOConfig

    def __init__(self, config: DDPOConfig):
        super().__init__(config)
        self.statistics = PromptStatistics(config.buffer, config.minimum)

    def normalises(self) -> bool:
        """Within a group, but not over a buffer."""
        return self.config.advantage == "group"

    def unfit(self, steps: int, group: int) -> str | None:
        """A group of one has no deviation: every advantage is 0."""
        alone = self.config.advantage == "group" and group < 2
        return "advantages within a prompt's group need train.samples_per_prompt ≥ 2" if alone else None

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Add clipped advantages [B] to the round."""
        prompts, rewards, limit = data.prompts, data.rewards, self.config.advantage_clip
        match self.config.advantage:
            case "buffer":
                advantages = self.statistics.advantages(prompts, rewards)
            case "group":
                advantages = group_advantages(core, data, self.config.deviation)
            case "reward":
                advantages = core.beta * (rewards - group_baseline(prompts, rewards))
        return replace(data, advantages=advantages if limit is None else advantages.clamp(-limit, limit))

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over the transitions."""
        clip = self.config.clip
        scale = data.latents[0, 0].numel() if self.config.reduction == "mean" else 1
        steps = core.choose_steps(data, self.config.fraction)
        for part in data.transitions(steps, core.micro_batch):
            output = core.predict(part.z, part.k, part.conditioning)
            mean, std = core.kernel.mean(part.z, output, part.k), core.kernel.std(part.k, part.z)
            log_ratio = (gaussian_log_prob(part.z_next, mean, std) - part.log_prob) / scale
            ratio = torch.exp(log_ratio)
            loss = -torch.minimum(part.advantages * ratio, part.advantages * ratio.clamp(1 - clip, 1 + clip))
            clipped = ((ratio.detach() - 1).abs() > clip).float()
            metrics = {"clipped": clipped, "log_ratio": log_ratio.detach()}
            if self.config.kl:
                prior_mean = core.kernel.mean(
                    part.z, core.predict(part.z, part.k, part.conditioning, prior=True), part.k
                )
                kl = ((mean - prior_mean) ** 2 / (2 * std**2)).flatten(1).sum(1) / scale
                loss = loss + self.config.kl * kl
                metrics["kl"] = kl.detach()
            yield Loss(loss / steps.shape[1], metrics)

    def state_dict(self) -> dict[str, Any]:
        """The reward buffers."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the reward buffers."""
        self.statistics.load_state_dict(state)
