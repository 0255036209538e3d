"""The tilted prior `p* ∝ p_# exp(βr)` of a model with a known density, from samples of the prior.

For an image reward p* has no closed form. But samples of the prior are independent and cheap, so self-normalised
importance sampling gives all of it with an error: normaliser, KL, reward, shares of components, and draws. They come
from the sampler that the finetuned model is sampled with: its discretisation is no error of a method.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.evaluation.statistics import FLOORS, effective_sample_size, floor, paired
from bench.metric import Evaluation, Measurement, Samples
from bench.models.mixture import Mixture, Posterior
from bench.sampling.noise import generator

DRAWS = 2048  # of the prior, for each prompt
ENOUGH = 100  # effective draws of a prompt; below, its target is refused


@dataclass(frozen=True, eq=False)
class Tilted:
    """One prompt's target as weighted draws of the prior.

    prompt: its number in the mixture, c. latents: [N, D], finished samples of the prior. tilt: float64 [N], βr. All on
    the CPU, the mixture too.
    """

    mixture: Mixture
    prompt: int
    latents: Tensor
    tilt: Tensor

    @cached_property
    def posteriors(self) -> Posterior:
        """Of the latents."""
        return self.posterior(self.latents)

    @cached_property
    def weights(self) -> Tensor:
        """[N], summing to one."""
        return self.tilt.softmax(0)

    @property
    def effective(self) -> float:
        """Effective number of draws (Kish)."""
        return float(effective_sample_size(self.tilt))

    @property
    def log_normaliser(self) -> float:
        """`log E_#[exp(βr)]`."""
        return float(self.tilt.logsumexp(0)) - math.log(len(self.tilt))

    @property
    def kl(self) -> float:
        """`KL(p*‖p_#) = β E_*[r] − log E_#[exp(βr)]`, nats."""
        return self.mean(self.tilt)[0] - self.log_normaliser

    def mean(self, values: Tensor) -> tuple[float, float]:
        """`E_*` of values [N] of the draws, and its standard error (delta method)."""
        centre = float(self.weights @ values.double())
        return centre, float((self.weights**2 @ (values.double() - centre) ** 2).sqrt())

    @property
    def shares(self) -> Tensor:
        """Probability of every component, float64 [J]."""
        return self.weights @ self.posteriors.log_weights.double().exp()

    @classmethod
    def flat(cls, mixture: Mixture, prompt: int, count: int = 2 * ENOUGH) -> "Tilted":
        """The target of a constant reward, from exact draws."""
        rng = generator(0, "select", "flat target", prompt)
        latents, _ = mixture.draw(torch.full((count,), prompt), rng)
        return cls(mixture, prompt, latents, torch.zeros(count, dtype=torch.float64))

    def nearest(self, latents: Tensor) -> Tensor:
        """The likeliest component of latents [n, …]: long [n]."""
        return self.posterior(latents.flatten(1)).log_weights.argmax(1)

    def posterior(self, latents: Tensor) -> Posterior:
        """Of the components and the coordinates of clean latents [n, D]."""
        one = torch.ones((), dtype=self.mixture.frame.dtype)
        return self.mixture.posterior(latents, torch.full((len(latents),), self.prompt), one, 0 * one)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Coordinates of the draws in their own components: means and standard deviations under p*, [J, R]."""
        weights = self.weights[:, None] * self.posteriors.log_weights.double().exp()  # [N, J]
        weights = weights / weights.sum(0).clamp(min=1e-12)
        own = self.posteriors.coordinates.double()
        means = torch.einsum("nj,njr->jr", weights, own)
        return means, torch.einsum("nj,njr->jr", weights, (own - means) ** 2).sqrt()

    def draws(self, count: int, rng: np.random.Generator) -> Tensor:
        """Latents [count, D] of the target: resampled systematically (Kitagawa, 1996)."""
        places = (rng.random() + torch.arange(count, dtype=torch.float64)) / count
        return self.latents[torch.searchsorted(self.weights.cumsum(0), places).clamp(max=len(self.weights) - 1)]

    @cached_property
    def halves(self) -> "tuple[Tilted, Tilted]":
        """Two independent estimates of the target, of every other draw each."""

        def part(start: int) -> Tilted:
            return Tilted(self.mixture, self.prompt, self.latents[start::2], self.tilt[start::2])

        return part(0), part(1)


def compare(
    name: str, evaluation: Evaluation, statistic: Callable[[Tensor, Tilted], float], **rest: Any
) -> list[Measurement]:
    """A statistic of latents [n, D] and their prompt's target, averaged over the prompts of a split: `<name>/<split>`.

    The floor `<name>/<split>/floor` is what p* itself scores: of as many draws of one half of the target, against the
    other. Nothing for a model without a known density; a row without a value, and the reason, where a target has too
    few effective draws.
    """
    targets: Mapping[str, Tilted] | None = evaluation.targets
    if targets is None:
        return []
    measurements = []
    for split in dict.fromkeys(evaluation.finetuned.splits):
        measurements += _compare(f"{name}/{split}", evaluation, targets, split, statistic, **rest)
    return measurements


def _compare(
    name: str,
    evaluation: Evaluation,
    targets: Mapping[str, Tilted],
    split: str,
    statistic: Callable[[Tensor, Tilted], float],
    **rest: Any,
) -> list[Measurement]:
    groups = evaluation.finetuned.rows(split)
    fewest = min((targets[prompt] for prompt in groups), key=lambda target: target.effective)
    if fewest.effective < ENOUGH:
        note = (
            f"refused: {fewest.effective:.0f} effective draws of a prompt's target, below {ENOUGH}: lower reward.beta"
        )
        return [Measurement(name, None, note=note, **rest)]

    def of(samples: Samples) -> Tensor:
        assert samples.latents is not None
        flat = samples.latents.flatten(1)
        return torch.tensor([statistic(flat[rows], targets[prompt]) for prompt, rows in groups.items()]).double()

    def perfect(number: int) -> float:
        values = []
        for prompt, rows in groups.items():
            drawn, against = targets[prompt].halves
            draws = drawn.draws(len(rows), generator(0, "select", "target", prompt, step=number))
            values.append(statistic(draws, against))
        return float(np.mean(values))

    n = sum(map(len, groups.values()))
    measured = paired(name, of(evaluation.finetuned), of(evaluation.prior), n=n, **rest)
    unit = {key: value for key, value in rest.items() if key == "unit"}
    return [measured, floor(name, map(perfect, range(FLOORS)), n=n, **unit)]
