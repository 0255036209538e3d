"""Colourfulness in closed form."""

import torch
from torch import Tensor

from bench import Reward


class Colorfulness(Reward):
    """`√(σ_rg² + σ_yb²) + 0.3 √(μ_rg² + μ_yb²)` with `rg = R − G`, `yb = (R + G)/2 − B` of 8-bit values."""

    scale = "0 (grey) to about 150; 109 is 'extremely colourful'"
    source = "Hasler and Süsstrunk (2003), Measuring colourfulness in natural images"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        red, green, blue = (255 * images).flatten(2).unbind(1)
        opponent = torch.stack([red - green, (red + green) / 2 - blue], 1)
        mean = opponent.mean(2)
        # vector_norm, unlike a square root, has a finite gradient (zero) at a grey or constant image
        spread = torch.linalg.vector_norm(opponent - mean[..., None], dim=(1, 2)) / opponent.shape[2] ** 0.5
        return spread + 0.3 * torch.linalg.vector_norm(mean, dim=1)
