"""`bench sweep`: the product of methods × seeds × settings as runs in processes of their own, tuned first if asked."""

import itertools
import json
import math
import os
import shlex
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field, ValidationError, field_validator
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench import registry
from bench.config import OPTIONS, resolve
from bench.errors import BenchError, did_you_mean, disk_error
from bench.evaluation.expected import Expected, expected
from bench.options import Config, Distinct, explain, leaves
from bench.reporting.rows import read_rows
from bench.runs.folder import changed_contents, is_finished
from bench.runs.log import last_record
from bench.runs.preflight import preflight
from bench.runs.rows import run_folder
from bench.runs.trackers import require_trackers
from bench.runtime import yaml_text
from bench.runtime.files import locked
from bench.runtime.stopping import Interrupted
from bench.settings import EXECUTION, RunConfig, Seed
from bench.sweeps import tune as tuning
from bench.sweeps.engines import Local, Ray

Engine = Local | Ray
SHOWN = 30  # runs in the live table
OWN = {  # settings that have a place of their own in a sweep, whose value would be passed over or win unseen
    "seed": "seeds",
    "train.threads": "threads",
    **{key: f"{option[2:]}s" if option == "--method" else option[2:] for key, option in OPTIONS.items()},
}


class Sweep(Config):
    """A sweep's specification; of settings later ones win: `set`, `settings`, `grid`, tuned ones."""

    suite: str | None = None
    reward: str | None = None
    model: str | None = None
    methods: Annotated[list[str], Distinct] = Field(min_length=1)
    seeds: Annotated[list[Annotated[Seed, Field(strict=True)]], Distinct] = Field(
        [0], min_length=1, description="a list, or a count (0, 1, …)"
    )
    set: dict[str, Any] = Field({}, description="settings of every run")
    settings: dict[str, dict[str, Any]] = Field({}, description="further settings by method")
    grid: dict[str, tuning.Values] = Field({}, description="setting → values; every combination is run")
    tune: tuning.Tune | None = Field(None, description="choose settings of every method at every point of the grid")
    workers: int | None = Field(None, ge=1, description="runs at once; null: what cores and GPUs allow")
    threads: int = Field(1, ge=1, description="CPU threads of a run")
    gpus: int = Field(0, ge=0, description="GPUs of a run, one process on each; 0: whatever it finds")
    track: Annotated[list[str], Distinct] = Field([], description="of every run, by the names that accelerate knows")
    out: Path = Field(Path(), description="folder of the runs; without one runs/<name of the file>")

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, seeds: Any) -> Any:
        return list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds

    def settings_by_place(self) -> dict[str, list[str]]:
        """Part of the file that holds settings → their dotted keys."""
        places = {"set": self.set, **{f"settings of {name}": tree for name, tree in self.settings.items()}}
        places |= {"grid": self.grid} | ({"tune.set": self.tune.set, "tune.grid": self.tune.grid} if self.tune else {})
        return {place: [key for key, _ in leaves(tree)] for place, tree in places.items()}

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
    """A specification file. Raises BenchError listing every mistake that it shows by itself."""
    try:
        tree = yaml_text.parse(path.read_text(encoding="utf8"))
        if not isinstance(tree, dict):
            raise ValueError("it holds no `key: value` lines")
        spec = Sweep(**tree)
    except ValidationError as error:
        keys = list(Sweep.model_fields)
        raise BenchError("\n".join(f"{path}: {explain(mistake, keys)}" for mistake in error.errors())) from None
    except OSError as error:
        raise BenchError(disk_error(error, path)) from None
    except (ValueError, TypeError) as error:
        raise BenchError(f"cannot read the sweep {path}: {error}.") from None
    if mistakes := [*_misplaced(spec), *(_mistuned(spec, spec.tune) if spec.tune else ())]:
        raise BenchError("\n".join(f"{path}: {mistake}" for mistake in mistakes))
    return spec if "out" in spec.model_fields_set else spec.model_copy(update={"out": Path("runs") / path.stem})


