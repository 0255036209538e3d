"""Adapters as code outside this project trains and stores them: peft and diffusers alone, and kohya's layout."""

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file

TARGETS = ["to_q", "to_v"]


def random_lora(network: Any, seed: int = 0, alpha: int = 8, targets: Any = TARGETS, **options: Any) -> dict[str, Any]:
    """Names of peft → tensors, of an adapter of rank 2 with random weights that `network` then has."""
    config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=targets, **options)
    peft.inject_adapter_in_model(config, network, "default")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return peft.get_peft_model_state_dict(network, adapter_name="default")


def save_peft(network: Any, folder: Path, **options: Any) -> Path:
    """As peft's `save_pretrained` stores it."""
    targets = options.pop("target_modules", TARGETS)
    wrapped = peft.get_peft_model(network, peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return folder


def save_diffusers(pipe: Any, part: str, folder: Path, seed: int = 0) -> Path:
    """As diffusers' training scripts store it: the scale is in the file's metadata."""
    network = getattr(pipe, part)
    state = random_lora(network, seed)
    metadata = {f"{part}_lora_adapter_metadata": network.peft_config["default"].to_dict()}
    pipe.save_lora_weights(folder, **{f"{part}_lora_layers": state}, **metadata)
    return folder


def save_kohya(parts: dict[str, Any], file: Path, alpha: float = 4.0) -> Path:
    """As kohya's scripts store it. parts: prefix ("lora_unet", "lora_te") → network."""
    tensors = {}
    for number, (prefix, network) in enumerate(parts.items()):
        targets = TARGETS if prefix == "lora_unet" else ["q_proj", "v_proj", "out_proj"]
        for name, tensor in random_lora(network, seed=number, targets=targets).items():
            module, _, kind = name.removesuffix(".weight").rpartition(".")
            level = "text_model_" * (prefix == "lora_te")
            stem = f"{prefix}_{level}{module.replace('.', '_')}"
            tensors[f"{stem}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = tensor.contiguous()
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return file
