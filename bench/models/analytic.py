"""Priors whose exact noise prediction is known, so that methods can be checked against the truth."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.models.base import DiffusionModel
from bench.sampling.noise import seeded

FILE = "analytic.safetensors"
TIMES = 1000


class AnalyticModel(DiffusionModel):
    """Prior data from an equal mixture of M Gaussians `N(m_i, s² I)` in d dimensions, with the exact noise prediction

    `ε_#(z, t) = √(1−ᾱ_t) / (ᾱ_t s² + 1 − ᾱ_t) · Σ_i w_i(z) (z − √ᾱ_t m_i)`, w the posterior of the component.

    The finetuned part is added to it and starts at zero. Latents are [B, d]; the decoder is the identity, so rewards
    see points. Prompts are accepted and ignored: conditioning is [B, 1] of zeros, and there is no guidance.

    means: [M, d]; std: `s`; alphas_cumprod: [T]; finetuned, and any latent network: made by `network_class`.
    dtype: of parameters, schedule and predictions; float64 shows whether an equation holds exactly.
    """

    def __init__(
        self,
        means: Tensor,
        std: float,
        alphas_cumprod: Tensor,
        steps_offset: int,
        network_class: "type[_Affine] | type[_Residual]",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ):
        self.device, self.dtype, self.latent_shape = torch.device(device), dtype, (means.shape[1],)
        self.means, self.std, self.steps_offset = means.to(self.device, dtype), std, steps_offset
        self.modes = self.means if len(means) > 1 else None
        self.alphas_cumprod = alphas_cumprod.to(dtype)
        self.final_alpha = float(self.alphas_cumprod[0])
        self.network_class = network_class
        with seeded(seed, "adapter"):
            finetuned = network_class(self.latent_shape[0], dtype)
        self.network = _Denoiser(self.alphas_cumprod, self.means, std, finetuned).to(self.device)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Zeros [B, 1]."""
        return torch.zeros(len(prompts), 1, dtype=self.dtype, device=self.device)

    def predict(
        self, z: Tensor, t: Tensor, conditioning: Tensor, *, prior: bool = False, guided: bool = True
    ) -> Tensor:
        """See `DiffusionModel.predict`; [B, d] in the model's dtype. Without conditions there is no guidance."""
        return self.network(z.to(self.dtype), t.to(z.device).expand(len(z)), prior)

    def decode(self, z: Tensor) -> Tensor:
        """The latent itself, [B, d]."""
        return z

    def log_density(self, x: Tensor) -> Tensor:
        """Log-density [B] of the prior's data at points [B, d]."""
        squares = (x[:, None].to(self.means) - self.means).square().sum(2) / (2 * self.std**2)
        constant = len(self.means) * (2 * math.pi * self.std**2) ** (x.shape[1] / 2)
        return torch.logsumexp(-squares, 1) - math.log(constant)

    def adapters(self) -> dict[str, nn.Parameter]:
        """The parameters of the finetuned part."""
        return dict(self.network.finetuned.named_parameters())

    def save(self, folder: Path) -> None:
        """Write the finetuned part as safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: parameter.detach().cpu() for name, parameter in self.adapters().items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; raises FileNotFoundError or ValueError."""
        state, own = load_file(folder / FILE), self.adapters()
        if {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in own.items()}:
            raise ValueError(f"{folder / FILE} does not fit this model (another number of dimensions?)")
        for name, parameter in own.items():
            parameter.data.copy_(state[name])

    def latent_network(self, channels: Sequence[int], layers_per_block: int = 1) -> nn.Module:
        """A network of the finetuned part's own kind, zero at the start; sizes are ignored."""
        return self.network_class(self.latent_shape[0], self.dtype).to(self.device)

    def fingerprint(self) -> str:
        """Hash of the prior's settings."""
        levels = (self.alphas_cumprod[0].item(), self.alphas_cumprod[-1].item())
        settings = repr((self.means.tolist(), self.std, levels, self.steps_offset, str(self.dtype)))
        return hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()


class GaussianModel(AnalyticModel):
    """A single Gaussian on Stable Diffusion's schedule; the finetuned part is one affine map a time.

    So every step's mean is any affine function of the latent. Under the reward `r(x) = w·x` the target's transitions
    are in that family, and the gradient of their log-flow is a constant vector a step.
    """

    def __init__(self, dim: int = 2, mean: float | Sequence[float] = 0.7, std: float = 0.6, **options: object):
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got {dim}: one dimension cannot tell sums from means")
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMES, dtype=torch.float64) ** 2
        means = torch.as_tensor(mean, dtype=torch.float64).expand(1, dim)
        super().__init__(means, std, torch.cumprod(1 - betas, 0), 1, _Affine, **options)


class RingModel(AnalyticModel):
    """Eight Gaussians of deviation 0.3 on a circle of radius 3; the finetuned part is a small residual network.

    The schedule is DDPM's (linear, 1e-4 to 0.02); 20 steps run from t = 981 to 31.
    """

    def __init__(self, **options: object):
        angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
        betas = torch.linspace(1e-4, 0.02, TIMES, dtype=torch.float64)
        means = 3 * torch.stack([angles.cos(), angles.sin()], 1)
        super().__init__(means, 0.3, torch.cumprod(1 - betas, 0), 31, _Residual, **options)


class _Affine(nn.Module):
    """`(z [B, d], t [B]) → bias_t + slope_t z`, zero at the start."""

    def __init__(self, dim: int, dtype: torch.dtype):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(TIMES, dim, dtype=dtype))
        self.slope = nn.Parameter(torch.zeros(TIMES, dim, dtype=dtype))

    def forward(self, z: Tensor, t: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return self.bias[t] + self.slope[t] * z.to(self.bias.dtype)


class _Residual(nn.Module):
    """`(z [B, d], t [B]) → [B, d]`: two hidden layers of 64, sinusoidal time features, zero at the start."""

    def __init__(self, dim: int, dtype: torch.dtype, width: int = 64, frequencies: int = 8):
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(-1, frequencies - 1, dtype=dtype))
        self.layers = nn.Sequential(
            nn.Linear(dim + 2 * frequencies, width, dtype=dtype),
            nn.SiLU(),
            nn.Linear(width, width, dtype=dtype),
            nn.SiLU(),
            nn.Linear(width, dim, dtype=dtype),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, z: Tensor, t: Tensor, conditioning: Tensor | None = None) -> Tensor:
        phase = (t / TIMES).to(self.frequencies)[:, None] * self.frequencies
        return self.layers(torch.cat([z.to(phase), phase.sin(), phase.cos()], 1))


class _Denoiser(nn.Module):
    """The prior's exact noise prediction plus the finetuned part."""

    def __init__(self, alphas_cumprod: Tensor, means: Tensor, std: float, finetuned: nn.Module):
        super().__init__()
        self.register_buffer("alphas", alphas_cumprod.unsqueeze(1).clone())
        self.register_buffer("means", means.clone())
        self.variance, self.finetuned = std**2, finetuned

    def forward(self, z: Tensor, t: Tensor, prior: bool) -> Tensor:
        alpha = self.alphas[t]
        spread = alpha * self.variance + 1 - alpha
        offsets = z[:, None] - (alpha**0.5)[:, None] * self.means
        posterior = torch.softmax(-offsets.square().sum(2) / (2 * spread), 1)
        eps = (1 - alpha) ** 0.5 / spread * (posterior[..., None] * offsets).sum(1)
        return eps if prior else eps + self.finetuned(z, t)
