"""Transition kernels of the sampling chain `z_0 (noise) → z_1 → … → z_K (clean latent)`.

One kernel covers DDIM with any η on any timestep grid, which includes DDPM ancestral sampling (η = 1) and, on the
grids of DPM-Solver, first-order SDE-DPM-Solver++ (η = 1 too). Everything is a pure function of tensors. The order of
operations in `mean` follows diffusers' `DDIMScheduler.step`, so that float32 latents of an η = 0 rollout agree with a
diffusers pipeline to the bit.

Notation: `ᾱ_k` is the cumulative signal level at step k, `ε` the (guided) noise prediction.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bench.errors import BenchError

Step = int | Tensor  # one step for the whole batch, or a long tensor [B] with a step per row


@dataclass(frozen=True)
class Kernel:
    """Gaussian transitions `p(z_{k+1} | z_k) = N(μ(z_k, ε, k), σ_k² I)` (Song et al., 2021, eq. 12 and 16).

    timesteps: long [K], the network's time of each step, falling; it lies where the network does.
    alphas: float [K+1], `ᾱ_0 … ᾱ_K`; the last is the signal level of the finished sample. On the CPU: a whole
        batch's coefficients are numbers of the host, those of steps by row come from a copy where `timesteps` is.
    eta: 0 is deterministic DDIM, 1 is DDPM ancestral sampling.
    """

    timesteps: Tensor
    alphas: Tensor
    eta: float = 1.0
    _tables: dict[str, tuple[Tensor, Tensor]] = field(init=False, repr=False, compare=False)  # on host and device

    def __post_init__(self) -> None:
        if self.alphas.shape != (len(self.timesteps) + 1,):
            raise ValueError(
                f"a kernel of {len(self.timesteps)} steps needs {len(self.timesteps) + 1} signal levels, "
                f"got {tuple(self.alphas.shape)}"
            )
        now, after = self.alphas[:-1], self.alphas[1:]
        std = self.eta * ((1 - after) / (1 - now) * (1 - now / after)) ** 0.5
        tables = {
            "level": self.alphas,
            "signal": now**0.5,
            "noise": (1 - now) ** 0.5,
            "signal_after": after**0.5,
            "direction": (1 - after - std**2) ** 0.5,
            "std": std,
            "forgotten": (now / after) ** 0.5,
            "added": (1 - now / after) ** 0.5,
        }
        on_device = {name: (table, table.to(self.timesteps.device)) for name, table in tables.items()}
        object.__setattr__(self, "_tables", on_device)

    @property
    def steps(self) -> int:
        """K, the number of transitions."""
        return len(self.timesteps)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Kernel":
        """The same kernel for a network on `device`; `dtype` applies to the signal levels."""
        return Kernel(self.timesteps.to(device), self.alphas.to(dtype=dtype), self.eta)

    def _at(self, name: str, k: Step, like: Tensor) -> Tensor:
        """A table's entry at step k: a number of the host, or entries by row that broadcast over latents `like`."""
        host, device = self._tables[name]
        return device[k].view(-1, *(1,) * (like.ndim - 1)) if isinstance(k, Tensor) and k.ndim else host[k]

    def level(self, k: Step, like: Tensor) -> Tensor:
        """The signal level `ᾱ_k`, also of the finished sample (k = K), shaped to broadcast over `like`."""
        return self._at("level", k, like)

    def std(self, k: Step, like: Tensor) -> Tensor:
        """`σ_k = η √((1−ᾱ_{k+1})/(1−ᾱ_k)) √(1−ᾱ_k/ᾱ_{k+1})`, shaped to broadcast over `like`."""
        return self._at("std", k, like)

    def clean(self, z: Tensor, eps: Tensor, k: Step) -> Tensor:
        """The predicted clean latent `ẑ = (z − √(1−ᾱ_k) ε) / √ᾱ_k`, shaped like `z`."""
        return (z - self._at("noise", k, z) * eps) / self._at("signal", k, z)

    def mean(self, z: Tensor, eps: Tensor, k: Step) -> Tensor:
        """`μ = √ᾱ_{k+1} ẑ + √(1−ᾱ_{k+1}−σ_k²) ε`, shaped like `z`."""
        return self._at("signal_after", k, z) * self.clean(z, eps, k) + self._at("direction", k, z) * eps

    def noising(self, z_next: Tensor, k: Step) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the noising kernel `p_B(z_k | z_{k+1})` (exact reversal for η = 1).

        `N(√a z_{k+1}, (1−a) I)` with `a = ᾱ_k / ᾱ_{k+1}`.
        """
        return self._at("forgotten", k, z_next) * z_next, self._at("added", k, z_next)

    @property
    def has_density(self) -> bool:
        """Whether every transition has a positive variance."""
        return bool((self._tables["std"][0] > 0).all())

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
