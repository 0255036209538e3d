"""Experiment trackers: every one that accelerate knows, by name."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from bench.errors import BenchError, did_you_mean
from bench.runs.rows import comparable_settings, run_name
from bench.settings import RunConfig

PROJECT = "nabla-bench"
ALWAYS = "tensorboard"  # every run writes its events anyway
EXTRA = ("wandb", "trackio")  # come with `nabla-bench[track]`


def require_trackers(names: Sequence[str]) -> None:
    """Raise BenchError for a tracker that accelerate does not know, or whose package is not installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise BenchError(
                f"unknown tracker {name!r}{did_you_mean(name, LOGGER_TYPE_TO_CLASS)} "
                "Each needs its own package; pip install 'nabla-bench[track]' brings wandb and trackio."
            )
        if (
            name in LoggerType.list() and LoggerType(name) not in get_available_trackers()
        ):  # else registered by a package
            package = "'nabla-bench[track]'" if name in EXTRA else name
            raise BenchError(f"tracker {name!r} needs its package: pip install {package}")


def open_trackers(names: Sequence[str], folder: Path, config: RunConfig) -> list[GeneralTracker]:
    """Start the trackers of a run, which may have begun earlier, and give them its settings by dotted key.

    Weights & Biases stays offline, with its files in the run's folder, unless `WANDB_MODE` says otherwise;
    `wandb sync` uploads them. A resumed run repeats updates after its last checkpoint: of a step that was logged
    twice Weights & Biases keeps the first record, trackio both.
    """
    name = run_name(config)
    options: dict[str, dict[str, Any]] = {
        "wandb": {
            "name": name,
            "id": name,
            "resume": "allow",
            "dir": str(folder),
            "mode": os.environ.get("WANDB_MODE", "offline"),
        },
        "trackio": {"name": name, "resume": "allow"},
        "mlflow": {"run_name": name},
    }
    trackers = []
    for tracker_name in dict.fromkeys(names):
        if tracker_name == ALWAYS:
            continue
        tracker_class = LOGGER_TYPE_TO_CLASS[tracker_name]
        place = [str(folder)] if tracker_class.requires_logging_directory else []
        tracker = tracker_class(PROJECT, *place, **options.get(tracker_name, {}))
        tracker.start()
        tracker.store_init_configuration({"seed": config.seed, **comparable_settings(config)})
        trackers.append(tracker)
    return trackers
