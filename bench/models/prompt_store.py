"""Embeddings of prompts on disk, by which a run does without its text encoders."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.environment import rounding
from bench.hub import project_cache
from bench.models.fingerprint import identity
from bench.runtime.cache import store, stored
from bench.runtime.digests import digest, digest_files


class PromptStore:
    """What the text encoders of a pipeline's folder make of prompts, and what they are (`identity`).

    encoders: their names in the pipeline. index: the folder's `model_index.json`. dtype, device: what they compute in.
    """

    def __init__(
        self, folder: Path, index: Mapping[str, Any], encoders: Sequence[str], dtype: torch.dtype, device: torch.device
    ):
        self.encoders, self.place = tuple(encoders), project_cache() / "prompts"
        parts = [*encoders, *(name for name in index if name.startswith("tokenizer"))]
        files = {part: digest_files(folder / part) for part in parts}
        self._key = {"files": files, "index": dict(index), "dtype": str(dtype), **rounding(device)}

    def find(self, prompt: str, *settings: Any) -> dict[str, Tensor] | None:
        """The parts of a prompt's conditioning, on the CPU. settings: what else they depend on."""
        return stored(self._path(prompt, settings))

    def add(self, parts: Mapping[str, Tensor], prompt: str, *settings: Any) -> None:
        """Store what `find` finds with the same prompt and settings."""
        store(self._path(prompt, settings), {name: tensor.cpu().contiguous() for name, tensor in parts.items()})

    def _path(self, prompt: str, settings: Sequence[Any]) -> Path:
        return self.place / f"{digest({'encoders': self._key, 'prompt': prompt, 'settings': settings})}.checked"

    def identities(self, load: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The identity of every encoder. load: gives the encoders by name, on the CPU; called if it is not known."""
        path = self.place / f"{digest(self._key)}.checked"
        if known := stored(path):
            return json.loads(known["json"].numpy().tobytes())
        found = {name: identity(encoder) for name, encoder in load().items()}
        store(path, {"json": torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)})
        return found
