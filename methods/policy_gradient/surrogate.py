"""Surrogates of a policy gradient, and the ratios and divergences that they see.

Everything here is a number for each transition z → z' of the chain, [n]. The policy that is trained steps with
`N(μ_θ, σ² I)`, the policy that sampled with `N(μ_old, σ² I)`; ρ is the ratio of their densities at z', A the advantage
of the finished sample, and ‖·‖² a mean over the elements of the latent, as in the published codes.

Beside its loss every surrogate returns what is logged: the log-ratio, and which transitions get no gradient
("clipped", 0 or 1; of `clipped` and `guarded` those whose ratio is out of range, on either side).
"""

import torch
from torch import Tensor

from bench import mean_square

Surrogate = tuple[Tensor, dict[str, Tensor]]


def gaussian_log_ratio(z_next: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """`log ρ = (‖z' − μ_old‖² − ‖z' − μ_θ‖²) / 2σ²` [n]; exactly 0 where the means agree. std: [n]."""
    return (mean_square(z_next - old_mean) - mean_square(z_next - mean)) / (2 * std**2)


def gaussian_kl(mean: Tensor, other_mean: Tensor, std: Tensor) -> Tensor:
    """`‖μ − μ'‖² / 2σ²` [n], the KL divergence of Gaussians that differ in the mean alone. std: [n]."""
    return mean_square(mean - other_mean) / (2 * std**2)


def clipped(log_ratio: Tensor, advantages: Tensor, clip: float) -> Surrogate:
    """PPO's surrogate `max(−A ρ, −A clip(ρ, 1 − c, 1 + c))` (Schulman et al., 2017, arXiv 1707.06347)."""
    ratio = torch.exp(log_ratio)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    outside = (ratio.detach() - 1).abs() > clip
    return loss, {"clipped": outside.float(), "log_ratio": log_ratio.detach()}


def guarded(
    log_ratio: Tensor, kl_old: Tensor, std: Tensor, noise_decrease: Tensor, advantages: Tensor, clip: float
) -> Surrogate:
    """GRPO-Guard's surrogate: `max(−A ρ̃, −A clip(ρ̃, 1 ± c)) / (s − s')` with `log ρ̃ = σ (log ρ + KL_old)`.

    kl_old: `KL_old = ‖μ_θ − μ_old‖²/2σ²`, which is what `log ρ` lacks on average. noise_decrease: `s − s'`.
    """
    loss, metrics = clipped(std * (log_ratio + kl_old), advantages, clip)
    return loss / noise_decrease, metrics


def masked(log_ratio: Tensor, kl_old: Tensor, advantages: Tensor, threshold: float) -> Surrogate:
    """Flow-DPPO's surrogate: `−A ρ`, but 0 where `KL_old ≥ τ` and ρ has moved the way that A asks for.

    kl_old: `KL_old = ‖μ_θ − μ_old‖²/2σ²`. threshold: τ.
    """
    ratio = torch.exp(log_ratio)
    moves_away = advantages * (ratio.detach() - 1) > 0
    mask = moves_away & (kl_old.detach() >= threshold)
    loss = (-advantages * ratio).masked_fill(mask, 0)
    return loss, {"clipped": mask.float(), "log_ratio": log_ratio.detach()}
