"""The numbers of every sampling step, computed once for a kernel."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bench.model import Output
from bench.sampling.noise import upload
from bench.sampling.rules import EULER_RULES, MARGINAL_RULES, Levels
from bench.settings import Rule


@dataclass(frozen=True)
class Coefficients:
    """Float tensors, a number per step; primes mark the next step, x̂ and ε̂ the clean latent and noise of the output.

    alphas_cumprod: [K+1], α².  alphas: [K+1], signal levels α.  sigmas: [K+1], noise levels s.
    next_alphas: [K], α'.  sigma_decreases: [K], `s − s'`.
    stds: [K], σ, the standard deviation of the transition.
    epsilon_coefficients: [K], `√(s'²−σ²)`, of ε̂ in the mean `α' x̂ + √(s'²−σ²) ε̂`.
    noising_scales, noising_stds: [K], `α/α'` and `√(s² − (α/α')² s'²)`, of the noising kernel `p_B(z_k | z_{k+1})`.
    z_coefficients, output_coefficients: [K], of a flow's mean `z_coefficient z + output_coefficient o`; empty for a
        diffusion.
    """

    alphas_cumprod: Tensor
    alphas: Tensor
    sigmas: Tensor
    next_alphas: Tensor
    sigma_decreases: Tensor
    stds: Tensor
    epsilon_coefficients: Tensor
    noising_scales: Tensor
    noising_stds: Tensor
    z_coefficients: Tensor
    output_coefficients: Tensor

    def to(self, device: torch.device) -> "Coefficients":
        """A copy on a device, made without waiting for what is queued there."""
        return Coefficients(**{field.name: upload(getattr(self, field.name), device) for field in fields(self)})


def step_coefficients(
    alphas_cumprod: Tensor,
    sigmas: Tensor | None,
    *,
    rule: Rule,
    eta: float,
    output: Output,
    noisy: tuple[int, int] | None,
) -> Coefficients:
    """The coefficients of a kernel with these settings; see `bench.sampling.kernel.Kernel`."""
    now, following = alphas_cumprod[:-1], alphas_cumprod[1:]
    if sigmas is None:
        variances, noising_variances = 1 - alphas_cumprod, 1 - now / following
    else:
        variances = sigmas**2
        noising_variances = variances[:-1] - now / following * variances[1:]
    levels = Levels(alphas_cumprod**0.5, variances**0.5, variances, noising_variances, diffusion=sigmas is None)
    alpha, s, next_s = levels.alphas[:-1], levels.sigmas[:-1], levels.sigmas[1:]

    if rule in EULER_RULES:
        std, epsilon = EULER_RULES[rule](eta, levels) * (s - next_s) ** 0.5, torch.zeros_like(s)
    else:
        std, epsilon = MARGINAL_RULES[rule](eta, levels)
    if noisy is not None:
        random = torch.zeros(len(now), dtype=torch.bool)
        random[slice(*noisy)] = True
        std, epsilon = torch.where(random, std, 0), torch.where(random, epsilon, next_s)

    z_coefficient = output_coefficient = s[:0]
    if output == "flow":
        # μ is the noiseless step z + (s'−s) o and `drift` times ε̂ = z + α o
        drift = -(std**2) / (2 * s) if rule in EULER_RULES else epsilon - next_s
        z_coefficient, output_coefficient = 1 + drift, next_s - s + alpha * drift
    return Coefficients(
        alphas_cumprod=alphas_cumprod,
        alphas=levels.alphas,
        sigmas=levels.sigmas,
        next_alphas=levels.alphas[1:],
        sigma_decreases=s - next_s,
        stds=std,
        epsilon_coefficients=epsilon,
        noising_scales=(now / following) ** 0.5,
        noising_stds=noising_variances**0.5,
        z_coefficients=z_coefficient,
        output_coefficients=output_coefficient,
    )
