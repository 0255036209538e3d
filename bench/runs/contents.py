"""What lies behind the names in a configuration: contents of prompts, weights and files of options, as digests."""

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from bench.models import catalogue
from bench.options import Config
from bench.prompts import PromptSet
from bench.settings import RunConfig


def contents(config: RunConfig, prompts: PromptSet) -> dict[str, str]:
    """Digest by dotted setting; runs of equal configuration and equal contents are the same run.

    The digest of a file in the hub's cache is the name of its blob, a hash of its contents. Others are read, once.
    """
    digests = {"prompts.name": prompts.digest}
    if folder := catalogue.locate(config.model.name, config.model.t5):
        digests["model.name"] = _digest(folder)
    for section in ("method", "reward"):
        digests |= {f"{section}.{key}": _digest(path) for key, path in _paths(getattr(config, section))}
    return digests


def _paths(options: Config, prefix: str = "") -> Iterator[tuple[str, Path]]:
    for key, value in options:
        if isinstance(value, Config):
            yield from _paths(value, f"{prefix}{key}.")
        elif isinstance(value, Path):
            yield prefix + key, value


def _digest(path: Path) -> str:
    """Of a file, or of all weights and configurations in a folder with their names."""
    files = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".json", ".txt", ".bin", ".pt"))
    names = {str(p.relative_to(path)): p for p in files} if path.is_dir() else {"": path}
    total = hashlib.blake2b(digest_size=16)
    for name, file in names.items():
        real = file.resolve()
        if real.is_file():
            stat, blob = real.stat(), real.parent.name == "blobs"
            digest = real.name if blob else _hash(real, stat.st_mtime_ns, stat.st_size)
            total.update(f"{name}={digest};".encode())
    return total.hexdigest()


@cache
def _hash(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