def _misplaced(spec: Sweep) -> Iterator[str]:
    """Settings in a place where they would do nothing, or another's work."""
    if strangers := spec.settings.keys() - set(spec.methods):
        yield f"settings for {', '.join(sorted(strangers))}, which methods: does not list."
    for place, keys in spec.settings_by_place().items():
        if idle := set(keys) & set(EXECUTION) if place in ("grid", "tune.grid") else ():
            yield f"{', '.join(sorted(idle))} in {place}: makes no other run; put one value under set."
        for key in dict.fromkeys(keys):
            if keys.count(key) > 1:
                yield f"{key} is given twice under {place}."
            if key in OWN:
                yield f"{key} under {place}: give it as {OWN[key]}."


def _mistuned(spec: Sweep, tune: tuning.Tune) -> Iterator[str]:
    """Contradictions between the tuning and the rest."""
    if tune.seed in spec.seeds:
        yield f"tune.seed = {tune.seed} is a seed of the table: tune on another."
    places = spec.settings_by_place()
    tuned = places.pop("tune.grid")
    for place, keys in places.items():
        if twice := sorted(key for key in tuned if any(_overlap(key, other) for other in keys)):
            yield f"{', '.join(twice)} is tuned, and stands under {place} too: take one away."
    if tune.updates and any(_overlap("train.updates", key) for key in [*places["tune.set"], *tuned]):
        yield "train.updates of a trial is given twice, and under tune.updates once: take one away."


def _overlap(key: str, other: str) -> bool:
    """Whether one dotted key is the other or a part of it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def plan_sweep(spec: Sweep, choices: Mapping[str, Mapping[str, Any]] | None = None) -> list[Job]:
    """Every run of the sweep, seed by seed, checked. Raises BenchError listing every impossible one.

    choices: of `plan_trials`' keys, the tuned ones; methods with a key that is not there are left out.
    """
    require_trackers(spec.track)
    plan = _Plan(spec, spec.out)
    tuned, choices = ({}, {}) if choices is None else (plan_trials(spec), choices)
    for seed, (method, at) in itertools.product(spec.seeds, spec.rows()):
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
    plan.require(spec.tune.metrics())
    plan.jobs()  # raises if one is impossible
    return {key: [(job, values) for job, values in jobs if job] for key, jobs in trials.items()}


def plan(spec: Sweep) -> list[Job]:
    """Trials of what is still to be chosen, and runs, with the choices that are made already.

    Raises BenchError listing what is impossible, in runs whose settings are still to be chosen too.
    """
    place = next(path for path in (spec.out, *spec.out.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise BenchError(f"out = {spec.out}: {place} is no folder that can be written to: choose another.")
    plan_sweep(spec)
    trials = plan_trials(spec)
    chosen = _known(spec, trials)
    open_trials = [job for key, jobs in trials.items() if key not in chosen for job, _ in jobs]
    return [*open_trials, *plan_sweep(spec, chosen)]


class _Plan:
    """Jobs by name, and what is wrong with those that are none."""

    def __init__(self, spec: Sweep, out: Path):
        self.spec, self.out = spec, out
        self.by_name: dict[str, Job] = {}
        self.origins: dict[str, str] = {}  # of the jobs: the settings of their own
        self.faults: dict[str, None] = {}

    def add(self, method: str, seed: int, settings: dict[str, Any]) -> Job | None:
        """Plan a run with settings of its own over the sweep's; None if it is impossible."""
        spec = self.spec
        chosen: dict[str, Any] = {}
        for layer in (spec.set, spec.settings.get(method, {}), settings, {"train.threads": spec.threads}):
            for key, value in leaves(layer):
                chosen.pop(key, None)  # a later setting comes after all earlier ones, of which it may be a part
                chosen[key] = value
        named = {"suite": spec.suite, "reward": spec.reward, "model": spec.model}
        try:
            config = _configuration(method, seed, chosen, **named)
        except BenchError as error:
            self.faults[f"{method}: {error}"] = None
            return None
        folder = run_folder(self.out, config)
        origin = ", ".join(f"{key} = {_text(value)}" for key, value in settings.items())
        if self.origins.setdefault(folder.name, origin) != origin:
            self.faults[f"{method}: {origin} makes the same run as {self.origins[folder.name]}: take one away."] = None
        options = [f"--{key}={value}" for key, value in named.items() if value is not None]
        sets = [word for key, value in chosen.items() for word in ("--set", f"{key}={_text(value)}")]
        options += [f"--track={name}" for name in spec.track]
        options += [f"--num-processes={spec.gpus}"] if spec.gpus > 1 else []
        arguments = ["run", f"--method={method}", *options, f"--seed={seed}", *sets, f"--out={folder}"]
        log = self.out / "logs" / f"{folder.name}.log"
        return self.by_name.setdefault(folder.name, Job(arguments, folder, log, config))

    def require(self, metrics: Sequence[str]) -> None:
        """Note as faults the metrics that some job will not measure, by name and split, or without a value."""
        alike: dict[str, RunConfig] = {}  # what is measured depends on nothing else
        for config in (job.config for job in self.by_name.values()):
            parts = [config.evaluation, config.evaluation_sampler(), config.model, config.prompts]
            alike[repr([config.reward.name, *parts])] = config
        for config in alike.values():
            self.faults |= dict.fromkeys(_unmeasured(metrics, expected(config), config))

    def jobs(self) -> list[Job]:
        """All of them. Raises BenchError with every fault."""
        if self.faults:
            raise BenchError("\n".join(self.faults))
        return list(self.by_name.values())


