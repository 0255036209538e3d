"""Priors whose finetuned optimum is known in closed form, so that methods can be checked against the truth."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.models.base import DiffusionModel

FILE = "analytic.safetensors"


class GaussianModel(DiffusionModel):
    """Prior data `N(m, s² I)` in d dimensions, with the exact noise prediction

    `ε_#(z, t) = e_t (z − √ᾱ_t m)`, `e_t = √(1−ᾱ_t) / (ᾱ_t s² + 1 − ᾱ_t)`.

    The finetuned part adds `bias_t + slope_t z` to it (zero at the start), so every step's mean is any affine function
    of the latent. Under the reward `r(x) = w·x` the target's transitions are in that family, and the gradient of their
    log-flow is a constant vector a step. Latents are [B, d]; the decoder is the identity, so rewards see [B, d].

    mean: of the data, one number or d of them; std: `s`. dtype: of parameters, schedule and predictions; float64 shows
    whether an equation holds exactly. Prompts are accepted and ignored: conditioning is [B, 1] of zeros.
    """

    steps_offset = 1

    def __init__(
        self,
        dim: int = 2,
        mean: float | Sequence[float] = 0.7,
        std: float = 0.6,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got {dim}: one dimension cannot tell sums from means")
        self.device, self.dtype, self.latent_shape = torch.device(device), dtype, (dim,)
        self.mean = torch.as_tensor(mean, dtype=dtype, device=self.device).expand(dim)
        self.std = std
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's schedule
        self.alphas_cumprod = torch.cumprod(1 - betas, 0).to(dtype)
        self.final_alpha = float(self.alphas_cumprod[0])
        self.network = _Denoiser(self.alphas_cumprod, self.mean, std).to(self.device)

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

    def adapters(self) -> dict[str, nn.Parameter]:
        """`bias` and `slope`, [T, d] each."""
        return dict(self.network.named_parameters())

    def save(self, folder: Path) -> None:
        """Write bias and slope as safetensors."""
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
        """One affine map a time, zero at the start: the exact flow gradient is in the family, so sizes are ignored."""
        return _AffineNetwork(len(self.alphas_cumprod), self.latent_shape[0], self.dtype).to(self.device)

    def fingerprint(self) -> str:
        """Hash of the prior's settings."""
        settings = repr(("gaussian", self.mean.tolist(), self.std, str(self.dtype)))
        return hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()


class _Affine(nn.Module):
    """`(z [B, d], t [B]) → bias_t + slope_t z`, zero at the start."""

    def __init__(self, times: int, dim: int, dtype: torch.dtype):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(times, dim, dtype=dtype))
        self.slope = nn.Parameter(torch.zeros(times, dim, dtype=dtype))

    def affine(self, z: Tensor, t: Tensor) -> Tensor:
        return self.bias[t] + self.slope[t] * z


class _AffineNetwork(_Affine):
    def forward(self, z: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        return self.affine(z.to(self.bias.dtype), t)


class _Denoiser(_Affine):
    """The Gaussian prior's noise prediction plus the finetuned affine part."""

    def __init__(self, alphas_cumprod: Tensor, mean: Tensor, std: float):
        super().__init__(len(alphas_cumprod), len(mean), mean.dtype)
        self.register_buffer("alphas", alphas_cumprod.unsqueeze(1).clone())
        self.register_buffer("mean", mean.clone())
        self.variance = std**2

    def forward(self, z: Tensor, t: Tensor, prior: bool) -> Tensor:
        alpha = self.alphas[t]
        gain = (1 - alpha) ** 0.5 / (alpha * self.variance + 1 - alpha)
        eps = gain * (z - alpha**0.5 * self.mean)
        return eps if prior else eps + self.affine(z, t)
