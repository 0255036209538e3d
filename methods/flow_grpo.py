"""Policy gradient within groups, as it was published for flow models; it runs on diffusion too.

Flow-GRPO: Liu et al., 2025 (arXiv 2505.05470). FlowCPS: arXiv 2509.05952. DanceGRPO: Xue et al., 2025 (arXiv
2505.07818). MixGRPO, GRPO-Guard and Flow-DPPO: 2025.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bench import Batch, Config, Core, Deviation, Loss, Method, Needs, Trajectory, Transitions, group_advantages


class FlowGRPOConfig(Config):
    """Options of the family; densities are means over latent elements throughout."""

    deviation: Deviation = Deviation()
    advantage_clip: float | None = Field(5.0, gt=0, description="largest absolute advantage; null: any")
    surrogate: Literal["clip", "guard", "mask"] = Field("clip", description="see the class docstring")
    clip: float = Field(1e-4, gt=0, description="half-width of the ratio's clip range")
    threshold: float = Field(1e-5, gt=0, description="mask: τ")
    density: Literal["gaussian", "square"] = Field(
        "gaussian", description="square: leaves out 1/(2σ²), as FlowCPS does"
    )
    kl: float = Field(0.0, ge=0, description="weight of ‖μ_θ − μ_#‖², mean over elements, in units of kl_unit")
    kl_unit: Literal["step", "rate", "square"] = Field(
        "step", description="over 2σ²; that times the step's s − s' (Flow-GRPO's); or as it is (FlowCPS's)"
    )
    fraction: float = Field(1.0, gt=0, le=1, description="transitions used, over K")
    train_last: bool = Field(False, description="the published codes never train the last step")
    shared_start: bool = Field(False, description="one z_0 for all samples of a prompt (DanceGRPO)")
    window: int | None = Field(None, ge=1, description="MixGRPO: steps with noise; the others have none")
    window_rounds: int = Field(25, ge=1, description="MixGRPO: rounds after which the window moves by a step")


class FlowGRPO(Method):
    """Policy gradient with advantages A of a round's groups, `ρ = p_θ / p_old` per transition.

    - `clip`: `max(−A ρ, −A clip(ρ, 1 ± c))`.
    - `guard` (GRPO-Guard): `log ρ` is centred by `‖μ_θ − μ_old‖²/2σ²` and multiplied by σ, so that one clip range suits
      all steps; the loss is divided by the step's `s − s'`.
    - `mask` (Flow-DPPO): `−A ρ`, but nothing where `‖μ_θ − μ_old‖²/2σ² ≥ τ` and ρ has moved the way A asks for.

    Both policies' means come from recorded outputs, so that on-policy ρ is exactly 1. A KL term holds to the prior. The
    sampler is the setting's; published are the rule `euler` (`flow_grpo`, `mix_grpo`, `grpo_guard`, `flow_dppo`, η .7),
    `cps` (`flow_grpo_cps`, η .7) and `dance` (`dance_grpo`, η .3). Published guidance detaches its unconditional half;
    here it is the setting's, as for every method.
    """

    Config = FlowGRPOConfig
    needs = Needs(rewards=True, density=True, record=frozenset({"model_output"}))
    recipe = {"optimizer.lr": 3e-4, "optimizer.weight_decay": 1e-4}
    config: FlowGRPOConfig

    def noisy(self, core: Core, number: int) -> tuple[int, int] | None:
        """The window of steps with noise in round `number`, or None for all; behind the last it begins anew."""
        if self.config.window is None:
            return None
        count = core.kernel.steps - (not self.config.train_last)
        width = min(self.config.window, count)
        first = number // self.config.window_rounds % (count - width + 1)
        return first, first + width

    def collect(self, core: Core, batch: Batch, number: int) -> Trajectory:
        """Trajectories with noise in the window alone, from one start a prompt if so configured."""
        start = number if self.config.shared_start else None
        return core.rollout(batch, record=self.needs.record, noisy=self.noisy(core, number), shared_start=start)

    def normalises(self) -> bool:
        """Always."""
        return True

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Add clipped advantages [B] to the round."""
        advantages, limit = group_advantages(core, data, self.config.deviation), self.config.advantage_clip
        return replace(data, advantages=advantages if limit is None else advantages.clamp(-limit, limit))

    def steps(self, core: Core, data: Batch) -> Tensor:
        """The steps [B, S] that train: those of the window, or some of all."""
        if self.config.window is None:
            last = "always" if self.config.train_last else "never"
            return core.choose_steps(data, self.config.fraction, last=last)
        if getattr(data, "noisy", None) is not None:
            return data.noisy.cpu()
        return torch.arange(*self.noisy(core, 0)).expand(len(data), -1)

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over the transitions."""
        steps = self.steps(core, data)
        for part in data.transitions(steps, core.micro_batch):
            values, metrics = self.transition_losses(core, part)
            yield Loss(values / steps.shape[1], metrics)

    def transition_losses(self, core: Core, part: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each transition [n], and what is logged of it."""
        config, kernel, advantages = self.config, core.kernel, part.advantages
        mean = kernel.mean(part.z, core.predict(part.z, part.k, part.conditioning), part.k)
        old_mean = kernel.mean(part.z, part.model_output, part.k)
        std, drop = kernel.std(part.k, part.z), kernel.noise_decrease(part.k, part.z).flatten()
        unit = 2 * std.flatten() ** 2
        scale = unit if config.density == "gaussian" else torch.ones_like(unit)
        log_ratio = (_mean_square(part.z_next - old_mean) - _mean_square(part.z_next - mean)) / scale
        moved = _mean_square(mean - old_mean) / unit
        if config.surrogate == "guard":
            log_ratio = (log_ratio + moved) * std.flatten()
        ratio = torch.exp(log_ratio)
        if config.surrogate == "mask":
            away = (ratio.detach() - 1) * advantages > 0
            left_out = away & (moved.detach() >= config.threshold)
            losses = (-advantages * ratio).masked_fill(left_out, 0)
        else:
            left_out = (ratio.detach() - 1).abs() > config.clip
            clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
            losses = torch.maximum(-advantages * ratio, -advantages * clipped)
        if config.surrogate == "guard":
            losses = losses / drop
        metrics = {"clipped": left_out.float(), "log_ratio": log_ratio.detach()}
        if config.kl:
            prior_mean = kernel.mean(part.z, core.predict(part.z, part.k, part.conditioning, prior=True), part.k)
            kl = _mean_square(mean - prior_mean) / {"step": unit, "rate": unit / drop, "square": 1}[config.kl_unit]
            losses = losses + config.kl * kl
            metrics["kl"] = kl.detach()
        return losses, metrics


def _mean_square(x: Tensor) -> Tensor:
    return (x**2).flatten(1).mean(1)
