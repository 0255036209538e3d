"""How much memory a run will need, from shapes alone: nothing is loaded, networks are built without storage."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bench import registry
from bench.models import catalogue
from bench.models.architecture import build
from bench.models.card import EmbeddedCard, HubCard
from bench.models.cards import CARDS
from bench.models.checks import quiet_libraries
from bench.models.family import Blueprint, Family
from bench.models.folder import read, used_parts
from bench.models.lora import add_lora
from bench.models.pipeline import PipelineModel
from bench.models.precision import network_dtype
from bench.models.quantized import BYTES, quantizable
from bench.models.sharded import largest_gathered
from bench.runs.requirements import requirements
from bench.runtime import memory
from bench.settings import RunConfig

FLOAT = 4  # bytes of a float32
LARGEST = 64  # rows at once; an H200 gains nothing by more
SHARE = 0.8  # of a GPU's memory; the rest is for what the estimate leaves out
Described = dict[str, tuple[str, dict[str, Any]]]  # class and configuration by part
ADAM = 4  # a trained float32 number is kept four times: itself, its gradient, two moments


def estimate_memory(config: RunConfig, dtype: torch.dtype, processes: int = 1) -> dict[str, int] | None:
    """Bytes by purpose while training; None where the architecture is not known or does not matter (analytic models).

    weights: of the model and its text encoders, of the rewards and the feature spaces; the last two as large as their
    files. With `model.offload` the text encoders and the decoder count only where they work.
    trained: adapters with gradient, optimiser and copies. round: the trajectories of a round.
    backward: what one micro-batch saves for its backward pass through one call of the denoiser. For methods that ask
    for the reward's gradient, the decoder's saved tensors for the rows that are differentiated at a time are added.
    With `model.offload` it is at least what the text encoders take, which work while nothing is saved.
    processes: that share the denoiser's weights, with `model.shard`; each gathers a block beside its part of them.
    The method's own networks, the reward network's activations and scratch space come on top.
    """
    shapes = model_shapes(config, dtype)
    return None if shapes is None else memory_of(config, shapes, processes)


@dataclass(frozen=True)
class Shapes:
    """What a model takes whatever the batches.

    denoiser, decoder, encoders: bytes of weights. spared: bytes that quantised weights save of them, by the kind.
    gathered: bytes of the denoiser's weights that are whole at a time, where processes share them.
    trained: numbers; latent: bytes of one. denoise, decode: bytes saved for the backward pass of one row through the
    denoiser and of one image through the decoder; decoded: images that are decoded at a time.
    """

    denoiser: int
    decoder: int
    encoders: int
    spared: Mapping[str, float]
    gathered: int
    trained: int
    latent: int
    denoise: int
    decode: int
    decoded: int


_known: dict[str, Shapes] = {}  # by all that they follow from: plans and presets ask for them several times


def model_shapes(config: RunConfig, dtype: torch.dtype) -> Shapes | None:
    """The shapes of the configured model with a denoiser of that precision; None as of `estimate_memory`."""
    quiet_libraries()
    described = _described(config)
    if described is None:
        return None
    own = config.model.model_dump(include={"finetune", "lora", "size", "frames"})
    key = json.dumps([described.family.__qualname__, *described[1:], own, str(dtype)])
    if key not in _known:
        _known[key] = _shapes(_blueprint(described, config), config, dtype)
    return _known[key]


def _shapes(pipeline: Blueprint, config: RunConfig, dtype: torch.dtype) -> Shapes:
    family, spec, vae = pipeline.family, pipeline.spec, pipeline.networks["vae"]
    denoiser, decoder = _numbers(pipeline.network) * dtype.itemsize, _numbers(vae) * FLOAT
    encoders = sum(_numbers(net) for net in pipeline.networks.values() if net not in (pipeline.network, vae))
    if config.model.finetune == "none":  # another denoiser may stand beside it
        denoiser *= 2
    linear = sum(layer.weight.numel() for layer in quantizable(pipeline.network.requires_grad_(False)))
    spared = {kind: linear * (dtype.itemsize - size) for kind, size in BYTES.items()}
    pipeline.network.requires_grad_(config.model.finetune == "full")
    if config.model.finetune == "lora":
        add_lora(pipeline.network, config.model.lora, family.lora_targets)
    trained = sum(p.numel() for p in pipeline.network.parameters() if p.requires_grad)
    denoise, decode = _saved_by_row(pipeline, torch.float32 if config.model.finetune == "full" else dtype)
    decoded = family.decoder_rows(torch.empty(1, *spec.latent_shape, device="meta"), vae)
    latent, encoders = math.prod(spec.latent_shape) * FLOAT, encoders * dtype.itemsize
    gathered = largest_gathered(pipeline.network) * dtype.itemsize
    return Shapes(denoiser, decoder, encoders, spared, gathered, trained, latent, denoise, decode, decoded)


def memory_of(config: RunConfig, shapes: Shapes, processes: int = 1) -> dict[str, int]:
    """`estimate_memory` of a configuration whose model has these shapes."""
    method = registry.load("methods", config.method.name)
    needs, options = method.needs, method.Config(**config.method.model_dump(exclude={"name"}))
    copies = len(method(options).copies().keys() | ({"ema"} if config.train.ema else set()))
    train = config.train
    micro_batch = train.micro_batch or LARGEST
    rows = micro_batch * cast(Any, catalogue.model_class(config.model.name, config.model.t5)).rows(
        config.loss_guidance()
    )
    images = 1 if config.model.checkpointing else min(micro_batch, shapes.decoded)
    recorded = 1 + len(needs.record & {"model_output", "prior_output"})
    others = requirements(config)[bool(catalogue.repository(config.model.name)) :]  # the model's weights come first
    weights = shapes.denoiser - int(shapes.spared.get(config.model.quantize or "", 0))
    if config.model.shard and processes > 1:
        weights = -(-weights // processes) + shapes.gathered
    backward = rows * shapes.denoise + images * shapes.decode * needs.reward_gradient
    if config.model.offload:
        backward = max(backward + shapes.decoder * needs.reward_gradient, shapes.decoder, shapes.encoders)
    else:
        weights += shapes.decoder + shapes.encoders
    return {
        "weights": weights + sum(files.size for files in others),
        "trained": shapes.trained * (ADAM + copies) * FLOAT,
        "round": train.prompts_per_round
        * train.samples_per_prompt
        * (config.sampler.steps + 1)
        * shapes.latent
        * recorded,
        "backward": backward,
    }


def _saved_by_row(pipeline: Blueprint, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that autograd saves for one row of the denoiser, whose precision is `dtype`, and of the decoder."""
    family, spec, network, vae = pipeline.family, pipeline.spec, pipeline.network, pipeline.networks["vae"]
    network.to(dtype)
    with torch.device("meta"):
        z, t = torch.empty(1, *spec.latent_shape), torch.empty(1)
        denoise = _saved(network, lambda: family.denoise(network, z.to(dtype), t, family.blank(spec, dtype)))
        decode = _saved(vae, lambda: vae.decode(family.vae_latents(z, vae).requires_grad_()).sample)
    return denoise, decode


