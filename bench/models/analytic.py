"""Priors whose exact noise prediction is known, so that methods can be checked against the truth."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.few_step import FewStep
from bench.model import Conditioning, ModelSpec
from bench.models.exact import TIMES, ExactModel, time_features
from bench.runtime.digests import digest
from bench.sampling.noise import seeded
from bench.settings import SamplerConfig


class AnalyticModel(ExactModel):
    """Prior data from an equal mixture of M Gaussians `N(m_i, v I)` in d dimensions, with the exact prediction.

    On the path `z = α x + s ε`, w the posterior of the component, `e_i = (z − α m_i) / (α² v + s²)`:
    the noise is `ε_#(z) = s Σ_i w_i e_i`, the clean latent `x_#(z) = Σ_i w_i (m_i + α v e_i)`. A diffusion's network
    gives ε, a flow's (without alphas_cumprod; `α = 1−s`, `s = t/1000`) gives `ε − x`.

    The finetuned part is added to it and starts at zero. Latents are [B, d]; the decoder is the identity, so rewards
    see points. Prompts are accepted and ignored: conditioning is zeros, and there is no guidance.

    means: [M, d]; std: `√v`; alphas_cumprod: [T], or None for a rectified flow; finetuned, and any latent network: made
    by `network_class`.
    """

    points = True

    def __init__(
        self,
        means: Tensor,
        std: float,
        alphas_cumprod: Tensor | None,
        steps_offset: int,
        network_class: "type[_Affine] | type[_Residual]",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ):
        shape = (means.shape[1],)
        self.device, self.dtype, self.means, self.std = torch.device(device), dtype, means.to(device, dtype), std
        self.modes = self.means if len(means) > 1 else None
        levels = None if alphas_cumprod is None else alphas_cumprod.to(dtype)
        if levels is None:
            self.spec = ModelSpec(latent_shape=shape, output="flow", spacing="shifted", steps_offset=steps_offset)
        else:
            final = float(levels[0])
            self.spec = ModelSpec(
                latent_shape=shape, alphas_cumprod=levels, final_alpha=final, steps_offset=steps_offset
            )
        self.network_class = network_class
        with seeded(seed, "adapter"):
            self.finetuned = network_class(shape[0], dtype)
        self.network = _Denoiser(levels, self.means, std, self.finetuned).to(self.device)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Zeros [B, 1]."""
        return Conditioning({"text": torch.zeros(len(prompts), 1, dtype=self.dtype, device=self.device)})

    def decode(self, z: Tensor) -> Tensor:
        """The latent itself, [B, d]."""
        return z

    def log_density(self, x: Tensor) -> Tensor:
        """Log-density [B] of the prior's data at points [B, d]."""
        squares = (x[:, None].to(self.means) - self.means).square().sum(2) / (2 * self.std**2)
        constant = len(self.means) * (2 * math.pi * self.std**2) ** (x.shape[1] / 2)
        return torch.logsumexp(-squares, 1) - math.log(constant)

    def latent_network(self, channels: Sequence[int], layers_per_block: int = 1) -> nn.Module:
        """A network of the finetuned part's kind, zero at the start. Sizes are ignored."""
        return self.network_class(self.latent_shape[0], self.dtype).to(self.device)

    def fingerprint(self) -> str:
        """A hash of the prior's settings."""
        schedule = self.spec.alphas_cumprod
        return digest(
            {
                "means": self.means.tolist(),
                "std": self.std,
                "levels": None if schedule is None else schedule.tolist(),
                "dtype": str(self.dtype),
            }
        )


class GaussianModel(AnalyticModel):
    """One 2-D Gaussian, exact score; the finetuned optimum is known in closed form.

    The schedule is Stable Diffusion's. The finetuned part is one affine map a time, so that every step's mean can
    become any affine function of the latent. Under the reward `r(x) = w·x` the target's transitions
    are in that family, and the gradient of their log-flow is a constant vector a step.
    """

    def __init__(self, dim: int = 2, mean: float | Sequence[float] = 0.7, std: float = 0.6, **options: Any):
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got {dim}: one dimension cannot tell sums from means")
        means = torch.as_tensor(mean, dtype=torch.float64).expand(1, dim)
        super().__init__(means, std, self._levels(), 1, _Affine, **options)

    def _levels(self) -> Tensor | None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMES, dtype=torch.float64) ** 2
        return torch.cumprod(1 - betas, 0)


class GaussianFlowModel(GaussianModel):
    """The Gaussian as a rectified flow, exact velocity."""

    def _levels(self) -> None:
        return None


class RingModel(AnalyticModel):
    """Eight 2-D Gaussians on a circle, exact score; a run takes seconds and the target is known.

    They have deviation 0.3, the circle radius 3; the finetuned part is a small residual network. The schedule is DDPM's
    (linear, 1e-4 to 0.02); 20 steps run from t = 981 to 31.
    """

    def __init__(self, **options: Any):
        angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
        means = 3 * torch.stack([angles.cos(), angles.sin()], 1)
        super().__init__(means, 0.3, self._levels(), 31, _Residual, **options)

    def _levels(self) -> Tensor | None:
        return torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMES, dtype=torch.float64), 0)


