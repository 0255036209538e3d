"""Transition kernels of the sampling chain `z_0 (noise) → z_1 → … → z_K (clean latent)`, for diffusion and for flows.

Both have a Gaussian path `z = α x + s ε` with a signal level α and a noise level s at every step: diffusion
`α = √ᾱ, s = √(1−ᾱ)`, rectified flow `α = 1−s`. A kernel is these levels, what the network's output means, and a rule
for the noise σ of a step; whatever else methods need follows. Everything is a pure function of tensors. The order of
operations follows diffusers' `DDIMScheduler.step` and `FlowMatchEulerDiscreteScheduler.step`, so that float32 latents
of a deterministic rollout agree with a diffusers pipeline to the bit.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from bench.errors import BenchError
from bench.model import Output
from bench.settings import Rule

Step = int | Tensor  # one step for the whole batch, or a long tensor [B] with a step per row


@dataclass(frozen=True)
class Kernel:
    """Gaussian transitions `p(z_{k+1} | z_k) = N(μ(z_k, o, k), σ_k² I)`, o the network's own output.

    `μ = α' x̂ + √(s'² − σ²) ε̂`, with x̂ and ε̂ the clean latent and the noise that the output means, and primes for the
    next step.

    timesteps: [K], the network's time of each step, falling; long for diffusion, `1000 s` in floats for a flow. It lies
        where the network does.
    alphas_cumprod: float [K+1], `α_0² … α_K²` (a diffusion's ᾱ); the last is that of the finished sample. On the
        CPU: a whole batch's coefficients are numbers of the host, those of steps by row come from a copy where `timesteps` is.
    eta: how much noise, by `rule`; 0 is deterministic.
    rule: with `ρ = s'α/(s α')`,
        "ddim": `σ = η s' √(1−ρ²)` (Song et al., 2021); at η = 1 DDPM's ancestral sampling, memoryless;
        "sde": `σ = s' √(1−ρ^{η²})`, the exact step of the flow's SDE with `g = η √(s/(1−s))` (Precise, arXiv
        2605.23522);
        "cps": `σ = s' sin(ηπ/2)`, coefficients-preserving sampling (arXiv 2509.05952);
        "euler": `σ = g √(s−s')` with the same g and the mean of an Euler step, as Flow-GRPO published it (arXiv
        2505.05470); at s = 1 its g has the next level in the denominator;
        "dance": an Euler step with constant `g = η`, DanceGRPO's (arXiv 2505.07818). The last two are for flows alone.
    output: what the network predicts: "epsilon", "v_prediction" (`αε − sx`), or "flow" (`ε − x`).
    sigmas: float [K+1], s; None means `√(1−α²)`, a diffusion's.
    noisy: the steps [first, end) that have noise; None means all.
    """

    timesteps: Tensor
    alphas_cumprod: Tensor
    eta: float = 1.0
    rule: Rule = "ddim"
    output: Output = "epsilon"
    sigmas: Tensor | None = None
    noisy: tuple[int, int] | None = None
    _tables: dict[str, Tensor] = field(init=False, repr=False, compare=False)  # on the host
    _on_device: dict[str, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)  # as asked for

    def __post_init__(self) -> None:
        if self.alphas_cumprod.shape != (len(self.timesteps) + 1,):
            raise ValueError(
                f"a kernel of {len(self.timesteps)} steps needs {len(self.timesteps) + 1} signal levels, "
                f"got {tuple(self.alphas_cumprod.shape)}"
            )
        now, after = self.alphas_cumprod[:-1], self.alphas_cumprod[1:]
        if self.sigmas is None:
            power, added = 1 - self.alphas_cumprod, 1 - now / after
        else:
            power = self.sigmas**2
            added = power[:-1] - now / after * power[1:]
        signal, noise = self.alphas_cumprod**0.5, power**0.5
        std, direction = self._noise(signal, noise, power, added)
        if self.noisy is not None:
            inside = torch.zeros(self.steps, dtype=torch.bool)
            inside[slice(*self.noisy)] = True
            std, direction = torch.where(inside, std, 0), torch.where(inside, direction, noise[1:])
        tables = {
            "alpha_cumprod": self.alphas_cumprod,
            "signal": signal[:-1],
            "noise": noise[:-1],
            "signal_after": signal[1:],
            "noise_level": noise,
            "noise_decrease": noise[:-1] - noise[1:],
            "direction": direction,
            "std": std,
            "forgotten": (now / after) ** 0.5,
            "added": added**0.5,
        }
        if self.output == "flow":  # μ = keep · z + drift · o; exactly z + (s'−s) o where nothing is random
            step = noise[1:] - noise[:-1]
            # of the noise ε̂ that is added to z + (s'−s) o: an Euler step's is -g²/(2s) (s−s')
            pull = -(std**2) / (2 * noise[:-1]) if self.rule in ("euler", "dance") else direction - noise[1:]
            tables |= {"keep": 1 + pull, "drift": step + signal[:-1] * pull}
        object.__setattr__(self, "_tables", tables)

    def _noise(self, signal: Tensor, noise: Tensor, power: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """σ and √(s'²−σ²) [K] by the rule; of α, s, s² and the noising's variance s² − (α/α')² s'²."""
        s, after = noise[:-1], noise[1:]
        ratio = after * signal[:-1] / (s * signal[1:])
        match self.rule:
            case "ddim":
                std = self.eta * (power[1:] / power[:-1] * added) ** 0.5
                if self.sigmas is None:  # as diffusers rounds it
                    return std, (power[1:] - std**2).clamp(min=0) ** 0.5
                # √(s'²−σ²) itself would cancel near s = 1
                return std, after * (1 - self.eta**2 + (self.eta * ratio) ** 2) ** 0.5
            case "sde":
                return after * (1 - ratio ** (self.eta**2)) ** 0.5, after * ratio ** (self.eta**2 / 2)
            case "cps":
                return after * math.sin(self.eta * math.pi / 2), after * math.cos(self.eta * math.pi / 2)
        rate = self.eta
        if self.rule == "euler":
            rate = rate * (s / (1 - torch.where(s == 1, after, s))) ** 0.5
        return rate * (s - after) ** 0.5, torch.zeros_like(s)  # its mean has a form of its own

    @property
    def steps(self) -> int:
        """K, the number of transitions."""
        return len(self.timesteps)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Kernel":
        """The same kernel for a network on `device`; `dtype` applies to the levels."""
        sigmas = None if self.sigmas is None else self.sigmas.to(dtype=dtype)
        return replace(
            self, timesteps=self.timesteps.to(device), alphas_cumprod=self.alphas_cumprod.to(dtype=dtype), sigmas=sigmas
        )

    def key(self) -> tuple:
        """Everything that its chains depend on, for fingerprints."""
        levels = [
            None if table is None else table.tolist() for table in (self.timesteps, self.alphas_cumprod, self.sigmas)
        ]
        return (*levels, self.eta, self.rule, self.output, self.noisy)

    def _at(self, name: str, k: Step, like: Tensor) -> Tensor:
        """A table's entry at step k: a number of the host, or entries by row that broadcast over latents `like`."""
        if not (isinstance(k, Tensor) and k.ndim):
            return self._tables[name][k]
        if name not in self._on_device:
            self._on_device[name] = self._tables[name].to(self.timesteps.device)
        return self._on_device[name][k].view(-1, *(1,) * (like.ndim - 1))

    def alpha_cumprod(self, k: Step, like: Tensor) -> Tensor:
        """The signal's power `α_k²`, also of the finished sample (k = K), shaped to broadcast over `like`."""
        return self._at("alpha_cumprod", k, like)

    def std(self, k: Step, like: Tensor) -> Tensor:
        """`σ_k`, shaped to broadcast over `like`."""
        return self._at("std", k, like)

    def clean(self, z: Tensor, output: Tensor, k: Step) -> Tensor:
        """The clean latent x̂ that the output means, shaped like `z`; finite at α = 0 unless the output is the noise."""
        match self.output:
            case "epsilon":
                return (z - self._at("noise", k, z) * output) / self._at("signal", k, z)
            case "v_prediction":
                return self._at("signal", k, z) * z - self._at("noise", k, z) * output
            case "flow":
                return z - self._at("noise", k, z) * output

    def noise(self, z: Tensor, output: Tensor, k: Step) -> Tensor:
        """The noise ε̂ that the output means, shaped like `z`."""
        match self.output:
            case "epsilon":
                return output
            case "v_prediction":
                return self._at("signal", k, z) * output + self._at("noise", k, z) * z
            case "flow":
                return z + self._at("signal", k, z) * output

    def noised(self, clean: Tensor, noise: Tensor, k: Step) -> Tensor:
        """`α_k x + s_k ε`, shaped like `clean`."""
        return self._at("signal", k, clean) * clean + self._at("noise", k, clean) * noise

    def target(self, clean: Tensor, noise: Tensor, k: Step) -> Tensor:
        """What the network should say of `noised(clean, noise, k)`: `ε`, `α_k ε − s_k x`, or `ε − x`; like `clean`."""
        match self.output:
            case "epsilon":
                return noise
            case "v_prediction":
                return self._at("signal", k, clean) * noise - self._at("noise", k, clean) * clean
            case "flow":
                return noise - clean

    def noise_level(self, k: Step, like: Tensor) -> Tensor:
        """`s_k`, also of the finished sample (k = K), shaped to broadcast over `like`."""
        return self._at("noise_level", k, like)

    def noise_decrease(self, k: Step, like: Tensor) -> Tensor:
        """`s_k − s_{k+1}`, what a step takes from the noise level, shaped to broadcast over `like`."""
        return self._at("noise_decrease", k, like)

    def mean(self, z: Tensor, output: Tensor, k: Step) -> Tensor:
        """`μ = α' x̂ + √(s'² − σ²) ε̂` (an Euler step for the rules of that name), shaped like `z`."""
        if self.output == "flow":
            return self._at("keep", k, z) * z + self._at("drift", k, z) * output
        side = self._at("direction", k, z) * self.noise(z, output, k)
        return self._at("signal_after", k, z) * self.clean(z, output, k) + side

    def noising(self, z_next: Tensor, k: Step) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the noising kernel `p_B(z_k | z_{k+1})`, a memoryless sampler's reversal.

        `N((α/α') z_{k+1}, (s² − (α/α')² s'²) I)`.
        """
        return self._at("forgotten", k, z_next) * z_next, self._at("added", k, z_next)

    @property
    def has_density(self) -> bool:
        """Whether every transition has a positive variance."""
        return bool((self._tables["std"] > 0).all())

    def largest_weight(self) -> tuple[int, float]:
        """The step with the largest weight `(∂μ/∂o / σ)²`, which prices a change of the output, and its share of all.

        Of a kernel that `has_density`. Close to 1 the other steps hardly count in `path_kl` and in losses of densities.
        """
        k = torch.arange(self.steps, device=self.timesteps.device)
        one = torch.ones(self.steps, 1, device=k.device)
        weight = ((self.mean(0 * one, one, k) / self.std(k, one)) ** 2).double().flatten()
        return int(weight.argmax()), float(weight.max() / weight.sum())

    def require_density(self, user: str) -> None:
        """Raise BenchError unless `has_density`."""
        if not self.has_density:
            raise BenchError(
                f"{user} needs transition densities, but this sampler has a step of zero variance: use sampler.eta > 0 "
                "and leave noise in the finished sample (sampler.final_alpha < 1; for a flow sampler.final_noise > 0)"
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
    rule: Rule = "ddim",
    output: Output = "epsilon",
    steps_offset: int = 1,
    final_alpha: float | None = None,
) -> Kernel:
    """The kernel of a DDIM grid over a training noise schedule.

    alphas_cumprod: float [T], the schedule that the network was trained on.
    spacing: "leading" (Stable Diffusion's) or "trailing", the grids of diffusers' DDIMScheduler; "linspace" or "logsnr"
        (even in `log((1−ᾱ)/ᾱ)`), those of its DPMSolverMultistepScheduler, which with η = 1 samples by first-order
        SDE-DPM-Solver++ (Lu et al., 2022). On "logsnr" the signal levels are exact and the network's times rounded.
    final_alpha: signal level `ᾱ_K` of the finished sample; None means `alphas_cumprod[0]`.
    Raises BenchError for a step count that the schedule cannot hold, a spacing, rule or eta that is not a diffusion's,
    a final level below the last step's, or noise prediction where no signal is left.
    """
    _check(rule, eta, ("ddim", "sde", "cps"))
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
            raise BenchError(
                f"sampler.spacing = {spacing!r} is no grid of a diffusion model: use 'auto' (its own), 'leading', "
                "'trailing', 'linspace' or 'logsnr'."
            )
    timesteps = torch.from_numpy(grid.astype(np.int64)).clamp(max=total - 1)
    if levels is None:
        levels = alphas_cumprod[timesteps]
    if last < levels[-1]:
        raise BenchError(
            f"sampler.final_alpha = {float(last):.4g} is below the last step's signal level {float(levels[-1]):.4g}: "
            "sampling must not add noise; use a value up to 1."
        )
    if output == "epsilon" and levels[0] == 0:
        raise BenchError(
            "this schedule starts without any signal (zero terminal SNR), where a predicted noise determines no clean "
            "latent: use a model that predicts v, or a schedule without rescale_betas_zero_snr."
        )
    return Kernel(timesteps, torch.cat([levels, last]), eta, rule, output)


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
        "flux", even levels with the shift `μ` that grows with the number of latent `tokens` (.5 at 256, 1.15 at 4096);
        "flux2", one that depends on the number of steps too.
    final_noise: s_K, the noise left in the finished sample. 0 ends as diffusers does, but then the last step has no
        density; None means 0.02, or half of the grid's last level if that is less (Stable Diffusion 1.5 leaves 0.03).
    Raises BenchError for a spacing, rule, eta or final level that does not fit.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler  # seconds, which a diffusion run need not wait for

    _check(rule, eta, ("ddim", "sde", "cps", "euler", "dance"))
    match spacing:
        case "sd3":
            grid = {"num_inference_steps": steps}
        case "shifted":
            grid = {"sigmas": np.linspace(1, 0, steps + 1)[:-1]}
        case "flux":
            mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
            grid = {"sigmas": np.linspace(1, 1 / steps, steps), "mu": mu}
        case "flux2":
            from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

            grid = {"sigmas": np.linspace(1, 1 / steps, steps), "mu": compute_empirical_mu(tokens, steps)}
        case _:
            raise BenchError(
                f"sampler.spacing = {spacing!r} is no grid of a flow-matching model: use 'auto' (its own), 'sd3', "
                "'shifted', 'flux' or 'flux2'."
            )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=spacing in ("flux", "flux2"))
    scheduler.set_timesteps(**grid)
    sigmas = scheduler.sigmas.to(dtype)
    sigmas[-1] = min(0.02, float(sigmas[-2]) / 2) if final_noise is None else final_noise
    if sigmas[-1] >= sigmas[-2]:
        raise BenchError(
            f"sampler.final_noise = {final_noise:.4g} is not below the last step's noise level "
            f"{float(sigmas[-2]):.4g}: sampling must not add noise."
        )
    return Kernel(1000 * sigmas[:-1], (1 - sigmas) ** 2, eta, rule, "flow", sigmas)


def _check(rule: str, eta: float, rules: tuple[str, ...]) -> None:
    if rule not in rules:
        raise BenchError(f"sampler.rule = {rule!r} is none of this kind of model: use {', '.join(rules)}.")
    if rule in ("ddim", "cps") and eta > 1:
        raise BenchError(f"sampler.eta = {eta:g} is too much for the rule {rule!r}: it lies between 0 and 1.")
