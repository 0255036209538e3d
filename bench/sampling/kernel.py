"""Transition kernels of the sampling chain `z_0 (noise) → z_1 → … → z_K (clean latent)`.

One kernel covers DDIM with any η on any timestep grid, which includes DDPM ancestral sampling (η = 1) and, on the
grids of DPM-Solver, first-order SDE-DPM-Solver++ (η = 1 too). Everything is a pure function of tensors. The order of
operations in `mean` follows diffusers' `DDIMScheduler.step`, so that float32 latents of an η = 0 rollout agree with a
diffusers pipeline to the bit.

Notation: `ᾱ_k` is the cumulative signal level at step k, `ε` the (guided) noise prediction.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bench.errors import BenchError

Step = int | Tensor  # one step for the whole batch, or a long tensor [B] with a step per row


@dataclass(frozen=True)
class Kernel:
    """Gaussian transitions `p(z_{k+1} | z_k) = N(μ(z_k, ε, k), σ_k² I)` (Song et al., 2021, eq. 12 and 16).

    timesteps: long [K], the network's time of each step, falling.
    alphas: float [K+1], `ᾱ_0 … ᾱ_K`; the last is the signal level of the finished sample.
    eta: 0 is deterministic DDIM, 1 is DDPM ancestral sampling.
    """

    timesteps: Tensor
    alphas: Tensor
    eta: float = 1.0

    def __post_init__(self) -> None:
        if self.alphas.shape != (len(self.timesteps) + 1,):
            raise ValueError(
                f"a kernel of {len(self.timesteps)} steps needs {len(self.timesteps) + 1} signal levels, "
                f"got {tuple(self.alphas.shape)}"
            )

    @property
    def steps(self) -> int:
        """K, the number of transitions."""
        return len(self.timesteps)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Kernel":
        """The same kernel with its tables on `device`; `dtype` applies to the signal levels."""
        return replace(self, timesteps=self.timesteps.to(device), alphas=self.alphas.to(device=device, dtype=dtype))

    def _at(self, k: Step, like: Tensor) -> tuple[Tensor, Tensor]:
        """`(ᾱ_k, ᾱ_{k+1})`, shaped to broadcast over a batch of latents like `like`.

        A plain number stays one: as an index on the device it would be sent there and read back at every step.
        """
        if isinstance(k, int):
            return self.alphas[k], self.alphas[k + 1]
        shape = (-1,) + (1,) * (like.ndim - 1) if k.ndim else ()
        return self.alphas[k].reshape(shape), self.alphas[k + 1].reshape(shape)

    def std(self, k: Step, like: Tensor) -> Tensor:
        """`σ_k = η √((1−ᾱ_{k+1})/(1−ᾱ_k)) √(1−ᾱ_k/ᾱ_{k+1})`, shaped to broadcast over `like`."""
        now, after = self._at(k, like)
        return self.eta * ((1 - after) / (1 - now) * (1 - now / after)) ** 0.5

    def clean(self, z: Tensor, eps: Tensor, k: Step) -> Tensor:
        """The predicted clean latent `ẑ = (z − √(1−ᾱ_k) ε) / √ᾱ_k`, shaped like `z`."""
        now, _ = self._at(k, z)
        return (z - (1 - now) ** 0.5 * eps) / now**0.5

    def mean(self, z: Tensor, eps: Tensor, k: Step) -> Tensor:
        """`μ = √ᾱ_{k+1} ẑ + √(1−ᾱ_{k+1}−σ_k²) ε`, shaped like `z`."""
        _, after = self._at(k, z)
        return after**0.5 * self.clean(z, eps, k) + (1 - after - self.std(k, z) ** 2) ** 0.5 * eps

    def noising(self, z_next: Tensor, k: Step) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the noising kernel `p_B(z_k | z_{k+1})` (exact reversal for η = 1).

        `N(√a z_{k+1}, (1−a) I)` with `a = ᾱ_k / ᾱ_{k+1}`.
        """
        now, after = self._at(k, z_next)
        return (now / after) ** 0.5 * z_next, (1 - now / after) ** 0.5

    @property
    def has_density(self) -> bool:
        """Whether every transition has a positive variance."""
        return bool((self.std(torch.arange(self.steps), self.alphas[1:]) > 0).all())

    def require_density(self, user: str) -> None:
        """Raise BenchError unless `has_density`."""
        if not self.has_density:
            raise BenchError(
                f"{user} needs transition densities, but this sampler has a step of zero variance: "
                "use sampler.eta > 0 and a final signal level below 1 (a scheduler with set_alpha_to_one=false)"
            )


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of `x` [B, *latent] under `N(mean, std² I)`, summed over elements, all constants included; [B]."""
    log_prob = -((x - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(1).sum(1)


def ddim_kernel(
    alphas_cumprod: Tensor,
    steps: int,
    *,
    eta: float = 1.0,
    spacing: str = "leading",
    steps_offset: int = 1,
    final_alpha: float | None = None,
) -> Kernel:
    """The kernel of a DDIM grid over a training noise schedule.

    alphas_cumprod: float [T], the schedule that the network was trained on.
    spacing: "leading" (Stable Diffusion's) or "trailing", the grids of diffusers' DDIMScheduler; "linspace" or "logsnr"
        (even in `log((1−ᾱ)/ᾱ)`), those of its DPMSolverMultistepScheduler, which with η = 1 samples by first-order
        SDE-DPM-Solver++ (Lu et al., 2022). On "logsnr" the signal levels are exact and the network's times rounded.
    final_alpha: signal level `ᾱ_K` of the finished sample; None means `alphas_cumprod[0]`.
    Raises BenchError for a step count that the schedule cannot hold, an unknown spacing, or a final level below the
    last step's.
    """
    total = len(alphas_cumprod)
    if not 1 <= steps <= total:
        raise BenchError(f"sampler.steps must lie between 1 and the schedule's {total} steps, got {steps}")
    last = alphas_cumprod[:1] if final_alpha is None else torch.tensor([final_alpha], dtype=alphas_cumprod.dtype)
    levels = None
    match spacing:
        case "leading":
            grid = np.arange(steps)[::-1] * (total // steps) + steps_offset
        case "trailing":
            grid = np.round(np.arange(total, 0, -total / steps)) - 1
        case "linspace":
            grid = np.linspace(0, total - 1, steps + 1).round()[:0:-1]
        case "logsnr":
            if float(last) == 1:
                raise BenchError(
                    "sampler.spacing = 'logsnr' needs sampler.final_alpha < 1: its log-SNR must be finite."
                )
            schedule, end = (np.log((1 - a) / a) for a in (alphas_cumprod.double().numpy(), float(last)))
            even = np.linspace(schedule[-1], end, steps + 1)[:-1]
            grid = np.interp(even, schedule, np.arange(total)).round()
            levels = torch.from_numpy(1 / (1 + np.exp(even))).to(alphas_cumprod.dtype)
        case _:
            raise BenchError(f"unknown sampler.spacing {spacing!r}: use 'leading', 'trailing', 'linspace' or 'logsnr'")
    timesteps = torch.from_numpy(grid.astype(np.int64)).clamp(max=total - 1)
    if levels is None:
        levels = alphas_cumprod[timesteps]
    if last < levels[-1]:
        raise BenchError(
            f"sampler.final_alpha = {float(last):.4g} is below the last step's signal level {float(levels[-1]):.4g}: "
            "sampling must not add noise; use a value up to 1."
        )
    return Kernel(timesteps, torch.cat([levels, last]), eta)
