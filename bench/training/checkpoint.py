"""Atomic, checksummed checkpoints.

A file is written beside its final place, synced, and renamed; its name ends in the hash of its contents. So a
checkpoint is either whole or absent. One that was damaged later no longer fits its name; the one before it is used.
"""

import hashlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from bench.runtime.files import write_atomic
from bench.runtime.finite import require_finite_weights

STORED = 2  # checkpoints at a time
log = logging.getLogger(__name__)


def save(folder: Path, update: int, state: dict[str, Any]) -> Path:
    """Store `state` (tensors, numbers, strings, containers of them) as of `update`, and delete all but the last two.

    Tensors are stored as CPU tensors, so that a run can resume on any device.
    """
    buffer = io.BytesIO()
    torch.save(send_to_device(state, "cpu"), buffer)
    data = buffer.getvalue()
    path = folder / f"update-{update:07d}-{_digest(data)}.pt"
    write_atomic(path, data)
    for old in _all(folder)[STORED:]:
        old.unlink()
    return path


def load(folder: Path) -> dict[str, Any] | None:
    """The newest intact state, or None if there is none; damaged files are skipped with a warning.

    Raises BenchError if its weights are not finite.
    """
    for path in _all(folder):
        data = path.read_bytes()
        if _digest(data) == path.stem.rpartition("-")[2]:
            file = io.BytesIO(data)
            state = torch.load(file, map_location="cpu", weights_only=True)
            require_finite_weights(_weights(state), path)
            return state
        log.warning("checkpoint %s is damaged (its contents do not match its name); using the one before it", path)
    return None


def _weights(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, tensors in state.get("parameters", {}).items():
        yield from ((f"parameter {number} of {name}", tensor) for number, tensor in enumerate(tensors))
    for name, tensors in state.get("copies", {}).items():
        yield from ((f"{key} of the copy {name}", tensor) for key, tensor in tensors.items())


def newest(folder: Path) -> Path | None:
    """Path of the newest checkpoint, damaged or not."""
    return next(iter(_all(folder)), None)


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("update-*.pt"), reverse=True)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
