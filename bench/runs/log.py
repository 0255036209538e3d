"""What a run says while it trains: a line per update, TensorBoard events, trackers, a progress bar."""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.evaluation.pictures import pairs
from bench.metric import Evaluation, Measurement
from bench.runs.rows import comparable_settings, run_name
from bench.runtime.files import write_atomic
from bench.settings import RunConfig
from bench.training.trainer import Record

log = logging.getLogger(__name__)


class UpdateLog:
    """The per-update log: `log.jsonl`, TensorBoard events, trackers; a resumed run drops what it will do again.

    A tracker's server keeps what it has: Weights & Biases takes the first value of a step, trackio both.
    """

    def __init__(self, folder: Path, done: int, trackers: Sequence[GeneralTracker] = ()):
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "log.jsonl"
        kept = [json.dumps(record) + "\n" for record in _records(path) if record["update"] <= done]
        write_atomic(path, "".join(kept).encode())
        self._file = path.open("a", encoding="utf8")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._trackers = trackers

    def write(self, record: Record) -> None:
        """Append one update."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._writer.add_scalar(name, value, record["update"])
        for tracker in self._trackers:
            tracker.log(record, step=record["update"])

    def evaluated(self, update: int, evaluation: Evaluation, measurements: Sequence[Measurement]) -> None:
        """Show an evaluation in TensorBoard: its values, and images of the first samples."""
        for found in measurements:
            if found.value is not None:
                self._writer.add_scalar(f"evaluation/{found.name}", found.value, update)
        if evaluation.finetuned.images.ndim == 4:
            first = torch.cat([rows[:4] for rows in pairs(evaluation).values()])
            for name in ("prior", "finetuned"):
                self._writer.add_images(f"samples/{name}", getattr(evaluation, name).images[first], update)
        self._writer.flush()

    def __enter__(self) -> "UpdateLog":
        hook = self._hook = threading.excepthook

        def others(error: threading.ExceptHookArgs) -> None:
            """A disk that fails TensorBoard's thread is told by the next call that writes; all else is printed."""
            if not issubclass(error.exc_type, OSError):
                hook(error)

        threading.excepthook = others
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook
        for tracker in self._trackers:
            tracker.finish()


def open_trackers(names: Sequence[str], folder: Path, config: RunConfig) -> list[GeneralTracker]:
    """accelerate's trackers, "wandb" or "trackio", of a run that may have begun earlier; its settings by dotted key.

    Weights & Biases stays offline, in the run's folder, unless `WANDB_MODE` says otherwise; `wandb sync` sends it.
    """
    options: dict[str, dict[str, Any]] = {
        "wandb": {"dir": str(folder), "id": run_name(config), "mode": os.environ.get("WANDB_MODE", "offline")},
        "trackio": {},
    }
    found = []
    for name in names:
        tracker = LOGGER_TYPE_TO_CLASS[name]("nabla-bench", name=run_name(config), resume="allow", **options[name])
        tracker.start()
        tracker.store_init_configuration({"seed": config.seed, **comparable_settings(config)})
        found.append(tracker)
    return found


def _records(path: Path) -> list[Record]:
    """The updates in a log; a line that is broken, the last one of a crash for one, is left out with a warning."""
    records = []
    lines = path.read_text(encoding="utf8", errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append({**record, "update": int(record["update"])})
        except (ValueError, KeyError, TypeError):
            log.warning("line %d of %s is broken and is left out", number, path)
    return records


def read_log(folder: Path) -> pd.DataFrame:
    """The update log of a run, a row per update."""
    return pd.DataFrame(_records(folder / "log.jsonl"))


def last_record(folder: Path) -> Record | None:
    """The last update in the log of a run that may be writing it; reads little."""
    with contextlib.suppress(OSError, ValueError, IndexError), (folder / "log.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
        return json.loads(file.read().rpartition(b"\n")[0].splitlines()[-1])
    return None


def training_progress(console: Console) -> Progress:
    """The bar that a run shows: update, reward, time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("reward {task.fields[reward]:.3f}"),
        TimeRemainingColumn(),
        console=console,
    )
