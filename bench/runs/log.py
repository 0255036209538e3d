"""What a run reports while it trains: a line for each update, TensorBoard events, trackers."""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from accelerate.tracking import GeneralTracker

from bench.evaluation.pictures import pairs
from bench.metric import Evaluation, Measurement
from bench.runtime.files import write_atomic
from bench.training.trainer import Record

log = logging.getLogger(__name__)


class UpdateLog:
    """The log of updates: `log.jsonl`, TensorBoard events, trackers.

    done: updates up to the checkpoint; later ones, which a resumed run makes again, are removed from the log.
    """

    def __init__(self, folder: Path, done: int, trackers: Sequence[GeneralTracker] = ()):
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "log.jsonl"
        lines = [json.dumps(record) + "\n" for record in _records(path) if record["update"] <= done]
        write_atomic(path, "".join(lines).encode())
        self._file = path.open("a", encoding="utf8")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._trackers = trackers

    def write(self, record: Record) -> None:
        """Append the record of an update."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._writer.add_scalar(name, value, record["update"])
        for tracker in self._trackers:
            tracker.log(record, step=record["update"])

    def evaluated(self, update: int, evaluation: Evaluation, measurements: Sequence[Measurement]) -> None:
        """Show an evaluation in TensorBoard: its values, and images of the first samples."""
        for one in measurements:
            if one.value is not None:
                self._writer.add_scalar(f"evaluation/{one.name}", one.value, update)
        if evaluation.finetuned.images.ndim == 4:
            first = torch.cat([rows[:4] for rows in pairs(evaluation).values()])
            for name in ("prior", "finetuned"):
                self._writer.add_images(f"samples/{name}", getattr(evaluation, name).strip(first), update)
        self._writer.flush()

    def __enter__(self) -> "UpdateLog":
        hook = self._hook = threading.excepthook

        def ignore_disk_errors(error: threading.ExceptHookArgs) -> None:
            """The next write raises a disk error of TensorBoard's thread again; other errors are printed."""
            if not issubclass(error.exc_type, OSError):
                hook(error)

        threading.excepthook = ignore_disk_errors
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook
        for tracker in self._trackers:
            tracker.finish()


def _records(path: Path) -> list[Record]:
    """The updates in a log; a broken line, such as the last one before a crash, is left out with a warning."""
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
    """The log of a run, one row for each update."""
    return pd.DataFrame(_records(folder / "log.jsonl"))


def last_record(folder: Path) -> Record | None:
    """The last whole record in the log of a run that may be writing to it; reads only the end of the file."""
    with contextlib.suppress(OSError, ValueError, IndexError), (folder / "log.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
        return json.loads(file.read().rpartition(b"\n")[0].splitlines()[-1])
    return None
