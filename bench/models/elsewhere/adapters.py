"""Adapters that others trained, read by diffusers and peft into the parts of a pipeline, whole or not at all."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors.torch import load_file
from torch import Tensor, float32, nn

from bench.errors import BenchError
from bench.models.elsewhere.sources import PEFT
from bench.models.folder import header, read
from bench.models.lora import Adapters
from bench.models.pipeline import PipelineModel
from bench.runtime.finite import require_finite_weights

FORMATS = {  # mark → what has such tensors
    "dora_scale": "DoRA in the layout of LyCORIS (diffusers would drop its magnitudes)",
    "hada_": "LoHa in the layout of LyCORIS",
    "lokr_": "LoKr in the layout of LyCORIS",
    "oft_": "OFT in the layout of LyCORIS",
    "lora_mid": "LoCon with a Tucker core",
}
UP = ("lora_B", "lora_up", "lora.up", "_lora.up", "hada_w1_b", "lokr_w2")  # of an untrained adapter they are zero
WAY_OUT = "load it with the code that trained it, and store it by peft's save_pretrained"
SHOWN = 3


def add_adapters(model: PipelineModel, folders: Sequence[Path], scales: Sequence[float]) -> None:
    """Let the model predict with the sum of adapters, each times its scale.

    folders: each with one adapter, in a .safetensors file of any layout that diffusers reads, or as peft stores it.
    Raises BenchError for a file that is damaged, empty, not finite, or does not fit the model in every tensor.
    """
    names = [f"judged{number}" for number in range(len(folders))]
    parts = {part: network for part, network in model.pipeline.components.items() if isinstance(network, nn.Module)}
    layers = {part: dict(network.named_modules()) for part, network in parts.items()}  # before any has an adapter
    for name, folder in zip(names, folders, strict=True):
        _add(model, layers, folder, name)
    adapted = {part: _switched(network, names, scales) for part, network in parts.items()}
    encoders = [adapters for part, adapters in adapted.items() if adapters.layers and part != model.denoiser]
    model.adopt_adapters(adapted[model.denoiser], encoders)


def _switched(network: nn.Module, names: Sequence[str], scales: Sequence[float]) -> Adapters:
    """The adapters in a network, on at their scales, in float32, without gradients."""
    adapters = Adapters(network, mergeable=True)
    for layer in adapters.layers.values():
        own = [name for name in names if any(name in getattr(layer, kind) for kind in layer.adapter_layer_names)]
        layer.set_adapter(own)
        for name in own:
            scale = scales[names.index(name)]
            if hasattr(layer, "set_scale"):
                layer.set_scale(name, scale)
            elif scale != 1:
                raise BenchError(f"an adapter of {type(layer).__name__} has no scale: judge it with --scale 1.")
    changed = [(name, p) for name, p in network.named_parameters() if set(name.split(".")) & set(names)]
    for _, parameter in changed:
        parameter.data = parameter.data.to(next(network.parameters()).device, float32)
    network.requires_grad_(False)
    adapters.mergeable = all(re.search(r"\.lora_[AB]\.\w+\.weight$", name) for name, _ in changed)
    return adapters


def _add(model: PipelineModel, layers: Mapping[str, Mapping[str, Any]], folder: Path, name: str) -> None:
    (file,) = folder.glob("*.safetensors")
    state = _read(file)
    as_peft = (folder / PEFT[0]).is_file()
    try:
        found = _of_peft(model, folder, state) if as_peft else _of_diffusers(model, file)
        _require_layers(model, layers, found, file)
        if as_peft:
            _inject(model.network, read(folder / PEFT[0]), found[model.denoiser], name)
        else:
            options = {"weight_name": file.name, "local_files_only": True, "use_safetensors": True}
            model.pipeline.load_lora_weights(str(folder), adapter_name=name, **options)
    except BenchError:
        raise
    except Exception as error:  # whatever a library raises over files of the user's
        kind = _format(state)
        reason = f"it is {kind}" if kind else f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise BenchError(
            f"{file} cannot be read as an adapter of {model.config.name!r} ({reason}): {WAY_OUT}."
        ) from error
    for part, tensors in found.items():
        loaded = peft.get_peft_model_state_dict(getattr(model.pipeline, part), adapter_name=name)
        if different := sorted(tensors.keys() ^ loaded.keys()):
            raise BenchError(f"{file}: {_listed(different)} of {part} did not match, so it is not judged: {WAY_OUT}.")


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file. Raises BenchError if it is damaged, empty, not finite, or does nothing."""
    if not header(file):
        raise BenchError(f"{file} is empty: it holds no tensors.")
    state = load_file(file)
    require_finite_weights(state.items(), file)
    ups = [tensor for key, tensor in state.items() if any(mark in key for mark in UP)]
    if ups and not any(bool(tensor.any()) for tensor in ups):
        raise BenchError(f"{file} changes nothing, as all its products are zero: it was never trained.")
    if any("dora_scale" in key for key in state):
        raise BenchError(f"{file} is {FORMATS['dora_scale']}: {WAY_OUT}.")
    return state


