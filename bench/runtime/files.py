"""Files that appear whole or not at all, and folders that one process has to itself."""

import fcntl
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bench.errors import BenchError, disk_error

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


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive into `folder`; nothing of it lands elsewhere.

    Raises BenchError for what is none, is damaged, is locked by a password, or would write or link outside.
    """
    damage = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError)
    try:
        archive.stat()  # of a file that is not there unpack_archive says that it is no archive
        shutil.unpack_archive(archive, folder, filter=None if archive.suffix == ".zip" else "data")
    except shutil.ReadError as error:
        raise BenchError(f"{archive} is no archive: {error}.") from None
    except OSError as error:
        raise BenchError(disk_error(error, archive)) from None
    except (*damage, ValueError, RuntimeError) as error:  # the last: a password, or an unknown compression
        raise BenchError(f"{archive} cannot be unpacked ({error}): have it sent or fetched again.") from None


@contextmanager
def naming_disk_errors(folder: Path) -> Iterator[None]:
    """Turn a disk error in the block into a BenchError that names the file, or else the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BenchError(disk_error(error if isinstance(error, OSError) else OSError(str(error)), folder)) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder for the block, creating it if needed. The lock of a process that died is void.

    Half-written files of such a process are removed. Raises BenchError if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a", encoding="utf8") as file:
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
