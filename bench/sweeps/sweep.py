"""`bench sweep`: the product of methods × seeds × settings as runs in processes of their own, tuned first if asked."""

import itertools
import json
import math
import shlex
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import Field, ValidationError
from rich.console import Console
from rich.live import Live
from rich.table import Table

from bench import registry, shipped
from bench.config import Loader, resolve
from bench.errors import BenchError
from bench.options import Config, explain
from bench.reporting.rows import read_rows
from bench.runs.duration import sweep_time
from bench.runs.folder import changed_contents, is_finished
from bench.runs.log import last_record
from bench.runs.preflight import preflight
from bench.runs.rows import run_name
from bench.runs.trackers import require_trackers
from bench.runtime.stopping import Interrupted
from bench.settings import EXECUTION, RunConfig
from bench.sweeps import tune as tuning
from bench.sweeps.engines import Local, Ray

Engine = Local | Ray
SHOWN = 30  # runs in the live table


class Sweep(Config):
    """A sweep's specification; of settings later ones win: `set`, `settings`, `grid`, tuned ones."""

    suite: str | None = None
    reward: str | None = None
    model: str | None = None
    methods: list[str] = Field(min_length=1)
    seeds: int | list[int] = Field(1, description="a count (0, 1, …) or a list")
    set: dict[str, Any] = Field({}, description="settings of every run")
    settings: dict[str, dict[str, Any]] = Field({}, description="further settings by method")
    grid: dict[str, list[Any]] = Field({}, description="setting → values; every combination is run")
    tune: tuning.Tune | None = Field(None, description="choose settings of every method at every point of the grid")
    workers: int | None = Field(None, ge=1, description="runs at once; null: what cores and GPUs allow")
    threads: int = Field(1, ge=1, description="CPU threads of a run")
    gpus: int = Field(0, ge=0, description="GPUs of a run, one process on each; 0: whatever it finds")
    track: list[str] = Field([], description="trackers of every run, by the names that accelerate knows")
    out: Path = Field(Path(), description="folder of the runs; without one runs/<name of the file>")

    def seed_list(self) -> list[int]:
        """The seeds of the runs."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every method at every point of the grid."""
        for method, values in itertools.product(self.methods, itertools.product(*self.grid.values())):
            yield method, dict(zip(self.grid, values, strict=True))


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
    """A specification file, or a sweep that ships, by name. Raises BenchError listing every mistake."""
    path = shipped.find("sweeps", path)
    try:
        tree = yaml.load(path.read_text(encoding="utf8"), Loader)
        spec = Sweep(**tree)
    except ValidationError as error:
        keys = list(Sweep.model_fields)
        raise BenchError("\n".join(f"{path}: {explain(mistake, keys)}" for mistake in error.errors())) from None
    except (OSError, ValueError, yaml.YAMLError, TypeError) as error:
        raise BenchError(f"cannot read the sweep {path}: {error}") from None
    if idle := set(spec.grid) & set(EXECUTION):
        raise BenchError(f"{path}: {', '.join(sorted(idle))} in grid: makes no other run; put one value under set.")
    if strangers := set(spec.settings) - set(spec.methods):
        raise BenchError(f"{path}: settings for {', '.join(sorted(strangers))}, which methods: does not list.")
    if spec.tune:
        _check_tuning(path, spec, spec.tune)
    return spec if "out" in spec.model_fields_set else spec.model_copy(update={"out": Path("runs") / path.stem})


def _check_tuning(path: Path, spec: Sweep, tune: tuning.Tune) -> None:
    if tune.seed in spec.seed_list():
        raise BenchError(f"{path}: tune.seed = {tune.seed} is a seed of the table: tune on another.")
    elsewhere = {"set": spec.set, "grid": spec.grid, "tune.set": tune.set}
    elsewhere |= {f"settings of {method}": settings for method, settings in spec.settings.items()}
    for place, settings in elsewhere.items():
        if twice := sorted(set(tune.grid) & set(settings)):
            raise BenchError(f"{path}: {', '.join(twice)} is tuned, and stands under {place} too: take one away.")
    if idle := set(tune.grid) & set(EXECUTION):
        raise BenchError(f"{path}: {', '.join(sorted(idle))} in tune.grid: makes no other run.")


