"""How much memory a run will need, from shapes alone: nothing is loaded, networks are built without storage."""

import json
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bench import registry
from bench.models import catalogue, emoji, layout
from bench.models.pipeline import PipelineModel
from bench.settings import RunConfig
from bench.weights import random_weights
from bench.weights.requirements import requirements

FLOAT = 4  # bytes of a float32
ADAM = 4  # a trained float32 number is kept four times: itself, its gradient, two moments


def estimate_memory(config: RunConfig, dtype: torch.dtype) -> dict[str, int] | None:
    """Bytes by purpose while training; None where the architecture is not known or does not matter (analytic models).

    weights: of the model, the rewards and the feature spaces, these as large as their files. trained: adapters with
    gradient, optimiser and copies. round: the trajectories held. backward: what one micro-batch keeps for its backward
    pass through one call of the denoiser and, for methods that ask for the reward's gradient, the decoder. The method's
    own networks, the reward network's activations and scratch space come on top.
    """
    layout.quiet_libraries()
    built = networks(config)
    if built is None:
        return None
    kind, network, vae = built
    weights = {"denoiser": _bytes(network, dtype), "vae": _bytes(vae, torch.float32)}
    network.requires_grad_(config.model.finetune == "full")
    if config.model.finetune == "lora":
        network.add_adapter(LoraConfig(r=config.model.lora_rank, target_modules=list(kind.lora_targets)))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    dtype = torch.float32 if config.model.finetune == "full" else dtype
    network.to(dtype)
    shape, parts = kind.shapes(network.config)
    with torch.device("meta"):
        z, t = torch.empty(1, *shape), torch.empty(1)
        conditioning = {name: torch.empty(1, *part, dtype=dtype) for name, part in parts.items()}
        denoise = _saved(network, lambda: kind.denoise(network, z.to(dtype), t, conditioning))
        decode = _saved(vae, lambda: vae.decode(z.requires_grad_()).sample)
    method = registry.load("methods", config.method.name)
    needs, options = method.needs, method.Config(**config.method.model_dump(exclude={"name"}))
    copies = len(method(options).copies().keys() | ({"ema"} if config.train.ema else set()))
    train = config.train
    rows = train.micro_batch * (1 if config.sampler.guidance == 1 else 2)
    images = (1 if config.model.checkpointing else train.micro_batch) if needs.reward_gradient else 0
    latent = math.prod(shape) * FLOAT
    kept = 1 + len(needs.record & {"model_output", "prior_output"})
    rewards = sum(need.size for need in requirements(config) if need != catalogue.need(config.model.name))
    return {
        "weights": sum(weights.values()) + rewards,
        "trained": trained * (ADAM + copies) * FLOAT,
        "round": train.prompts_per_round * train.samples_per_prompt * (config.sampler.steps + 1) * latent * kept,
        "backward": rows * denoise + images * decode,
    }


def networks(config: RunConfig) -> tuple[type[PipelineModel], Any, Any] | None:
    """Family, and denoiser and autoencoder without storage, from the folder's configs or architectures known here."""
    if catalogue.is_analytic(config.model.name):
        return None
    repository = catalogue.need(config.model.name)
    if repository is None or not repository.missing():
        folder = catalogue.locate(config.model.name)
        kind = catalogue.family(folder)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf8"))
        with torch.device("meta"):
            return kind, *(_empty(index[name][1], _part(folder, name)) for name in (kind.denoiser, "vae"))
    if config.model.name in random_weights.UNET:
        with torch.device("meta"):
            found = random_weights.denoiser(config.model.name), random_weights.autoencoder("full")
        return registry.load("models", "StableDiffusionPipeline"), *found
    return None


def _part(folder: Path, name: str) -> Path:
    own = folder / name
    return own if own.is_dir() else emoji.WEIGHTS / name  # which emoji_flow shares


def _empty(class_name: str, folder: Path) -> Any:
    kind = getattr(import_module("diffusers"), class_name)
    return kind.from_config(kind.load_config(folder))


def _bytes(network: nn.Module, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in network.parameters()) * dtype.itemsize


def _saved(network: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass, parameters apart."""
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    seen: dict[int, tuple[int, Any]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes(), storage  # the storage too, so that its number is not used again
        return tensor

    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    del output
    return sum(size for size, _ in seen.values())


class _FusedAttention(TorchFunctionMode):
    """Attention that keeps inputs and output, as the fused kernels do; without storage torch takes the plain one."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return function(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise NotImplementedError("shapes only")
