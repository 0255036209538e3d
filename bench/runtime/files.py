"""Files that appear whole or not at all, and folders of one owner."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from bench.errors import BenchError

LOCK = ".lock"


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` by rename, so that a reader never sees half a file. A full disk raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # another process may write the same cache entry
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def stored_in(folder: Path) -> Iterator[None]:
    """A disk that fails in the block, full or read-only, is told by the file's name, or else the folder's."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        place, reason = getattr(error, "filename", None) or folder, getattr(error, "strerror", None) or error
        raise BenchError(
            f"cannot read or write {place}: {reason}. What was stored before is whole: once the disk is well again, "
            "the same command goes on."
        ) from error


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The block owns the folder, made if need be; an owner that died owns nothing. Half-written files of one are gone.

    Raises BenchError if another process owns it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BenchError(
                f"another process is at work in {folder}: wait until it ends, or choose another --out."
            ) from None
        for part in leftovers(folder):
            part.unlink(missing_ok=True)
        yield


def leftovers(folder: Path) -> list[Path]:
    """Files that a process was writing when it died."""
    return [*folder.rglob(".*.part"), *folder.rglob("*.partial")]