def plan_sweep(spec: Sweep, choices: Mapping[str, Mapping[str, Any]] | None = None) -> list[Job]:
    """Every run of the sweep, seed by seed, checked. Raises BenchError listing every impossible one.

    choices: of `plan_trials`' keys, the tuned ones; methods with a key that is not there are left out.
    """
    require_trackers(spec.track)
    plan = _Plan(spec, spec.out)
    tuned, choices = ({}, {}) if choices is None else (plan_trials(spec), choices)
    for seed, (method, at) in itertools.product(spec.seed_list(), spec.rows()):
        key = tuning.key_of(method, at)
        if key in tuned and key not in choices:
            continue
        plan.add(method, seed, at | (choices[key]["chosen"] if key in tuned else {}))
    return plan.jobs()


def plan_trials(spec: Sweep) -> dict[str, list[tuple[Job, dict[str, Any]]]]:
    """(method, point of the grid) → its trials and their values, checked; nothing for methods that train nothing."""
    if spec.tune is None:
        return {}
    plan, trials = _Plan(spec, spec.out / "tune"), {}
    for method, at in spec.rows():
        if registry.load("methods", method).needs.training:
            jobs = [(plan.add(method, spec.tune.seed, at | v | spec.tune.settings()), v) for v in spec.tune.points()]
            trials[tuning.key_of(method, at)] = jobs
    plan.jobs()  # raises if one is impossible
    return {key: [(job, values) for job, values in jobs if job] for key, jobs in trials.items()}


def plan(spec: Sweep) -> list[Job]:
    """Trials of what is still to be chosen, and runs, with the choices that are made already."""
    trials = plan_trials(spec)
    chosen = _known(spec, trials)
    open_trials = [job for key, jobs in trials.items() if key not in chosen for job, _ in jobs]
    return [*open_trials, *plan_sweep(spec, chosen)]


def sweep_length(spec: Sweep, at_once: int) -> str:
    """How long the trials and runs that are not finished will take; "" if all are. Pieces of them are tried now."""
    trials = plan_trials(spec)
    chosen = _known(spec, trials)
    guessed = {key: {"chosen": {}} for key in trials} | chosen  # what is still to be chosen hardly changes the time
    jobs = [job for key, tried in trials.items() if key not in chosen for job, _ in tried]
    left = [job.config for job in [*jobs, *plan_sweep(spec, guessed)] if job.state != "finished"]
    return f"{len(left)} runs to do: {sweep_time(left, at_once)}" if left else ""


class _Plan:
    """Jobs by name (equal runs are run once) and what is wrong with those that are none."""

    def __init__(self, spec: Sweep, out: Path):
        self.spec, self.out = spec, out
        self.by_name: dict[str, Job] = {}
        self.faults: dict[str, None] = {}

    def add(self, method: str, seed: int, settings: dict[str, Any]) -> Job | None:
        """Plan a run with settings of its own over the sweep's; None if it is impossible."""
        spec = self.spec
        chosen = {**spec.set, **spec.settings.get(method, {}), **settings, "train.threads": spec.threads}
        named = {"suite": spec.suite, "reward": spec.reward, "model": spec.model}
        try:
            config = _configuration(method, seed, chosen, **named)
        except BenchError as error:
            self.faults[f"{method}: {error}"] = None
            return None
        name = run_name(config)
        options = [f"--{key}={value}" for key, value in named.items() if value is not None]
        sets = [word for key, value in chosen.items() for word in ("--set", f"{key}={_text(value)}")]
        options += [f"--track={name}" for name in spec.track]
        options += [f"--num-processes={spec.gpus}"] if spec.gpus > 1 else []
        arguments = ["run", f"--method={method}", *options, f"--seed={seed}", *sets, f"--out={self.out / name}"]
        return self.by_name.setdefault(name, Job(arguments, self.out / name, self.out / "logs" / f"{name}.log", config))

    def jobs(self) -> list[Job]:
        """All of them. Raises BenchError with every fault."""
        if self.faults:
            raise BenchError("\n".join(self.faults))
        return list(self.by_name.values())


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _configuration(method: str, seed: int, chosen: dict[str, Any], suite: Any, reward: Any, model: Any) -> RunConfig:
    overrides = {"seed": seed} | ({} if model is None else {"model.name": model})
    assignments = [f"{key}={_text(value)}" for key, value in chosen.items()]
    config = resolve(method, reward=reward, suite=suite, overrides=overrides, assignments=assignments)
    preflight(config)
    return config


