"""How much memory a run will need, from shapes alone: nothing is loaded, networks are built without storage."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bench import registry
from bench.models import catalogue, emoji, layout
from bench.models.architectures import ARCHITECTURES, build
from bench.models.pipeline import TEXT_ENCODERS, PipelineModel
from bench.models.precision import network_dtype
from bench.runs.requirements import requirements
from bench.runtime import memory
from bench.settings import RunConfig

FLOAT = 4  # bytes of a float32
LARGEST = 64  # rows at once; an H200 gains nothing by more
SHARE = 0.8  # of a GPU's memory; the rest is for what the estimate leaves out
ADAM = 4  # a trained float32 number is kept four times: itself, its gradient, two moments


def estimate_memory(config: RunConfig, dtype: torch.dtype) -> dict[str, int] | None:
    """Bytes by purpose while training; None where the architecture is not known or does not matter (analytic models).

    weights: of the model and its text encoders, the rewards and the feature spaces, these as large as their files.
    trained: adapters with gradient, optimiser and copies. round: the trajectories held. backward: what one
    micro-batch keeps for its backward pass through one call of the denoiser and, for methods that ask for the reward's
    gradient, as many rows of the decoder as are differentiated at a time. The method's own networks, the reward
    network's activations and scratch space come on top.
    """
    layout.quiet_libraries()
    built = networks(config)
    if built is None:
        return None
    kind, parts = built
    network, vae = parts[kind.denoiser], parts["vae"]
    weights = sum(_numbers(part) * (FLOAT if part is vae else dtype.itemsize) for part in parts.values())
    network.requires_grad_(config.model.finetune == "full")
    if config.model.finetune == "lora":
        network.add_adapter(LoraConfig(r=config.model.lora_rank, target_modules=list(kind.lora_targets)))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    dtype = torch.float32 if config.model.finetune == "full" else dtype
    network.to(dtype)
    shape, texts = kind.shapes(network.config, vae.config)
    with torch.device("meta"):
        z, t = torch.empty(1, *shape), torch.empty(1)
        conditioning = {name: torch.empty(1, *text, dtype=dtype) for name, text in texts.items()}
        denoise = _saved(network, lambda: kind.denoise(network, z.to(dtype), t, conditioning))
        decoded = kind.decoder_rows(z, vae)
        decode = _saved(vae, lambda: vae.decode(kind.vae_latents(z, vae).requires_grad_()).sample)
    method = registry.load("methods", config.method.name)
    needs, options = method.needs, method.Config(**config.method.model_dump(exclude={"name"}))
    copies = len(method(options).copies().keys() | ({"ema"} if config.train.ema else set()))
    train = config.train
    rows = train.micro_batch * kind.rows(config.loss_guidance())
    images = 1 if config.model.checkpointing else min(train.micro_batch, decoded)
    latent = math.prod(shape) * FLOAT
    kept = 1 + len(needs.record & {"model_output", "prior_output"})
    others = requirements(config)[bool(catalogue.need(config.model.name)) :]  # the model's weights come first
    return {
        "weights": weights + sum(need.size for need in others),
        "trained": trained * (ADAM + copies) * FLOAT,
        "round": train.prompts_per_round * train.samples_per_prompt * (config.sampler.steps + 1) * latent * kept,
        "backward": rows * denoise + images * decode * needs.reward_gradient,
    }


def with_batches(config: RunConfig, device: torch.device, processes: int = 1) -> RunConfig:
    """The configuration with the batches chosen that it leaves open.

    The largest power of two whose estimate takes at most `SHARE` of the device's memory, never above `LARGEST`, and no
    more than leaves a part of a round and of an update to every process.
    """
    train = config.train
    if train.micro_batch and train.sample_batch:
        return config
    rows = train.micro_batch or _fitting(config, device)
    whole = train.prompts_per_round * train.samples_per_prompt
    sample = train.sample_batch or min(LARGEST, 2 * rows, -(-whole // processes) if processes > 1 else LARGEST)
    update = -(-whole // train.updates_per_round)
    micro = train.micro_batch or min(rows, -(-update // processes) if processes > 1 else rows)
    return _with_batches(config, micro, sample)


def _with_batches(config: RunConfig, micro: int, sample: int | None = None) -> RunConfig:
    batches = {"micro_batch": micro, "sample_batch": sample}
    return config.model_copy(update={"train": config.train.model_copy(update=batches)})


def _fitting(config: RunConfig, device: torch.device) -> int:
    dtype, known = network_dtype(config.model, device), memory.available(device)
    rows = LARGEST
    while known and rows > 1:
        estimate = estimate_memory(_with_batches(config, rows), dtype)
        if estimate is None or sum(estimate.values()) <= SHARE * known[1]:
            break
        rows //= 2
    return rows


def networks(config: RunConfig) -> tuple[type[PipelineModel], dict[str, Any]] | None:
    """Family, and its networks by their names, without storage: from the folder's configs or what is known here."""
    name, t5 = config.model.name, config.model.t5
    kind = catalogue.known_family(name, t5)
    if kind is None or not issubclass(kind, PipelineModel):
        return None
    wanted = [kind.denoiser, "vae", *(part for part in TEXT_ENCODERS if t5 or part not in kind.optional)]
    with torch.device("meta"):
        if catalogue.is_here(name, t5):
            folder = catalogue.locate(name, t5)
            index = json.loads((folder / "model_index.json").read_text(encoding="utf8"))
            found = {}
            for part in wanted:
                own = [place / part / "config.json" for place in (folder, emoji.WEIGHTS)[: 1 + (folder == emoji.FLOW)]]
                if file := next(filter(Path.is_file, own), None):
                    found[part] = build(index[part][1], json.loads(file.read_text(encoding="utf8")))
            return kind, found
        known = ARCHITECTURES[name]
        return kind, {part: known.build(part, "full") for part in wanted if part in known.networks}


def _numbers(network: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))


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
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _Attention.apply(*(args or (kwargs["query"], kwargs["key"], kwargs["value"]))[:3])
        return function(*args, **kwargs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise NotImplementedError("shapes only")
