"""Files that appear whole or not at all, and folders that one process has to itself."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bench.errors import BenchError

LOCK = ".lock"


def home_path(path: str | Path) -> Path:
    """The path, with the home folder for a leading `~`."""
    return Path(os.path.expanduser(path))


def expanded(value: Any) -> Any:
    """`home_path` of a path, or of each in a list; anything else as it is."""
    if isinstance(value, list):
        return [expanded(one) for one in value]
    return home_path(value) if isinstance(value, Path) else value


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
def naming_disk_errors(folder: Path) -> Iterator[None]:
    """Turn a disk error in the block into a BenchError that names the file, or else the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        place, reason = getattr(error, "filename", None) or folder, getattr(error, "strerror", None) or error
        raise BenchError(
            f"cannot read or write {place}: {reason}. What was stored before is intact: once the disk works again, "
            "the same command goes on."
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder for the block, creating it if needed. The lock of a process that died is void.

    Half-written files of such a process are removed. Raises BenchError if another process holds the lock.
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
    """Half-written files of a process that died."""
    return [*folder.rglob(".*.part"), *folder.rglob("*.partial")]