def tune(spec: Sweep, console: Console, engine: Engine) -> tuple[dict[str, dict[str, Any]], list[Job]]:
    """Run the trials that are missing and choose: (method, point) → choice, which `tuned.yaml` keeps; the failed jobs.

    A trial that diverged has its result; of methods with a trial that failed otherwise nothing is chosen.
    """
    if spec.tune is None:
        return {}, []
    trials, path = plan_trials(spec), spec.out / tuning.FILE
    choices = _known(spec, trials)
    open_jobs = [job for key, jobs in trials.items() if key not in choices for job, _ in jobs if measured(job) is None]
    if open_jobs:
        console.print(f"Tuning: {spec.tune.rule()}, seed {spec.tune.seed}.")
        run_sweep(open_jobs, console, engine)
    for key, (method, at) in {tuning.key_of(*row): row for row in spec.rows()}.items():
        results = [(job.folder.name, values, measured(job)) for job, values in trials.get(key, [])]
        if key not in choices and results and all(rows is not None for _, _, rows in results):
            choices[key] = tuning.choose(spec.tune, method, results) | {"at": at}
    tuning.write_choices(path, spec.tune, [choices[key] for key in trials if key in choices])
    console.print(f"{tuning.summary(list(choices.values()))} Choices in {path}.", soft_wrap=True, highlight=False)
    return choices, [job for job in open_jobs if measured(job) is None]


def _known(spec: Sweep, trials: dict[str, list[tuple[Job, dict[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """The choices that `tuned.yaml` holds already."""
    if spec.tune is None:
        return {}
    planned = {key: [job.folder.name for job, _ in jobs] for key, jobs in trials.items()}
    return tuning.read_choices(spec.out / tuning.FILE, spec.tune, planned)


def measured(job: Job) -> pd.DataFrame | None:
    """The rows of a job that ended, if only because it diverged; None where there is something to run."""
    try:
        rows = read_rows(job.folder / "rows.parquet")
    except (OSError, ValueError):  # none, damaged, or of another version
        return None
    return None if changed_contents(job.folder, job.config) else rows


def make_engine(spec: Sweep, name: str, address: str | None) -> Engine:
    """ "local" or "ray". Raises BenchError if it is not there."""
    limits = spec.workers, spec.threads, spec.gpus
    return Ray(address, *limits) if name == "ray" else Local(*limits)


def run_sweep(jobs: list[Job], console: Console, engine: Engine) -> list[Job]:
    """Run what is not finished, several at once, with a live table; returns the jobs that failed.

    Interrupted, it has every run write its checkpoint, waits for them, and raises Interrupted.
    """
    waiting = deque(job for job in jobs if job.state != "finished")
    if len(waiting) < len(jobs):
        console.print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished already.")
    running: dict[Any, tuple[Job, float]] = {}
    failed: list[Job] = []
    board = Board(len(waiting))
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
                    word = "finished" if good else "[red]failed[/red]"
                    board.ended += 1
                    console.print(f"{board.ended}/{board.total} {word} {job.folder.name} {taken}", highlight=False)
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
    """The live table of a sweep."""

    total: int
    ended: int = 0
    begun: float = field(default_factory=time.monotonic)

    def table(self, jobs: list[Job], waiting: int, failed: int) -> Table:
        """State, progress, reward and time left of the running jobs; how many others there are."""
        left = (time.monotonic() - self.begun) / self.ended * (self.total - self.ended) if self.ended else None
        title = f"{self.ended} of {self.total} runs ended, {failed} of them failed; {waiting} wait; {_clock(left)} left"
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
