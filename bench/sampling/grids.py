"""Time grids: the kernel of a diffusion's noise schedule, and that of a rectified flow."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.errors import BenchError
from bench.model import Output
from bench.sampling.kernel import Kernel
from bench.sampling.rules import check_rule
from bench.settings import Rule


def ddim_kernel(
    alphas_cumprod: Tensor,
    steps: int,
    *,
    eta: float = 1.0,
    spacing: str = "leading",
    rule: Rule = "ddim",
    output: Output = "epsilon",
    steps_offset: int = 1,
    final_alpha: float | None = None,
) -> Kernel:
    """The kernel of a DDIM grid over a training noise schedule.

    alphas_cumprod: float [T], the schedule that the network was trained on.
    spacing: "leading" (Stable Diffusion's) or "trailing", the grids of diffusers' DDIMScheduler; "linspace" or "logsnr"
        (even in `log((1−ᾱ)/ᾱ)`), those of its DPMSolverMultistepScheduler, which with η = 1 samples by first-order
        SDE-DPM-Solver++ (Lu et al., 2022). On "logsnr" the signal levels are exact and the network's times are rounded.
    steps_offset: added to the times of the "leading" grid.
    final_alpha: signal level `ᾱ_K` of the finished sample; None means `alphas_cumprod[0]`.
    Raises BenchError for a number of steps that the schedule cannot hold, a spacing, rule or eta that a diffusion does
    not have, a final level below the last step's, and noise prediction where no signal is left.
    """
    check_rule(rule, eta, flow=False)
    total = len(alphas_cumprod)
    if not 1 <= steps <= total:
        raise BenchError(f"sampler.steps must lie between 1 and the schedule's {total} steps, got {steps}")
    last = alphas_cumprod[:1] if final_alpha is None else torch.tensor([final_alpha], dtype=alphas_cumprod.dtype)
    timesteps, levels = _diffusion_grid(alphas_cumprod, steps, spacing, steps_offset, float(last))
    if last < levels[-1]:
        raise BenchError(
            f"sampler.final_alpha = {float(last):.4g} is below the last step's signal level {float(levels[-1]):.4g}: "
            "sampling must not add noise; use a value up to 1."
        )
    if output == "epsilon" and levels[0] == 0:
        raise BenchError(
            "this schedule starts without any signal (zero terminal SNR), where predicted noise determines no clean "
            "latent: use a model that predicts v, or a schedule without rescale_betas_zero_snr."
        )
    return Kernel(timesteps, torch.cat([levels, last]), eta, rule, output)


def _diffusion_grid(
    alphas_cumprod: Tensor, steps: int, spacing: str, steps_offset: int, final_alpha: float
) -> tuple[Tensor, Tensor]:
    """Times, long [K], and signal levels ᾱ, float [K], of the grid's steps."""
    total = len(alphas_cumprod)
    if spacing == "logsnr":
        if final_alpha == 1:
            raise BenchError("sampler.spacing = 'logsnr' needs sampler.final_alpha < 1: its log-SNR must be finite.")
        schedule, end = (np.log((1 - a) / a) for a in (alphas_cumprod.double().numpy(), final_alpha))
        even = np.linspace(schedule[-1], end, steps + 1)[:-1]
        times = np.interp(even, schedule, np.arange(total)).round()
        levels = torch.from_numpy(1 / (1 + np.exp(even))).to(alphas_cumprod.dtype)
        return torch.from_numpy(times.astype(np.int64)).clamp(max=total - 1), levels
    match spacing:
        case "leading":
            times = np.arange(steps, dtype=np.float64)[::-1] * (total // steps) + steps_offset
        case "trailing":
            times = np.round(np.arange(total, 0, -total / steps)) - 1
        case "linspace":
            times = np.linspace(0, total - 1, steps + 1).round()[:0:-1]
        case _:
            raise BenchError(
                f"sampler.spacing = {spacing!r} is not a grid of a diffusion model: use 'auto' (its own), 'leading', "
                "'trailing', 'linspace' or 'logsnr'."
            )
    timesteps = torch.from_numpy(times.astype(np.int64)).clamp(max=total - 1)
    return timesteps, alphas_cumprod[timesteps]


def flow_kernel(
    steps: int,
    *,
    eta: float = 1.0,
    rule: Rule = "ddim",
    spacing: str = "sd3",
    shift: float = 3.0,
    tokens: int = 4096,
    final_noise: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Kernel:
    """The kernel of a rectified flow, on a grid of diffusers' FlowMatchEulerDiscreteScheduler.

    spacing: "sd3", Stable Diffusion 3's (`shift` is applied twice); "shifted", even levels with `shift` applied once;
        "logsnr", after a first step to K/(K+1) levels even in log-SNR, so that no step outweighs the others in a KL;
        "flux", even levels with a shift `μ` that grows with the number of latent `tokens` (0.5 at 256, 1.15 at 4096);
        "flux2", with one that depends on the number of steps too; "qwen", with one of 0.5 at 256 and 0.9 at 8192, whose
        levels are then stretched to end at 0.02.
    final_noise: s_K, the noise left in the finished sample. 0 ends as diffusers does, but then the last step has no
        density. None means 0.02, or half of the grid's last level if that is less (Stable Diffusion 1.5 leaves 0.03).
    Raises BenchError for a spacing, rule, eta or final level that does not fit.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler  # takes seconds, which a diffusion run need not wait for

    check_rule(rule, eta, flow=True)
    shift = 1.0 if spacing == "logsnr" else shift
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=shift,
        use_dynamic_shifting=spacing in ("flux", "flux2", "qwen"),
        shift_terminal=0.02 if spacing == "qwen" else None,
    )
    scheduler.set_timesteps(**_flow_grid(steps, spacing, tokens, 0.02 if final_noise is None else final_noise))
    sigmas = scheduler.sigmas.to(dtype)
    sigmas[-1] = min(0.02, float(sigmas[-2]) / 2) if final_noise is None else final_noise
    if sigmas[-1] >= sigmas[-2]:
        raise BenchError(
            f"sampler.final_noise = {final_noise:.4g} is not below the last step's noise level "
            f"{float(sigmas[-2]):.4g}: sampling must not add noise."
        )
    return Kernel(1000 * sigmas[:-1], (1 - sigmas) ** 2, eta, rule, "flow", sigmas)


def _flow_grid(steps: int, spacing: str, tokens: int, final_noise: float) -> dict[str, Any]:
    """Arguments of `FlowMatchEulerDiscreteScheduler.set_timesteps`."""
    match spacing:
        case "sd3":
            return {"num_inference_steps": steps}
        case "shifted":
            return {"sigmas": np.linspace(1, 0, steps + 1)[:-1]}
        case "logsnr":
            if final_noise == 0:
                raise BenchError(
                    "sampler.spacing = 'logsnr' needs sampler.final_noise > 0: its log-SNR must be finite."
                )
            first, last = (np.log(level / (1 - level)) for level in (steps / (steps + 1), final_noise))
            even = np.linspace(first, last, steps)
            return {"sigmas": np.concatenate([[1.0], 1 / (1 + np.exp(-even[:-1]))])}
        case "flux" | "qwen":
            most, at = (1.15, 4096) if spacing == "flux" else (0.9, 8192)
            mu = 0.5 + (most - 0.5) * (tokens - 256) / (at - 256)
            return {"sigmas": np.linspace(1, 1 / steps, steps), "mu": mu}
        case "flux2":
            from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

            return {"sigmas": np.linspace(1, 1 / steps, steps), "mu": compute_empirical_mu(tokens, steps)}
    raise BenchError(
        f"sampler.spacing = {spacing!r} is not a grid of a flow-matching model: use 'auto' (its own), 'sd3', "
        "'shifted', 'logsnr', 'flux', 'flux2' or 'qwen'."
    )
