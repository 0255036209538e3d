"""What tells one prior from another: everything that decides what its pipeline encodes, predicts and decodes.

Of every part that is loaded: its class, its weights, and what its configuration has besides the defaults of the class,
so that an option which a later version of a library adds changes nothing. Of a tokenizer: its vocabulary, its rules and
how it pads and cuts. Of the pipeline: its own options, such as SDXL's `force_zeros_for_empty_prompt`.
Left out is what only says where and by which version of a library a part was stored: `BOOKKEEPING`, and keys that begin
with an underscore. So a copy in another folder, or one that was loaded and stored again, is the same prior.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from bench.runtime.digests import digest

# `dtype` is that of the files; what the parts are loaded in is in their tensors
BOOKKEEPING = ("transformers_version", "architectures", "model_type", "dtype", "torch_dtype")
STATE = ("version", "truncation", "padding")  # of a tokenizer's file: what its last call was


def fingerprint(pipe: Any, absent: Mapping[str, Any], **settings: Any) -> str:
    """32 hex digits of a diffusers pipeline on the CPU.

    absent: identities of parts that are not loaded. settings: whatever else decides what it computes.
    """
    parts = {name: identity(part) for name, part in pipe.components.items() if part is not None} | dict(absent)
    options = {key: value for key, value in pipe.config.items() if key not in pipe.components}
    return digest({"pipeline": _chosen(options, _defaults(pipe)), "parts": parts, "settings": settings})


def identity(part: Any) -> dict[str, Any]:
    """What decides what a part of a pipeline computes: its class, configuration and weights, or its rules."""
    kind = type(part).__name__
    if isinstance(part, PreTrainedTokenizerBase):
        return {"class": kind, **_tokenizer(part)}
    config, weights = getattr(part, "config", {}), _weights(part) if isinstance(part, nn.Module) else None
    if isinstance(config, PreTrainedConfig):
        chosen = _chosen(config.to_dict(), type(config)().to_dict())
        chosen["attention"] = config._attn_implementation  # which a configuration may ask for, and none stores
    else:
        chosen = _chosen(config, _defaults(part))
    return {"class": kind, "config": chosen, "weights": weights}


def _defaults(part: Any) -> dict[str, Any]:
    """Of a class of diffusers, whose configuration holds the arguments that it was made with."""
    return {name: argument.default for name, argument in inspect.signature(type(part)).parameters.items()}


def _chosen(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in BOOKKEEPING}
    return {key: value for key, value in kept.items() if key not in defaults or not _equal(value, defaults[key])}


def _equal(value: Any, default: Any) -> bool:
    """As they are stored: a tuple is a list, and 1 is neither 1.0 nor true."""
    return default is not inspect.Parameter.empty and json.dumps(value) == json.dumps(default)


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)  # one in Python alone has none
    rules = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    return {
        "rules": {key: _without_idle(value) for key, value in rules.items() if key not in STATE},
        "special": tokenizer.special_tokens_map,
        "length": tokenizer.model_max_length,
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
        "split": tokenizer.split_special_tokens,
        "inputs": tokenizer.model_input_names,
        "template": tokenizer.chat_template,
    }


def _without_idle(tree: Any) -> Any:
    """Without what is null or false, as options are that a later version of the library adds."""
    if isinstance(tree, dict):
        return {key: _without_idle(value) for key, value in tree.items() if value is not None and value is not False}
    return [_without_idle(value) for value in tree] if isinstance(tree, list) else tree


def _weights(network: nn.Module) -> str:
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        total.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
