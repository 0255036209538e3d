"""Transition kernels of the sampling chain `z_0 (noise) → z_1 → … → z_K (clean latent)`, for diffusion and for flows.

Both have a Gaussian path `z = α x + s ε` with a signal level α and a noise level s at every step: diffusion
`α = √ᾱ, s = √(1−ᾱ)`, rectified flow `α = 1−s`. A kernel consists of these levels, the meaning of the network's output,
and a rule for the standard deviation σ of a step; everything else that methods need follows from them. All of it is a
pure function of tensors. The order of operations follows diffusers' `DDIMScheduler.step` and
`FlowMatchEulerDiscreteScheduler.step`, so that float32 latents of a deterministic rollout equal those of a diffusers
pipeline bit for bit.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bench.errors import BenchError
from bench.model import Output
from bench.sampling.coefficients import Coefficients, step_coefficients
from bench.settings import Rule

Step = int | Tensor  # one step for the whole batch, or a long tensor [B] with a step for each row


@dataclass(frozen=True)
class Kernel:
    """Gaussian transitions `p(z_{k+1} | z_k) = N(μ(z_k, o, k), σ_k² I)`, where o is the network's own output.

    `μ = α' x̂ + √(s'² − σ²) ε̂`, with x̂ and ε̂ the clean latent and the noise that the output means, and primes for the
    next step. The rules "euler" and "dance" have the mean of an Euler step instead.

    timesteps: [K], the network's time at each step, falling; long for diffusion, `1000 s` in floats for a flow. On the
        network's device.
    alphas_cumprod: float [K+1], `α_0² … α_K²` (a diffusion's ᾱ); the last is that of the finished sample. On the CPU:
        the coefficients of a whole batch are numbers of the host. Those of a step for each row come from a copy on the
        device of `timesteps`, made when it is first needed.
    eta: how much noise; 0 is deterministic. rule: in what form; see `bench.sampling.rules`.
    output: what the network predicts: "epsilon", "v_prediction" (`αε − sx`), or "flow" (`ε − x`).
    sigmas: float [K+1], the noise levels s; None means a diffusion's `√(1−α²)`.
    noisy: the steps [first, end) that add noise; None means all.
    """

    timesteps: Tensor
    alphas_cumprod: Tensor
    eta: float = 1.0
    rule: Rule = "ddim"
    output: Output = "epsilon"
    sigmas: Tensor | None = None
    noisy: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.alphas_cumprod.shape != (len(self.timesteps) + 1,):
            raise ValueError(
                f"a kernel of {len(self.timesteps)} steps needs {len(self.timesteps) + 1} signal levels, "
                f"got {tuple(self.alphas_cumprod.shape)}"
            )

    @cached_property
    def _on_host(self) -> Coefficients:
        return step_coefficients(
            self.alphas_cumprod, self.sigmas, rule=self.rule, eta=self.eta, output=self.output, noisy=self.noisy
        )

    @cached_property
    def _on_device(self) -> Coefficients:
        return self._on_host.to(self.timesteps.device)

    @cached_property
    def times(self) -> Tensor:
        """[K+1]: `timesteps`, and 0, the time of the finished sample."""
        return torch.cat([self.timesteps, torch.zeros_like(self.timesteps[:1])])

    @property
    def steps(self) -> int:
        """K, the number of transitions."""
        return len(self.timesteps)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Kernel":
        """The same kernel for a network on `device`, with levels of `dtype`; itself if nothing changes."""
        timesteps, alphas_cumprod = self.timesteps.to(device), self.alphas_cumprod.to(dtype=dtype)
        if timesteps is self.timesteps and alphas_cumprod is self.alphas_cumprod:
            return self
        sigmas = None if self.sigmas is None else self.sigmas.to(dtype=dtype)
        return replace(self, timesteps=timesteps, alphas_cumprod=alphas_cumprod, sigmas=sigmas)

    def key(self) -> tuple:
        """Everything that its chains depend on, for fingerprints."""
        tensors = (self.timesteps, self.alphas_cumprod, self.sigmas)
        levels = [None if tensor is None else tensor.tolist() for tensor in tensors]
        return (*levels, self.eta, self.rule, self.output, self.noisy)

    # The Gaussian path --------------------------------------------------------------------------------------------

    def alpha_cumprod(self, k: Step, like: Tensor) -> Tensor:
        """The signal's power `α_k²`, also of the finished sample (k = K), shaped to broadcast over `like`."""
        return _at(self._coefficients(k).alphas_cumprod, k, like)

    def noise_level(self, k: Step, like: Tensor) -> Tensor:
        """`s_k`, also of the finished sample (k = K), shaped to broadcast over `like`."""
        return _at(self._coefficients(k).sigmas, k, like)

    def noise_decrease(self, k: Step, like: Tensor) -> Tensor:
        """`s_k − s_{k+1}`, how much noise a step removes, shaped to broadcast over `like`."""
        return _at(self._coefficients(k).sigma_decreases, k, like)

    def clean(self, z: Tensor, output: Tensor, k: Step) -> Tensor:
        """The clean latent x̂ that the output means, shaped like `z`; finite at α = 0 unless the output is the noise."""
        match self.output:
            case "epsilon":
                return (z - self.noise_level(k, z) * output) / self._alpha(k, z)
            case "v_prediction":
                return self._alpha(k, z) * z - self.noise_level(k, z) * output
            case "flow":
                return z - self.noise_level(k, z) * output

    def noise(self, z: Tensor, output: Tensor, k: Step) -> Tensor:
        """The noise ε̂ that the output means, shaped like `z`."""
        match self.output:
            case "epsilon":
                return output
            case "v_prediction":
                return self._alpha(k, z) * output + self.noise_level(k, z) * z
            case "flow":
                return z + self._alpha(k, z) * output

    def noised(self, clean: Tensor, noise: Tensor, k: Step) -> Tensor:
        """`α_k x + s_k ε`, shaped like `clean`."""
        return self._alpha(k, clean) * clean + self.noise_level(k, clean) * noise

    def target(self, clean: Tensor, noise: Tensor, k: Step) -> Tensor:
        """The network's ideal output at `noised(clean, noise, k)`: `ε`, `α_k ε − s_k x`, or `ε − x`; like `clean`."""
        match self.output:
            case "epsilon":
                return noise
            case "v_prediction":
                return self._alpha(k, clean) * noise - self.noise_level(k, clean) * clean
            case "flow":
                return noise - clean

    def _alpha(self, k: Step, like: Tensor) -> Tensor:
        return _at(self._coefficients(k).alphas, k, like)

    # The transition -----------------------------------------------------------------------------------------------

    def mean(self, z: Tensor, output: Tensor, k: Step) -> Tensor:
        """`μ = α' x̂ + √(s'² − σ²) ε̂` (an Euler step for the rules of that kind), shaped like `z`."""
        coefficients = self._coefficients(k)
        if self.output == "flow":
            z_coefficient = _at(coefficients.z_coefficients, k, z)
            return z_coefficient * z + _at(coefficients.output_coefficients, k, z) * output
        epsilon_term = _at(coefficients.epsilon_coefficients, k, z) * self.noise(z, output, k)
        return _at(coefficients.next_alphas, k, z) * self.clean(z, output, k) + epsilon_term

    def std(self, k: Step, like: Tensor) -> Tensor:
        """`σ_k`, shaped to broadcast over `like`."""
        return _at(self._coefficients(k).stds, k, like)

    def kl(self, z: Tensor, output: Tensor, other: Tensor, k: Step) -> Tensor:
        """`‖μ − μ'‖² / 2σ²` [n] in nats, of the steps that two outputs mean at `z`. Needs `has_density`."""
        gap = self.mean(z, output, k) - self.mean(z, other, k)
        return (gap**2 / (2 * self.std(k, z) ** 2)).flatten(1).sum(1)

    def noising(self, z_next: Tensor, k: Step) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the noising kernel `p_B(z_k | z_{k+1})`, a memoryless sampler's reversal.

        `N((α/α') z_{k+1}, (s² − (α/α')² s'²) I)`.
        """
        coefficients = self._coefficients(k)
        return _at(coefficients.noising_scales, k, z_next) * z_next, _at(coefficients.noising_stds, k, z_next)

    @property
    def has_density(self) -> bool:
        """Whether every transition has a positive variance."""
        return bool((self._on_host.stds > 0).all())

    def require_density(self, user: str) -> None:
        """Raise BenchError unless `has_density`."""
        if not self.has_density:
            raise BenchError(
                f"{user} needs transition densities, but this sampler has a step of zero variance: use sampler.eta > 0 "
                "and leave noise in the finished sample (sampler.final_alpha < 1; for a flow sampler.final_noise > 0)"
            )

    def largest_weight(self) -> tuple[int, float]:
        """The step with the largest weight `(∂μ/∂o / σ)²` of a change of the output in the KL, and its share of all.

        Needs `has_density`. At a share close to 1 the other steps hardly count in `path_kl` and in losses of densities.
        """
        k = torch.arange(self.steps, device=self.timesteps.device)
        one = torch.ones(self.steps, 1, device=k.device)
        weight = ((self.mean(0 * one, one, k) / self.std(k, one)) ** 2).double().flatten()
        return int(weight.argmax()), float(weight.max() / weight.sum())

    def leak(self) -> float:
        """The share of a finished sample's variance that z_0 decides, for data of unit variance; 0: memoryless."""
        k = torch.arange(self.steps, device=self.timesteps.device)
        one = torch.ones(self.steps, 1, device=k.device)
        alpha, s = self._alpha(k, one), self.noise_level(k, one)
        variance = alpha**2 + s**2
        factors = self.mean(one, self.target(alpha / variance, s / variance, k), k)  # E[x | z] = α z / (α² + s²)
        return float(
            factors.double().prod() ** 2 * variance[0] / (self.alphas_cumprod[-1] + self._on_host.sigmas[-1] ** 2)
        )

    def _coefficients(self, k: Step) -> Coefficients:
        return self._on_device if isinstance(k, Tensor) and k.ndim else self._on_host


def _at(values: Tensor, k: Step, like: Tensor) -> Tensor:
    """The value at step k: a number of the host, or one for each row that broadcasts over latents `like`."""
    at = values[k]
    return at.view(-1, *(1,) * (like.ndim - 1)) if at.ndim else at


def mean_square(x: Tensor) -> Tensor:
    """`‖x‖²` as a mean over elements: [n] of [n, *latent]."""
    return (x**2).flatten(1).mean(1)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of `x` [B, *latent] under `N(mean, std² I)`, summed over elements, all constants included; [B]."""
    log_prob = -((x - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(1).sum(1)
