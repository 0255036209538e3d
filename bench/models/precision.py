"""How precisely a model's numbers are computed."""

import torch

from bench.models.catalogue import ships
from bench.settings import ModelConfig


def network_dtype(config: ModelConfig, device: torch.device | str) -> torch.dtype:
    """The denoiser's precision. "auto" is bfloat16 on a GPU, except for the models that ship, and float32 elsewhere."""
    if config.dtype not in ("auto", "tf32"):
        return getattr(torch, config.dtype)
    on_gpu = torch.device(device).type == "cuda"
    return torch.bfloat16 if config.dtype == "auto" and on_gpu and not ships(config.name) else torch.float32


def use_precision(config: ModelConfig, device: torch.device | str) -> None:
    """Let this process's GPU round float32 products to TF32 beside a 16-bit denoiser or where that is asked for.

    Otherwise they are exact, and a float32 run gives the CPU's numbers. By default torch rounds those of convolutions.
    """
    rounded = config.dtype == "tf32" or network_dtype(config, device) != torch.float32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = rounded