class RingFlowModel(RingModel):
    """The ring as a rectified flow, exact velocity."""

    def _levels(self) -> None:
        return None


class RingFlowTurboModel(RingFlowModel):
    """A student of `ring_flow` with 4 steps, exact to 0.001: it follows the teacher's flow to the next noise level.

    Its samples are the ring's own, so the target is known too.
    """

    few_step = FewStep(
        steps=(4,),
        spacing="shifted",
        teacher=("ring_flow", SamplerConfig(steps=20, spacing="shifted", guidance=1)),
    )

    def __init__(self, **options: Any):
        super().__init__(**options)
        even = torch.linspace(1, 0, self.few_step.steps[0] + 1, dtype=self.dtype)
        self.levels = self.spec.shift * even / (1 + (self.spec.shift - 1) * even)
        self.network = _FlowMap(self.network, self.finetuned, self.levels).to(self.device)

    def fingerprint(self) -> str:
        """A hash of the teacher's settings and the student's levels."""
        return digest({"teacher": super().fingerprint(), "levels": self.levels.tolist()})


class _FlowMap(nn.Module):
    """A student's output for an exact velocity: the mean velocity of the flow up to the next of its noise levels.

    The finetuned part is added to it. levels: [K+1], falling from 1 to 0.
    """

    levels: Tensor

    def __init__(self, teacher: nn.Module, finetuned: nn.Module, levels: Tensor, substeps: int = 8):
        super().__init__()
        self.teacher, self.finetuned, self.substeps = teacher, finetuned, substeps
        self.register_buffer("levels", levels)

    def forward(self, z: Tensor, t: Tensor, conditioning: Conditioning, prior: bool) -> Tensor:
        s = t.to(z) / TIMES
        below = self.levels < s[:, None] - 1e-4  # the time is a rounded level
        step = (torch.where(below, self.levels, 0).amax(1) - s) / self.substeps
        x = z
        for i in range(self.substeps):  # the midpoint rule
            middle = x + step[:, None] / 2 * self.teacher(x, TIMES * (s + i * step), conditioning, True)
            x = x + step[:, None] * self.teacher(middle, TIMES * (s + (i + 0.5) * step), conditioning, True)
        output = (x - z) / (self.substeps * step)[:, None]
        return output if prior else output + self.finetuned(z, t)


class _Affine(nn.Module):
    """`(z [B, d], t [B]) → bias_t + slope_t z`, zero at the start; a flow's time is rounded to a whole one."""

    def __init__(self, dim: int, dtype: torch.dtype):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(TIMES + 1, dim, dtype=dtype))
        self.slope = nn.Parameter(torch.zeros(TIMES + 1, dim, dtype=dtype))

    def forward(self, z: Tensor, t: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        place = t.round().long() if t.is_floating_point() else t
        return self.bias[place] + self.slope[place] * z.to(self.bias.dtype)


class _Residual(nn.Module):
    """`(z [B, d], t [B]) → [B, d]`: two hidden layers of 64, sinusoidal time features, zero at the start."""

    def __init__(self, dim: int, dtype: torch.dtype, width: int = 64):
        super().__init__()
        hidden = [nn.Linear(dim + 16, width, dtype=dtype), nn.Linear(width, width, dtype=dtype)]
        last = nn.Linear(width, dim, dtype=dtype)
        self.layers = nn.Sequential(hidden[0], nn.SiLU(), hidden[1], nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, z: Tensor, t: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        dtype = next(self.layers.parameters()).dtype
        return self.layers(torch.cat([z.to(dtype), time_features(t, dtype)], 1))


class _Denoiser(nn.Module):
    """The prior's exact prediction plus the finetuned part; alphas_cumprod: None for a rectified flow."""

    alphas: Tensor | None
    means: Tensor

    def __init__(self, alphas_cumprod: Tensor | None, means: Tensor, std: float, finetuned: nn.Module):
        super().__init__()
        self.register_buffer("alphas", None if alphas_cumprod is None else alphas_cumprod.unsqueeze(1).clone())
        self.register_buffer("means", means.clone())
        self.variance, self.finetuned = std**2, finetuned

    def forward(self, z: Tensor, t: Tensor, conditioning: Conditioning, prior: bool) -> Tensor:
        if self.alphas is None:
            noise = t.to(z)[:, None] / TIMES
            signal = 1 - noise
            spread = signal**2 * self.variance + noise**2
        else:
            alpha = self.alphas[t]
            signal, noise, spread = alpha**0.5, (1 - alpha) ** 0.5, alpha * self.variance + 1 - alpha
        offsets = z[:, None] - signal[:, None] * self.means
        posterior = torch.softmax(-offsets.square().sum(2) / (2 * spread), 1)
        pull = (posterior[..., None] * offsets).sum(1)
        output = noise / spread * pull
        if self.alphas is None:
            output = output - posterior @ self.means - signal * self.variance / spread * pull
        return output if prior else output + self.finetuned(z, t)
