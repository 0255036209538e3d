"""Fixtures of the methods' tests."""

import pytest
import torch
from golden_numbers import golden
from torch import Tensor


@pytest.fixture(scope="module")
def sd_alphas_cumprod() -> Tensor:
    """Stable Diffusion's schedule in float32, as diffusers computes it."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    sd_alphas_cumprod = torch.cumprod(1 - betas, 0)
    for t, alpha in golden("item1_nabla_step")["alphas_cumprod_f32_at"].items():
        assert sd_alphas_cumprod[int(t)].item() == pytest.approx(torch.tensor(alpha).item(), rel=1e-8)
    return sd_alphas_cumprod
