"""`--preset 24gb`: settings with which a run fits a GPU of so much memory, by the estimate of `bench.runs.estimate`."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from bench.errors import BenchError, did_you_mean
from bench.models.precision import network_dtype
from bench.options import Config
from bench.runs.estimate import SHARE, estimate_memory, with_batches
from bench.settings import RunConfig

GIB = 2**30
SIZES = {"16gb": 16, "24gb": 24, "48gb": 48, "80gb": 80}
FEW = 8  # rows at once, below which recomputing the denoiser costs less than its small calls
CHECKPOINTING = "model.checkpointing"
# What is tried in this order, each on top of those before, if not even one row fits: the first two leave the run the
# same, the third measures less, the others make another run.
SAVINGS: tuple[tuple[str, Any], ...] = (
    (CHECKPOINTING, True),
    ("model.offload", True),
    ("evaluation.rewards", []),
    ("model.dtype", "bfloat16"),
    ("model.lora.rank", 4),
)


@dataclass(frozen=True)
class Fitted:
    """A configuration that fits, what was chosen for it, and its estimate in bytes (0 of an analytic model)."""

    config: RunConfig
    chosen: dict[str, Any]
    bytes: int


def fitted(config: RunConfig, preset: str, fixed: Collection[str] = (), processes: int = 1) -> Fitted:
    """The configuration with the batches, and as few of `SAVINGS` as it takes, that fit a GPU of the preset's size.

    fixed: keys that the user has set and that stay. Where there is no estimate, of a model of points or a hub id whose
    configuration is not here yet, nothing is chosen. Raises BenchError, with the combination that takes least, if
    nothing fits.
    """
    if preset not in SIZES:
        raise BenchError(f"unknown preset {preset!r}{did_you_mean(preset, SIZES)}")
    total, least = SIZES[preset] * GIB, {} if "train.micro_batch" in fixed else {"train.micro_batch": 1}
    if not (needed := _bytes(_changed(config, least), processes)):
        return Fitted(config, {}, 0)
    chosen: dict[str, Any] = {}
    for key, value in SAVINGS:
        if needed <= SHARE * total:
            break
        if key not in fixed and (lower := _bytes(_changed(config, chosen | least | {key: value}), processes)) < needed:
            chosen[key], needed = value, lower
    if needed > SHARE * total:
        raise BenchError(
            f"--preset {preset}: even with {_texts(chosen | least, '=')} this run is estimated at {needed / GIB:.1f} "
            f"GiB, and of {preset} {SHARE * total / GIB:.1f} may be used: choose a larger preset, a smaller model, or "
            "a method without the reward's gradient."
        )
    unset = dict.fromkeys(least)
    config = _changed(config, unset | chosen)
    filled = with_batches(config, torch.device("cuda"), processes, total)
    if (filled.train.micro_batch or 0) < FEW and not ({CHECKPOINTING, "train.micro_batch"} & {*fixed}):
        other = with_batches(_changed(config, {CHECKPOINTING: True}), torch.device("cuda"), processes, total)
        if (other.train.micro_batch or 0) > (filled.train.micro_batch or 0):
            filled, chosen = other, chosen | {CHECKPOINTING: True}
    chosen |= {f"train.{name}": getattr(filled.train, name) for name in ("micro_batch", "sample_batch")}
    return Fitted(filled, {key: value for key, value in chosen.items() if key not in fixed}, _bytes(filled, processes))


def preset_text(preset: str, found: Fitted) -> str:
    """A sentence on what a preset has chosen."""
    if not found.chosen:
        return f"preset {preset}: nothing is chosen, for there is no estimate of this model's memory"
    size = f"estimated {found.bytes / GIB:.1f} of {SIZES[preset]} GiB on a GPU"
    return f"preset {preset}: {_texts(found.chosen, ' = ')}; {size}"


def _bytes(config: RunConfig, processes: int) -> int:
    estimate = estimate_memory(config, network_dtype(config.model, "cuda"), processes)
    return sum(estimate.values()) if estimate else 0


def _changed(config: Any, settings: dict[str, Any]) -> Any:
    """The configuration with other values of dotted keys."""
    for key, value in settings.items():
        name, _, rest = key.partition(".")
        inner = getattr(config, name)
        new = _changed(inner, {rest: value}) if isinstance(inner, Config) else value
        config = config.model_copy(update={name: new})
    return config


def _texts(settings: dict[str, Any], equals: str) -> str:
    return ", ".join(f"{key}{equals}{json.dumps(value)}" for key, value in settings.items())
