"""Feynman–Kac steering: particles of the prior, redrawn by their rewards while they are sampled."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bench import Batch, Config, Core, Loss, Method, Needs, Trajectory
from bench.errors import BenchError

from .best_of_n import gumbel


class FKSteeringConfig(Config):
    """Options of Feynman–Kac steering."""

    n: int = Field(4, ge=1, description="particles for every sample")
    potential: Literal["difference", "max", "sum", "current"] = Field(
        "difference", description="by what particles are redrawn on the way, see the method"
    )
    resample_at: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.2, 0.4, 0.6, 0.8], description="after which shares of the steps; one at least lies inside"
    )
    adaptive: bool = Field(False, description="only where less than half of a sample's particles are effective")


@dataclass(frozen=True)
class Particles:
    """Of B samples: `latents` [B, n, K+1, *latent], lineages of the finished particles; `log_weights` [B, n] of these;
    `log_normaliser` [B], the log of the estimate of `E_# exp(βr)`."""

    latents: Tensor
    log_weights: Tensor
    log_normaliser: Tensor


class FKSteering(Method):
    """Nothing is trained: 4 particles of the prior are redrawn by their rewards on the way, and one of them is kept.

    After some of the steps the clean latents that the prior predicts are decoded and scored, `r̂`, and the n particles
    of a sample are redrawn with probabilities proportional to their weights, products of potentials G (Singhal et al.,
    2025, https://arxiv.org/abs/2501.06848):

        difference   log G = β (r̂ − the last r̂)
        max, sum     log G = β max r̂ or β Σ r̂, over the looks so far
        current      log G = β r̂
        at the end   log G = β r(x) − the sum of the lineage's others

    So the potentials of a lineage multiply to `exp(βr(x))`, whichever they are, and `Π (1/n) Σ w` over the redraws is
    an unbiased estimate of `E_# exp(βr)`. One particle is kept with probability proportional to its weight: samples of
    `p_# exp(βr)` as n grows. The published code departs from this in four places: `max` and `sum` end with the running
    value, weights are dropped where a redraw is skipped, they are clamped, and what is scored last is not what is
    returned. Predictions are those of the step before a redraw, so looks cost decodes and reward calls, n each, and no
    further prediction.
    """

    Config = FKSteeringConfig
    needs = Needs(training=False, density=True)  # redrawn particles part by their noise alone
    config: FKSteeringConfig

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """Nothing to train."""
        return iter(())

    def redraws(self, steps: int) -> list[int]:
        """After how many of K steps particles are redrawn, rising, all between 0 and K."""
        return sorted({round(share * steps) for share in self.config.resample_at} & set(range(1, steps)))

    def unfit(self, steps: int, group: int) -> str | None:
        """Without a redraw it is soft best of n."""
        if self.redraws(steps):
            return None
        return f"method.resample_at = {self.config.resample_at} names no step inside {steps}: use soft_best_of_n"

    def sample(self, core: Core, batch: Batch, **options: Any) -> Trajectory:
        """One of the particles of each sample, with its lineage and without records of a path."""
        particles = self.particles(core, batch, **options)
        noise = gumbel(core, _names(batch, self.config.n)).to(particles.log_weights)
        chosen = (particles.log_weights + noise.view_as(particles.log_weights)).argmax(1)
        latents = particles.latents[torch.arange(len(batch)).to(chosen), chosen]
        return Trajectory(batch.prompts, batch.samples, batch.conditioning, latents)

    def particles(self, core: Core, batch: Batch, **options: Any) -> Particles:
        """The particles of every sample; options of `core.rollout`."""
        core.kernel.require_density("fk_steering")
        if core.reward_model.may_miss:
            raise BenchError(
                f"fk_steering weighs every particle, and {core.reward_name!r} may have no score: use soft_best_of_n"
            )
        n, steps = self.config.n, core.kernel.steps
        redraws, crowd = self.redraws(steps), core.batch(_names(batch, n))
        options["record"] = frozenset({"model_output"})
        path = core.rollout(crowd, stop_at=redraws[0] if redraws else steps, **options)
        lineages, weights = path.latents.unflatten(0, (-1, n)), _Weights(self.config, len(batch), path.latents)
        for end, following in pairwise([*redraws, steps]):
            assert path.model_output is not None
            clean = core.kernel.clean(path.latents[:, -2], path.model_output[:, -1], end - 1)
            weights.look(_scores(core, clean, crowd.prompts))
            numbers = [core.rng("redraw", *name, end).random(n) for name in batch.samples]
            parents = weights.redraw(torch.from_numpy(np.stack(numbers)))
            lineages = lineages[torch.arange(len(parents)).to(parents)[:, None], parents]
            path = core.rollout(crowd, begin=(end, lineages[:, :, -1].flatten(0, 1)), stop_at=following, **options)
            lineages = torch.cat([lineages, path.latents[:, 1:].unflatten(0, (-1, n))], 2)
        weights.finish(_scores(core, path.latents[:, -1], crowd.prompts))
        return Particles(lineages, weights.log_weights, weights.log_normaliser + _log_mean(weights.log_weights))


class _Weights:
    """The log-weights of B·n particles, all float64 [B, n] where the latents are; `log_normaliser` [B]."""

    def __init__(self, config: FKSteeringConfig, samples: int, like: Tensor):
        self.config = config
        self.log_weights = torch.zeros(samples, config.n).to(like).double()
        self.applied = self.log_weights  # the sum of a lineage's potentials
        self.running: Tensor | None = None  # the largest of its looks, or their sum
        self.log_normaliser = self.log_weights[:, 0]

    def look(self, scores: Tensor) -> None:
        """Apply a potential on the way; scores: βr̂ of all particles in a row, [B·n]."""
        scores = scores.view_as(self.log_weights)
        if self.running is None or self.config.potential in ("difference", "current"):
            self.running = scores
        elif self.config.potential == "max":
            self.running = torch.maximum(self.running, scores)
        else:
            self.running = self.running + scores
        self._apply(self.running - self.applied if self.config.potential == "difference" else self.running)

    def finish(self, scores: Tensor) -> None:
        """Apply the last potential, which makes the lineage's product `exp(βr)`; scores: βr, [B·n]."""
        self._apply(scores.view_as(self.log_weights) - self.applied)

    def _apply(self, potential: Tensor) -> None:
        self.log_weights, self.applied = self.log_weights + potential, self.applied + potential

    def redraw(self, numbers: Tensor) -> Tensor:
        """Long [B, n]: the particle that each one goes on from. numbers: uniform, [B, n]."""
        probabilities, n = torch.softmax(self.log_weights, 1), self.config.n
        drawn = torch.searchsorted(probabilities.cumsum(1), numbers.to(probabilities)).clamp(max=n - 1)
        few = 1 / probabilities.square().sum(1) < n / 2 if self.config.adaptive else torch.ones_like(drawn[:, 0]).bool()
        self.log_normaliser = self.log_normaliser + torch.where(few, _log_mean(self.log_weights), 0.0)
        self.log_weights = torch.where(few[:, None], 0.0, self.log_weights)
        parents = torch.where(few[:, None], drawn, torch.arange(n).to(drawn))
        assert self.running is not None
        self.applied, self.running = self.applied.gather(1, parents), self.running.gather(1, parents)
        return parents


def _names(batch: Batch, n: int) -> list[tuple[str, int]]:
    """The n particles of every sample, itself the first; the others have numbers far above those of all samples."""
    return [(prompt, i + (draw << 32)) for prompt, i in batch.samples for draw in range(n)]


def _scores(core: Core, clean: Tensor, prompts: list[str]) -> Tensor:
    """βr of clean latents, float64 [B·n]."""
    size = core.micro_batch
    parts = [core.reward(clean[i : i + size], prompts[i : i + size]) for i in range(0, len(prompts), size)]
    return core.beta * torch.cat(parts).double()


def _log_mean(log_weights: Tensor) -> Tensor:
    """`log (1/n) Σ w` of log-weights [B, n]: [B]."""
    return log_weights.logsumexp(1) - math.log(log_weights.shape[1])
