"""Tensors that are computed once: files with a checksum, found by the key of everything that they depend on."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from bench.runtime import processes
from bench.runtime.files import write_atomic

CHECKSUM = 16  # bytes, in front of the tensors
log = logging.getLogger(__name__)


def cached(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in `path`; if they are not there, all processes compute them together and store them."""
    found = stored(path)
    if processes.everywhere(found is not None) and found is not None:
        return found
    computed = {name: tensor.cpu().contiguous() for name, tensor in compute().items()}
    if processes.state().is_local_main_process:
        store(path, computed)
    processes.state().wait_for_everyone()
    return computed


def store(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors that lie on the CPU; a full disk is only worth a warning, since the cache only saves time."""
    data = save(tensors)
    try:
        write_atomic(path, _checksum(data) + data)
    except OSError as error:
        log.warning("cannot store %s for the next run: %s", path, error)


def stored(path: Path) -> dict[str, Tensor] | None:
    """The tensors in `path`; None if there are none, or, with a warning, if they are damaged."""
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("cannot read %s, computing it anew: %s", path, error)
        return None
    if whole[:CHECKSUM] == _checksum(whole[CHECKSUM:]):
        return load(whole[CHECKSUM:])
    log.warning("%s is damaged (its contents do not match its checksum); computing it anew", path)
    return None


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=CHECKSUM).digest()
