"""`bench sweep`: the product of methods × seeds × settings as runs in processes of their own."""

import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.commands.preflight import preflight
from bench.commands.run import changed_contents, is_finished
from bench.config import Loader, resolve
from bench.errors import BenchError
from bench.evaluation.rows import run_name
from bench.options import Config, explain
from bench.settings import EXECUTION, RunConfig
from bench.training.stopping import Interrupted


class Sweep(Config):
    """A sweep's specification; settings are keyed like `--set`, and later ones win: `set`, `settings`, `grid`."""

    suite: str | None = None
    reward: str | None = None
    model: str | None = None
    methods: list[str] = Field(min_length=1)
    seeds: int | list[int] = Field(1, description="a count (0, 1, …) or a list")
    set: dict[str, Any] = Field({}, description="settings of every run")
    settings: dict[str, dict[str, Any]] = Field({}, description="further settings by method")
    grid: dict[str, list[Any]] = Field({}, description="setting → values; every combination is run")
    workers: int | None = Field(None, ge=1, description="processes at once; null: cores over threads")
    threads: int = Field(1, ge=1, description="CPU threads of a run")
    out: Path | None = Field(None, description="folder of the runs; null: runs/<name of the file>")


@dataclass(frozen=True)
class Job:
    """One run: its `bench` arguments, folder and log."""

    arguments: list[str]
    folder: Path
    log: Path
    config: RunConfig

    @property
    def state(self) -> str:
        """ "finished", "begun" or "new"."""
        if is_finished(self.folder) and not changed_contents(self.folder, self.config):
            return "finished"
        return "begun" if self.folder.is_dir() else "new"

    @property
    def command(self) -> str:
        """What to type to do this run alone."""
        return shlex.join(["bench", *self.arguments])


def read_sweep(path: Path) -> Sweep:
    """A specification file. Raises BenchError listing every mistake."""
    try:
        tree = yaml.load(path.read_text(encoding="utf8"), Loader)
        spec = Sweep(**tree)
    except ValidationError as error:
        known = list(Sweep.model_fields)
        raise BenchError("\n".join(f"{path}: {explain(mistake, known)}" for mistake in error.errors())) from None
    except (OSError, ValueError, yaml.YAMLError, TypeError) as error:
        raise BenchError(f"cannot read the sweep {path}: {error}") from None
    if idle := set(spec.grid) & set(EXECUTION):
        raise BenchError(f"{path}: {', '.join(sorted(idle))} in grid: makes no other run; put one value under set.")
    if strangers := set(spec.settings) - set(spec.methods):
        raise BenchError(f"{path}: settings for {', '.join(sorted(strangers))}, which methods: does not list.")
    return spec if spec.out else spec.model_copy(update={"out": Path("runs") / path.stem})


def plan_sweep(spec: Sweep) -> list[Job]:
    """Every run of the sweep, seed by seed, checked. Raises BenchError listing every impossible one."""
    seeds = range(spec.seeds) if isinstance(spec.seeds, int) else spec.seeds
    jobs, faults = {}, []
    for seed, method, point in itertools.product(seeds, spec.methods, _points(spec.grid)):
        chosen = {**spec.set, **spec.settings.get(method, {}), **point, "train.threads": spec.threads}
        named = {"suite": spec.suite, "reward": spec.reward, "model": spec.model}
        try:
            config = _configuration(method, seed, chosen, **named)
        except BenchError as error:
            faults.append(f"{method}: {error}")
            continue
        name = run_name(config)
        options = [f"--{key}={value}" for key, value in named.items() if value is not None]
        sets = [
            word
            for key, value in chosen.items()
            for word in ("--set", f"{key}={json.dumps(value, ensure_ascii=False)}")
        ]
        arguments = ["run", f"--method={method}", *options, f"--seed={seed}", *sets, f"--out={spec.out / name}"]
        jobs[name] = Job(
            arguments, spec.out / name, spec.out / "logs" / f"{name}.log", config
        )  # equal runs are run once
    if faults:
        raise BenchError("\n".join(dict.fromkeys(faults)))
    return list(jobs.values())


def _configuration(method: str, seed: int, chosen: dict[str, Any], suite: Any, reward: Any, model: Any) -> RunConfig:
    overrides = {"seed": seed} | ({} if model is None else {"model.name": model})
    assignments = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in chosen.items()]
    config = resolve(method, reward=reward, suite=suite, overrides=overrides, assignments=assignments)
    preflight(config)
    return config


def _points(grid: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def run_sweep(spec: Sweep, jobs: list[Job], console: Console) -> list[Job]:
    """Run what is not finished, several processes at once; returns the jobs that failed."""
    waiting = [job for job in jobs if job.state != "finished"]
    if len(waiting) < len(jobs):
        console.print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished already.")
    workers = spec.workers or max(1, (os.cpu_count() or 1) // spec.threads)
    # waiting threads that spin would slow the neighbouring process down
    environment = os.environ | {"OMP_NUM_THREADS": str(spec.threads), "OMP_WAIT_POLICY": "passive"}

    def run(job: Job) -> int:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("w", encoding="utf8") as log:
            command = [sys.executable, "-m", "bench", *job.arguments]
            # a group of its own: the terminal's signals reach it through the sweep alone, once
            own = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment, "process_group": 0}
            with subprocess.Popen(command, **own) as process:
                alive.append(process)
                return process.wait()

    alive: list[subprocess.Popen] = []
    failed: list[Job] = []
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=len(jobs), completed=len(jobs) - len(waiting), failed=0)
        executor = ThreadPoolExecutor(workers)
        try:
            running = {executor.submit(run, job): job for job in waiting}
            for done in as_completed(running):
                if done.result() != 0:
                    failed.append(running[done])
                progress.update(task, advance=1, failed=len(failed))
        except Interrupted as stop:  # each writes its checkpoint and ends
            executor.shutdown(wait=False, cancel_futures=True)
            for process in alive:
                process.send_signal(stop.status - 128)
            raise
        finally:
            executor.shutdown(cancel_futures=True)
    return failed


def last_words(log: Path) -> str:
    """The last line that a failed run wrote."""
    lines = log.read_text(encoding="utf8", errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
