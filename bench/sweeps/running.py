"""Runs several jobs at once on an engine, with a live table of what is done, running and left."""

import math
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.runs.folder import is_finished
from bench.runs.log import last_record
from bench.runtime.stopping import Interrupted
from bench.sweeps.engines import Local, Ray
from bench.sweeps.jobs import Job

Engine = Local | Ray
SHOWN = 30  # runs in the live table


def run_sweep(jobs: list[Job], console: Console, engine: Engine, stage: str = "runs") -> list[Job]:
    """Run what is not finished, several at once, with a live table; returns the jobs that failed. stage: what they are.

    Interrupted, it has every run write its checkpoint, waits for them, and raises Interrupted.
    """
    waiting = deque(job for job in jobs if job.state != "finished")
    if len(waiting) < len(jobs):
        console.print(f"{len(jobs) - len(waiting)} of {len(jobs)} {stage} are finished already.")
    running: dict[Any, tuple[Job, float]] = {}
    failed: list[Job] = []
    board = Board(stage, len(waiting))
    with Live(console=console, transient=True, auto_refresh=False) as live:
        try:
            while waiting or running:
                while waiting and len(running) < engine.slots:
                    job = waiting.popleft()
                    job.log.parent.mkdir(parents=True, exist_ok=True)
                    job.log.unlink(missing_ok=True)
                    running[engine.start(job.arguments, job.folder, job.log)] = job, time.monotonic()
                for handle, status in engine.wait(0.5).items():
                    job, since = running.pop(handle)
                    good = status == 0 and is_finished(job.folder)  # elsewhere, perhaps, but not in this folder
                    failed += [] if good else [job]
                    taken = timedelta(seconds=round(time.monotonic() - since))
                    word = Text("finished") if good else Text("failed", "red")
                    board.ended += 1
                    console.print(f"{board.ended}/{board.total}", word, job.folder.name, str(taken))
                if console.is_terminal:
                    live.update(
                        board.table([job for job, _ in running.values()], len(waiting), len(failed)), refresh=True
                    )
        except Interrupted as stop:  # each writes its checkpoint and ends; a second signal ends it at once
            _end(engine, stop.status - 128)
            raise
    return failed


def _end(engine: Engine, number: int) -> None:
    try:
        engine.stop(number)
        while engine.runs:
            engine.wait(0.5)
    except Interrupted as again:
        engine.stop(again.status - 128)
        raise


@dataclass
class Board:
    """The live table of a stage of a sweep."""

    stage: str
    total: int
    ended: int = 0
    begun: float = field(default_factory=time.monotonic)

    def table(self, jobs: list[Job], waiting: int, failed: int) -> Table:
        """State, progress, reward and time left of the running jobs; how many others there are."""
        left = (time.monotonic() - self.begun) / self.ended * (self.total - self.ended) if self.ended else None
        title = (
            f"{self.stage}: {self.ended} of {self.total} ended, {failed} of them failed; {waiting} wait; "
            f"{_clock(left)} left"
        )
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for name in ("run", "state", "updates", "reward", "left"):
            table.add_column(name, justify="left" if name in ("run", "state") else "right")
        for state, *cells in sorted(map(progress, jobs))[:SHOWN]:
            table.add_row(cells[0], state, *cells[1:])
        return table


def progress(job: Job) -> tuple[str, str, str, str, str]:
    """(state, run, updates, reward, time left) of a job that was started, read from what it has written."""
    name, updates = job.folder.name, job.config.train.updates
    if not job.log.is_file():
        return "queued", name, "", "", ""
    record = last_record(job.folder)
    if record is None:
        return "running", name, "", "", ""
    done = record["update"]
    seconds = sum(value for key, value in record.items() if key.startswith("seconds/"))
    state, left = ("training", seconds / done * (updates - done)) if done < updates else ("evaluating", None)
    return state, name, f"{done}/{updates}", f"{record.get('reward', math.nan):.3f}", _clock(left)


def _clock(seconds: float | None) -> str:
    return "–" if seconds is None else str(timedelta(seconds=round(seconds)))


def last_words(log: Path) -> str:
    """The last line that a failed run wrote."""
    lines = log.read_text(encoding="utf8", errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