def _unmeasured(metrics: Sequence[str], found: Expected, config: RunConfig) -> Iterator[str]:
    for name in metrics:
        base = name.partition("/")[0]
        if base in registry.plugins("metrics") and base not in config.evaluation.metrics:
            yield f"tune: {name!r} is not measured: add {base!r} to evaluation.metrics."
        elif name not in found.names and base not in found.unknown:
            yield f"tune: {name!r} is not measured{did_you_mean(name, found.names)}"
        elif note := found.names.get(name):
            yield f"tune: {name!r} has no value in this setting: {note}."


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
    others = tuning.other_choices(path, spec.tune, trials)
    tuning.write_choices(path, spec.tune, [*others, *(choices[key] for key in trials if key in choices)])
    console.print(f"{tuning.summary(list(choices.values()))} Choices in {path}.")
    return choices, [job for job in open_jobs if measured(job) is None]


def _known(spec: Sweep, trials: dict[str, list[tuple[Job, dict[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """The choices that `tuned.yaml` holds already."""
    if spec.tune is None:
        return {}
    planned = {key: [job.folder.name for job, _ in jobs] for key, jobs in trials.items()}
    tuning.other_choices(spec.out / tuning.FILE, spec.tune, planned)  # raises where they would be lost
    return tuning.read_choices(spec.out / tuning.FILE, spec.tune, planned)


def measured(job: Job) -> pd.DataFrame | None:
    """The rows of a job that ended, if only because it diverged; None where there is something to run."""
    try:
        rows = read_rows(job.folder / "rows.parquet")
    except (OSError, ValueError):  # none, damaged, or of another version
        return None
    return None if changed_contents(job.folder, job.config) else rows


@contextmanager
def reserved(spec: Sweep, *, create: bool) -> Iterator[None]:
    """Have the sweep's folder to itself for the block; create: make it. Raises BenchError if another sweep has it."""
    logs = spec.out / "logs"  # not the whole: a run there may be at work by itself, on half-written files of its own
    with ExitStack() as held:
        if create or logs.is_dir():
            try:
                held.enter_context(locked(logs))
            except BenchError:
                raise BenchError(
                    f"another sweep is at work in {spec.out}: wait until it ends, or choose another out."
                ) from None
        yield


def make_engine(spec: Sweep, name: str, address: str | None) -> Engine:
    """ "local" or "ray". Raises BenchError if it is not there, and for an address of no cluster."""
    if address and name != "ray":
        raise BenchError(f"--address {address} is that of a Ray cluster: give --on ray too.")
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
