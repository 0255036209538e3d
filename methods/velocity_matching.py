"""Regression on the forward process: finished samples are noised again, and the network learns from them by reward.

NFT: Zheng et al., "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", 2025 (arXiv 2509.16117). AWM:
advantage weighted matching, 2025 (arXiv 2509.25050). RAM: Reinforce Adjoint Matching (arXiv 2605.10759). RVM:
reward-based velocity matching (arXiv 2608.23664). Tilt matching: arXiv 2512.21829.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bench import (
    Batch,
    Config,
    Copy,
    Core,
    Deviation,
    Loss,
    Method,
    Needs,
    Noised,
    Trajectory,
    group_advantages,
    group_baseline,
    group_tilt,
)

ZERO = 1e-10  # keeps AWM's power finite


class VelocityMatchingConfig(Config):
    """Options of regression on the forward process; symbols as in the class docstring."""

    advantage: Literal["normalised", "reward", "tilt"] = Field(
        "normalised",
        description="A: rewards centred by prompt, over a deviation; β(r − the others' mean); e^{βr/stages}/mean − 1",
    )
    deviation: Deviation = Deviation()
    advantage_clip: float | None = Field(5.0, gt=0, description="largest absolute advantage; null: any")
    scale: float = Field(0.2, gt=0, description="factor of the clipped advantage")
    residual: Literal["policy", "old"] = Field("policy", description="whose o_res")
    anchors: dict[Literal["prior", "old", "ema"], float] = Field({"prior": 1.0}, description="b by what o_θ is held to")
    weight: Literal["none", "clean", "likelihood"] = Field("none", description="see the class docstring")
    factor: float = Field(1.0, gt=0, description="c, of means of squares over elements")
    power: float = Field(0.25, gt=0, le=1, description="likelihood: p")
    ratio_clip: float = Field(1.0, gt=0, description="likelihood: half-width of the ratio's clip range")
    fraction: float = Field(0.3, gt=0, le=1, description="times a sample, over K")
    sampler: Literal["policy", "old"] = Field("policy", description="whose samples")
    old_decay: float = Field(0.0, ge=0, le=1, description="largest decay of 'old'; it grows by .001 an update")
    ema_decay: float = Field(0.3, ge=0, le=1, description="largest decay of 'ema', likewise")
    stages: int = Field(1, ge=1, description="tilt: how many tilts by e^{βr/stages} follow one another")
    stage_rounds: int = Field(20, ge=1, description="tilt: rounds of a stage")


class VelocityMatching(Method):
    """The gradient `c [A (o_res − u) + Σ_j b_j (o_θ − o_j)]` in the network's output o at `z = αx + sε`.

    x is a finished sample, u what the network should say of it (ε, `αε − sx` or `ε − x`), A its advantage, and o_j the
    prior, the policy of the last round (`old`) or an average of its past (`ema`). The loss that is logged is the mean
    square of the bracket. Samples may come from any sampler, one without noise too.

    - `nft`: `o_res = o_old`, held to `o_old`; with `weight: clean` the parts of `r = (1+A)/2` and `1 − r` are divided
      by the mean error `|x̂ − x|` of `o_old ± b (o_θ − o_old)`, and errors are those of x̂.
    - `awm`: `weight: likelihood` multiplies A by the gradient of `−(s/p) (‖o_θ − u‖² + 1e-10)^p` (a mean over elements)
      and by its clipped ratio to the old policy's likelihood.
    - `ram`: `A = β (r − the others' mean)`, the prior's tilt to first order in A.
    - `rvm`: normalised advantages, held to the prior.
    - `tilt_matching`: `1 + A = e^{βr/stages} / mean` of samples of `o_old`, which it is held to and which follows at
      the end of each stage but the last. A stage's fixed point is `o_old` tilted by `e^{βr/stages}` where x has the law
      of `o_old` itself. The samples have it up to the sampler's error, which counts again in every stage, so no target
      is declared.
    """

    Config = VelocityMatchingConfig
    needs = Needs(rewards=True)
    recipe = {"optimizer.lr": 3e-4, "optimizer.weight_decay": 1e-4}
    config: VelocityMatchingConfig

    def copies(self) -> dict[str, Copy]:
        """Those that the gradient names."""
        config, found = self.config, {}
        if "old" in config.anchors or "old" in (config.residual, config.sampler) or config.weight == "likelihood":
            staged = config.advantage == "tilt"
            rounds = config.stage_rounds if staged else 1
            until = (config.stages - 1) * rounds if staged else None
            found["old"] = Copy(lambda n: min(0.001 * n, config.old_decay), rounds, until)
        if "ema" in config.anchors:
            found["ema"] = Copy(lambda n: min(0.001 * n, config.ema_decay))
        return found

    def collect(self, core: Core, batch: Batch, number: int) -> Trajectory:
        """Samples of the policy, or of its copy `old`."""
        return core.rollout(batch, weights="old" if self.config.sampler == "old" else None)

    def normalises(self) -> bool:
        """Those of normalised advantages."""
        return self.config.advantage == "normalised"

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Add clipped and scaled advantages [B] to the round."""
        config = self.config
        match config.advantage:
            case "normalised":
                advantages = group_advantages(core, data, config.deviation)
            case "reward":
                advantages = core.beta * (data.rewards - group_baseline(data.prompts, data.rewards))
            case "tilt":
                advantages = group_tilt(data.prompts, core.beta / config.stages * data.rewards) - 1
        if config.advantage_clip:
            advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
        return replace(data, advantages=config.scale * advantages)

    def steps(self, core: Core, data: Batch) -> Tensor:
        """The times [B, S] that samples are noised to, of those of the sampler."""
        return core.choose_steps(data, self.config.fraction, last="like any")

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over the samples, noised to some of the sampler's times."""
        steps = self.steps(core, data)
        for part in core.diffused(data, steps, core.micro_batch):
            output = core.predict(part.z, part.k, part.conditioning)
            others = {name: self.other(core, part, name) for name in {*self.config.anchors, *self.copies()}}
            gradient, metrics = self.gradient(core, part, output.detach(), others)
            # twice the gradient in o_θ, to the last digit, and the mean square as the value
            values = (gradient.square() + 2 * gradient * (output - output.detach())).flatten(1).mean(1)
            yield Loss(self.config.factor * values / steps.shape[1], metrics)

    def other(self, core: Core, part: Noised, name: str) -> Tensor:
        """The prediction of the prior or of a copy [n, *latent]."""
        prior = name == "prior"
        return core.predict(part.z, part.k, part.conditioning, prior=prior, weights=None if prior else name)

    def gradient(
        self, core: Core, part: Noised, output: Tensor, others: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The bracket of the class docstring [n, *latent], and what is logged of it [n]."""
        config, strength, metrics = self.config, part.advantages, {}
        held = dict.fromkeys(config.anchors, torch.ones_like(strength))
        if config.weight == "clean":
            better, worse = self.clean_weights(core, part, output, others["old"])
            strength, held["old"] = better - worse, better + worse
        elif config.weight == "likelihood":
            factor, ratio = self.likelihood(core, part, output, others["old"])
            strength, metrics["ratio"] = strength * factor, ratio
        bracket = _rows(strength, output) * ((output if config.residual == "policy" else others["old"]) - part.target)
        for name, weight in config.anchors.items():
            bracket = bracket + weight * _rows(held[name], output) * (output - others[name])
            metrics[f"distance/{name}"] = _mean_square(output - others[name])
        return bracket, metrics

    def clean_weights(self, core: Core, part: Noised, output: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """`r/w⁺` and `(1−r)/w⁻` [n] in units of the output, `w± = mean |x̂± − x|`, at least 1e-5."""
        slope = core.kernel.clean(torch.zeros_like(part.z), torch.ones_like(part.z), part.k)  # ∂x̂/∂o, equal over a row
        step = self.config.anchors["old"] * (output - old)
        share = (1 + part.advantages) / 2
        ahead, behind = (
            (slope * (old + sign * step - part.target)).abs().flatten(1).mean(1).clamp(min=1e-5) for sign in (1, -1)
        )
        square = _mean_square(slope)
        return square * share / ahead, square * (1 - share) / behind

    def likelihood(self, core: Core, part: Noised, output: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies A [n]: `ρ s (ℓ + 1e-10)^{p−1}`, 0 where the ratio is clipped; and the ratio ρ [n]."""
        power, level = self.config.power, core.kernel.noise_level(part.k, part.z).expand_as(part.z).flatten(1)[:, 0]
        errors = [_mean_square(prediction - part.target) + ZERO for prediction in (output, old)]
        now, before = (-level / power * error**power for error in errors)
        ratio = torch.exp(now - before)
        beyond = (ratio - 1) * part.advantages.sign() > self.config.ratio_clip
        return (ratio * level * errors[0] ** (power - 1)).masked_fill(beyond, 0), ratio


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.ndim - 1))


def _mean_square(x: Tensor) -> Tensor:
    return (x**2).flatten(1).mean(1)
