"""`bench doctor`: what this machine has, and what is missing for what."""

import os
import shutil
from importlib.metadata import packages_distributions

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import environment, registry
from bench.errors import BenchError
from bench.evaluation.features import SPACES
from bench.hub import Requirement, project_cache, size_text
from bench.models import catalogue
from bench.prompts import HUB

BUSY = 0.7  # of all cores: with less than one free on a laptop of two or four, a run of all threads waits for others
EXTRAS = {"sweep": ["ray"], "track": ["wandb", "trackio"], "quantize": ["torchao"]}


def report(console: Console) -> None:
    """Print the report; nothing is loaded or downloaded."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in _lines():
        table.add_row(Text(name, "bold"), text)
    console.print(table)


def _lines() -> list[tuple[str, str]]:
    info = environment.describe()
    packages = info["packages"]
    present = ", ".join(f"{name} {number}" for name, number in packages.items() if number)
    lines = [("python", f"{info['python']} on {info['platform']}"), ("packages", present)]
    if others := [name for name in packages_distributions().get("bench", []) if name != "nabla-bench"]:
        lines.append(("import name", f"{', '.join(others)} has a package `bench` too: uninstall it, or use two venvs"))
    lines.append(("revision", f"{info['revision'][:12]}{' with changes' if info['dirty'] else ''}"))
    lines.append(("device", info["hardware"]))
    lines.append(("load", _load()))
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        precision = "float32, float16" + (", bfloat16" if torch.cuda.is_bf16_supported() else " (no bfloat16)")
        lines.append(("gpu", f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free; {precision}"))
    else:
        lines.append(("gpu", "none, so float32: the embedded model is made for that, Stable Diffusion wants a GPU"))
    for extra, names in EXTRAS.items():
        whole = all(packages[name] for name in names)
        lines.append((f"extra {extra}", "installed" if whole else f"missing: pip install 'nabla-bench[{extra}]'"))
    for title, needs in _needs().items():
        absent = [one for one in needs if one.missing()]
        missing = ", ".join(f"{one.source} ({size_text(one.size)})" for one in absent)
        lines.append((title, f"missing: {missing}" if missing else "present"))
    for kind in registry.BUILT_IN:
        broken = [str(error) for name in registry.plugins(kind) if (error := _fault(kind, name))]
        lines.append((kind, f"{len(registry.plugins(kind))} found" + "".join(f"; {text}" for text in broken)))
    cache = project_cache()
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) if cache.is_dir() else 0
    lines.append(("cache", f"{cache}, {size / 2**20:.0f} MiB of prior samples and features"))
    lines.append(("disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here"))
    return lines


def _load() -> str:
    """How busy the processor is, and what to do about it."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < BUSY * cores:
        return f"{load:.1f} on {cores} cores"
    return (
        f"HIGH: {load:.1f} on {cores} cores, so other jobs take their share: times mean little, and a run is best kept "
        "to the free cores (--set train.threads=1)"
    )


def _needs() -> dict[str, list[Requirement]]:
    """What every model, reward, feature space and prompt set needs from elsewhere."""
    needs: dict[str, list[Requirement]] = {
        f"model {name}": [one] if (one := catalogue.repository(name)) else [] for name in catalogue.names()
    }
    for name in registry.plugins("rewards"):
        if not _fault("rewards", name):
            needs[f"reward {name}"] = list(registry.load("rewards", name).files)
    needs |= {f"features {name}": list(space.files) for name, space in SPACES.items()}
    return needs | {f"prompts {name}": [one] for name, one in HUB.items()}


def _fault(kind: str, name: str) -> BenchError | None:
    try:
        registry.load(kind, name)
    except BenchError as error:
        return error
    return None
