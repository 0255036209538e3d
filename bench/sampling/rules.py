"""How much noise a sampling step adds, by the rule's name (`bench.settings.Rule`).

Notation, for one step: signal level α and noise level s before it, α' and s' after it, and `ρ = s'α / (s α')`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.errors import BenchError
from bench.settings import Rule


@dataclass(frozen=True)
class Levels:
    """The levels of all steps, float [K+1]; the last is that of the finished sample.

    alphas: signal levels α. sigmas: noise levels s. variances: s², not rounded through s.
    noising_variances: float [K], `s² − (α/α')² s'²`, the variance of `p_B(z_k | z_{k+1})`.
    diffusion: whether `α² + s² = 1`.
    """

    alphas: Tensor
    sigmas: Tensor
    variances: Tensor
    noising_variances: Tensor
    diffusion: bool

    @property
    def rho(self) -> Tensor:
        """`ρ = s'α / (s α')`, float [K]."""
        return self.sigmas[1:] * self.alphas[:-1] / (self.sigmas[:-1] * self.alphas[1:])


def ddim(eta: float, levels: Levels) -> tuple[Tensor, Tensor]:
    """`σ = η s' √(1−ρ²)` (Song et al., 2021); at η = 1 DDPM's ancestral sampling, which is memoryless."""
    variances, following = levels.variances, levels.sigmas[1:]
    std = eta * (variances[1:] / variances[:-1] * levels.noising_variances) ** 0.5
    if levels.diffusion:  # rounded as diffusers rounds it
        return std, (variances[1:] - std**2).clamp(min=0) ** 0.5
    return std, following * (1 - eta**2 + (eta * levels.rho) ** 2) ** 0.5  # √(s'²−σ²) would cancel near s = 1


def sde(eta: float, levels: Levels) -> tuple[Tensor, Tensor]:
    """`σ = s' √(1−ρ^{η²})`: the exact step of the flow's SDE with `g = η √(s/(1−s))` (Precise, arXiv 2605.23522)."""
    following = levels.sigmas[1:]
    return following * (1 - levels.rho ** (eta**2)) ** 0.5, following * levels.rho ** (eta**2 / 2)


def cps(eta: float, levels: Levels) -> tuple[Tensor, Tensor]:
    """`σ = s' sin(ηπ/2)`: coefficients-preserving sampling (arXiv 2509.05952)."""
    following = levels.sigmas[1:]
    return following * math.sin(eta * math.pi / 2), following * math.cos(eta * math.pi / 2)


def euler(eta: float, levels: Levels) -> Tensor | float:
    """`g = η √(s/(1−s))`, Flow-GRPO's (arXiv 2505.05470); at s = 1 the denominator has the next level."""
    now, following = levels.sigmas[:-1], levels.sigmas[1:]
    return eta * (now / (1 - torch.where(now == 1, following, now))) ** 0.5


def dance(eta: float, levels: Levels) -> Tensor | float:
    """`g = η`, DanceGRPO's (arXiv 2505.07818)."""
    return eta


# the step `α' x̂ + √(s'²−σ²) ε̂ + σ ξ`: each gives σ and √(s'²−σ²), float [K]
MARGINAL_RULES: dict[Rule, Callable[[float, Levels], tuple[Tensor, Tensor]]] = {"ddim": ddim, "sde": sde, "cps": cps}
# an Euler–Maruyama step of a flow's SDE, `σ = g √(s−s')`: each gives g, float [K] or a number
EULER_RULES: dict[Rule, Callable[[float, Levels], Tensor | float]] = {"euler": euler, "dance": dance}
SHARES: tuple[Rule, ...] = ("ddim", "cps")  # their η is the share of the next level that is new noise


def check_rule(rule: Rule, eta: float, *, flow: bool) -> None:
    """Raise BenchError for a rule that this kind of model does not have, or an η that the rule does not have."""
    rules = [*MARGINAL_RULES, *(EULER_RULES if flow else ())]
    if rule not in rules:
        raise BenchError(f"sampler.rule = {rule!r} is none of this kind of model: use {', '.join(rules)}.")
    if rule in SHARES and eta > 1:
        raise BenchError(f"sampler.eta = {eta:g} is too much for the rule {rule!r}: it lies between 0 and 1.")
