"""What a run says while it trains: a line per update, TensorBoard events, a progress bar."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.evaluation.pictures import pairs
from bench.evaluation.samples import Evaluation
from bench.files import write_atomic
from bench.plugin import Measurement
from bench.training.trainer import Record

log = logging.getLogger(__name__)


class UpdateLog:
    """The per-update log: `log.jsonl` and TensorBoard events; a resumed run drops what it will do again."""

    def __init__(self, folder: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "log.jsonl"
        kept = [json.dumps(record) + "\n" for record in _records(path) if record["update"] <= done]
        write_atomic(path, "".join(kept).encode())
        self._file = path.open("a", encoding="utf8")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, record: Record) -> None:
        """Append one update."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._writer.add_scalar(name, value, record["update"])

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
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._writer.close()


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