def _format(state: Mapping[str, Tensor]) -> str | None:
    return next((kind for mark, kind in FORMATS.items() if any(mark in key for key in state)), None)


def _of_diffusers(model: PipelineModel, file: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors by part of the pipeline and by peft's names, as the pipeline's own reader has them."""
    pipe = model.pipeline
    options: dict[str, Any] = {"weight_name": file.name, "local_files_only": True, "use_safetensors": True}
    if hasattr(pipe, "text_encoder_2") and hasattr(pipe, "unet"):
        options["unet_config"] = pipe.unet.config  # which the pipeline gives its own reader too
    read_by_pipe = pipe.lora_state_dict(str(file.parent), **options)
    state = read_by_pipe[0] if isinstance(read_by_pipe, tuple) else read_by_pipe
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        part, _, rest = key.partition(".")
        found.setdefault(part if part in pipe.components else "", {})[rest if part in pipe.components else key] = tensor
    if model.denoiser not in found:
        return found  # which is refused
    for part, tensors in found.items():
        if part == model.denoiser and "lora_A" not in next(iter(tensors)):
            found[part] = convert_unet_state_dict_to_peft(tensors)
        elif part.startswith("text_encoder"):
            named = convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))
            if not hasattr(getattr(pipe, part), "text_model"):  # a level that earlier versions of the library had
                named = {key.removeprefix("text_model."): tensor for key, tensor in named.items()}
            found[part] = named
    return found


def _of_peft(model: PipelineModel, folder: Path, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The same of a folder that peft has stored: all of it is of the denoiser."""
    config = read(folder / PEFT[0])
    for key, without in (("modules_to_save", None), ("bias", "none")):
        if config.get(key, without) not in (without, []):
            raise BenchError(
                f"{folder / PEFT[0]}: {key} = {json.dumps(config[key])} trains weights beside the adapter: store the "
                "whole model, and judge that."
            )
    return {model.denoiser: {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}}


def _inject(network: nn.Module, config: Mapping[str, Any], state: dict[str, Tensor], name: str) -> None:
    options = peft.PeftConfig.from_peft_type(**config)
    options.inference_mode = True
    peft.inject_adapter_in_model(options, network, name)
    peft.set_peft_model_state_dict(network, state, name)


def _require_layers(
    model: PipelineModel,
    layers: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, Mapping[str, Tensor]],
    file: Path,
) -> None:
    """Raise BenchError, with what does not, unless every tensor has a layer of its shape in the model."""
    if strange := found.get("", {}):
        raise BenchError(
            f"{file} is no adapter of {model.config.name!r}: {len(strange)} tensors are of no part of a "
            f"{type(model.pipeline).__name__} by any naming that diffusers reads for it, such as "
            f"{_listed(sorted(strange))}. Is it of another family?"
        )
    if model.denoiser not in found:
        raise BenchError(
            f"{file} adapts {' and '.join(sorted(found))} alone: what is judged is a finetuned {model.denoiser}, which "
            "this would leave as the prior's."
        )
    for part, tensors in found.items():
        unmatched = [key for key, tensor in tensors.items() if not _fits(layers.get(part, {}), key, tensor)]
        if unmatched:
            raise BenchError(
                f"{file} is no adapter of {model.config.name!r}: {len(unmatched)} of {len(tensors)} tensors match no "
                f"layer of its {part}, such as {_listed(unmatched)}. Is it of another family or size?"
            )


def _fits(layers: Mapping[str, Any], key: str, tensor: Tensor) -> bool:
    """Whether a tensor is of a layer of the network, and of its shape where the two are easily compared."""
    words = key.split(".")
    places = (".".join(words[:count]) for count in range(len(words) - 1, 0, -1))
    layer = next((layers[place] for place in places if place in layers), None)
    weight = getattr(layer, "weight", None)
    if weight is None or weight.ndim < 2:
        return False
    if ".lora_A." in key:
        return tensor.ndim == weight.ndim and tensor.shape[1] == weight.shape[1]
    return not (".lora_B." in key and key.endswith("weight")) or tensor.shape[0] == weight.shape[0]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
