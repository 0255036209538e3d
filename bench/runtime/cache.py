"""Tensors that are computed once: files with a checksum, found by the key of everything that they depend on."""

import fcntl
import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from bench.runtime import processes
from bench.runtime.files import write_atomic

CHECKSUM = 16  # bytes, in front of the tensors
log = logging.getLogger(__name__)


def cached(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in `path`; if they are not there, all processes of the run compute them together and store them.

    Where each run has one process, another that needs them too waits until they are there.
    """
    if (found := _everywhere(path)) is not None:
        return found
    with _turn(path):
        if (found := _everywhere(path)) is not None:  # by now
            return found
        computed = {name: tensor.cpu().contiguous() for name, tensor in compute().items()}
        if processes.state().is_local_main_process:
            store(path, computed)
        processes.state().wait_for_everyone()
    return computed


def _everywhere(path: Path) -> dict[str, Tensor] | None:
    """The tensors in `path`, if every process of the run finds them."""
    found = stored(path)
    return found if processes.everywhere(found is not None) else None


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Let one run at a time into the block, or all of them where the folder cannot be locked.

    A run of several processes does not wait: what they do together has a time limit.
    """
    if processes.state().num_processes > 1:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(lock.open("wb"))  # closing it releases the lock
            held.callback(lock.unlink, missing_ok=True)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("waiting for another run, which is computing %s", path)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.debug("cannot lock %s: %s", lock, error)
        yield


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