def with_batches(config: RunConfig, device: torch.device, processes: int = 1, total: int | None = None) -> RunConfig:
    """The configuration with a choice for the batch sizes that it leaves open.

    That is the largest power of two whose estimate takes at most `SHARE` of the device's memory, at most `LARGEST`, and
    small enough that every process gets a part of a round and of an update. total: bytes of the device's memory; None:
    it is asked.
    """
    train = config.train
    if train.micro_batch and train.sample_batch:
        return config
    rows = train.micro_batch or _fitting(config, device, total, processes)
    whole = train.prompts_per_round * train.samples_per_prompt
    sample = train.sample_batch or min(LARGEST, 2 * rows, -(-whole // processes) if processes > 1 else LARGEST)
    update = -(-whole // train.updates_per_round)
    micro = train.micro_batch or min(rows, -(-update // processes) if processes > 1 else rows)
    return _with_batches(config, micro, sample)


def _with_batches(config: RunConfig, micro: int, sample: int | None = None) -> RunConfig:
    batches = {"micro_batch": micro, "sample_batch": sample}
    return config.model_copy(update={"train": config.train.model_copy(update=batches)})


def _fitting(config: RunConfig, device: torch.device, total: int | None, processes: int) -> int:
    total = total or (memory.available(device) or (0, None))[1]
    shapes = model_shapes(config, network_dtype(config.model, device)) if total else None
    rows = LARGEST
    while shapes and total and rows > 1:
        if sum(memory_of(_with_batches(config, rows), shapes, processes).values()) <= SHARE * total:
            break
        rows //= 2
    return rows


def blueprint(config: RunConfig) -> Blueprint | None:
    """The model without its weights, from its folder's configurations or from its card; None of an analytic model.

    None too for a hub id whose configurations are not here yet.
    """
    described = _described(config)
    return None if described is None else _blueprint(described, config)


class _Description(NamedTuple):
    """A pipeline's family, its `model_index.json`, and the class and configuration of each part."""

    family: type[PipelineModel]
    pipeline: dict[str, Any]
    parts: Described


def _described(config: RunConfig) -> _Description | None:
    name, t5 = config.model.name, config.model.t5
    family = catalogue.model_class(name, t5)
    if family is None or not issubclass(family, PipelineModel):
        return None
    card = CARDS.get(name)
    if isinstance(card, HubCard) and not catalogue.is_here(name, t5):
        return _Description(family, *_of_card(card, family, t5))
    return _Description(family, *_of_folder(name, family, t5))


def _blueprint(described: _Description, config: RunConfig) -> Blueprint:
    family, parts = described.family, dict(described.parts)
    scheduler, options = parts.pop("scheduler")
    with torch.device("meta"):
        networks = {part: build(*description) for part, description in parts.items()}
    configs = {part: networks[part].config for part in (family.denoiser, "vae")}
    configs["scheduler"] = getattr(diffusers, scheduler).from_config(options).config
    picture = family.asked(config.model)
    return Blueprint(family, networks, family.describe({"pipeline": described.pipeline, "picture": picture, **configs}))


def _of_folder(name: str, family: type[Family], t5: bool) -> tuple[dict[str, Any], Described]:
    """The index, and what it names, from files; parts that the folder lacks are its card's lender's."""
    folder, card = catalogue.pipeline_folder(name, t5), CARDS.get(name)
    lender = card.lender if isinstance(card, EmbeddedCard) else None
    described = {}
    for part, kind in used_parts(folder, family, t5).items():
        if not part.startswith("tokenizer"):
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            path = folder / part / file
            if lender and not path.is_file():
                path = lender / part / file
                if not path.is_file():  # the lender's other encoder serves as this one too
                    continue
            described[part] = (kind, read(path))
    return read(folder / "model_index.json"), described


def _of_card(card: HubCard, family: type[Family], t5: bool) -> tuple[dict[str, Any], Described]:
    architecture = card.architecture
    index = {part: (None, network.kind) for part, network in architecture.networks.items()} | architecture.options
    left_out = frozenset() if t5 else family.optional
    described = {part: (net.kind, net.full) for part, net in architecture.networks.items() if part not in left_out}
    return index, described | {"scheduler": architecture.scheduler}


def _numbers(network: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))


def _saved(network: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves of a forward pass, without the parameters."""
    parameters = {p.untyped_storage()._cdata for p in network.parameters()}
    storages: dict[int, tuple[int, Any]] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage.nbytes(), storage  # the storage too: its number must not be used again
        return tensor

    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = forward()
    del output
    return sum(size for size, _ in storages.values())


class _FusedAttention(TorchFunctionMode):
    """Attention that saves inputs and output, as the fused kernels do. Without storage torch takes the plain one."""

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
