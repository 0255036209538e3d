"""How precisely a model's numbers are computed."""

import torch

from bench.models.catalogue import EMBEDDED, is_analytic
from bench.settings import ModelConfig


def network_dtype(config: ModelConfig, device: torch.device | str) -> torch.dtype:
    """The denoiser's precision; "auto" is bfloat16 on a GPU, but for the models that ship, and float32 elsewhere."""
    if config.dtype not in ("auto", "tf32"):
        return getattr(torch, config.dtype)
    ships = config.name in EMBEDDED or is_analytic(config.name)
    large = config.dtype == "auto" and torch.device(device).type == "cuda" and not ships
    return torch.bfloat16 if large else torch.float32


def use_precision(config: ModelConfig, device: torch.device | str) -> None:
    """Let this process's GPU round float32 products to TF32 beside a 16-bit denoiser or where that is asked for.

    Otherwise they are exact, and a float32 run gives the CPU's numbers; by itself torch rounds those of convolutions.
    """
    rounded = config.dtype == "tf32" or network_dtype(config, device) != torch.float32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = rounded
