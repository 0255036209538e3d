"""The runs of a sweep and the trials of its tuning: their settings, folders and commands, checked before any starts."""

import itertools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bench import registry
from bench.config import resolve
from bench.diagnose.nfe import rows_of_update
from bench.errors import BenchError, did_you_mean
from bench.evaluation.expected import Expected, expected
from bench.method import Strength
from bench.options import leaves
from bench.reporting.rows import read_rows
from bench.runs.folder import changed_contents, is_finished
from bench.runs.preflight import preflight
from bench.runs.rows import run_folder
from bench.runs.trackers import require_trackers
from bench.settings import RunConfig
from bench.sweeps import choosing, tuned_file
from bench.sweeps import tune as tuning
from bench.sweeps.spec import Sweep


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


def measured(job: Job) -> pd.DataFrame | None:
    """The rows of all evaluations of a job that ended, if only because it diverged; None if something is to be run."""
    last = job.folder / "rows.parquet"
    try:
        rows = read_rows([*job.folder.glob("rows-at-*.parquet"), last])
    except (OSError, ValueError):  # none, damaged, or of another version
        return None
    return None if changed_contents(job.folder, job.config) else rows


def plan_sweep(spec: Sweep, choices: Mapping[str, Mapping[str, Any]] | None = None) -> list[Job]:
    """Every run of the sweep, seed by seed, checked. Raises BenchError listing every impossible one.

    choices: of `plan_trials`' keys, the tuned ones; methods with a key that is not there are left out.
    """
    require_trackers(spec.track)
    plan = _Plan(spec, spec.out)
    tuned = {} if choices is None or spec.tune is None else tuned_methods(spec)
    for seed, (method, at) in itertools.product(spec.seeds, spec.rows()):
        key = tuned_file.key_of(method, at)
        if key not in tuned:
            plan.add(method, seed, at)
        elif choices and key in choices:
            for values in choosing.configurations(choices[key]):
                plan.add(method, seed, at | values)
    return plan.jobs()


def tuned_methods(spec: Sweep) -> dict[str, tuple[str, dict[str, Any]]]:
    """Key → (method, point of the grid), of every method that trains."""
    rows = ((method, at) for method, at in spec.rows() if registry.load("methods", method).needs.training)
    return {tuned_file.key_of(*row): row for row in rows}


def strength_of(method: str) -> Strength | None:
    """What the method declares."""
    strength: Strength | None = registry.load("methods", method).strength
    return strength


Trials = dict[str, list[tuple[Job, dict[str, Any]]]]  # key of a method at a point of the grid → its trials, with values


def plan_trials(spec: Sweep, widenings: Sequence[tuning.Widening] = ()) -> Trials:
    """The trials of every method that trains, after these widenings of the grid, checked."""
    if spec.tune is None:
        return {}
    plan, trials = _Plan(spec, spec.out / "tune"), {}
    for key, (method, at) in tuned_methods(spec).items():
        strength = strength_of(method) if spec.tune.strength else None
        given = {*spec.tune.grid, *(() if strength and strength.relative else plan.settings(method, at))}
        if strength and strength.setting in given:
            plan.faults[f"{method}: {strength.setting} is tuned as its strength, and given too: take one away."] = None
        own = plan.value(method, at, strength.setting) if strength and strength.relative else None
        points = spec.tune.points(strength, own, widenings)
        trials[key] = [(plan.add(method, spec.tune.seed, at | v | spec.tune.settings()), v) for v in points]
    plan.require(spec.tune.metrics())
    plan.jobs()  # raises if one is impossible
    return {key: [(job, values) for job, values in jobs if job] for key, jobs in trials.items()}


def plan_again(spec: Sweep, tried: Trials, values_of: Mapping[str, Sequence[Mapping[str, Any]]]) -> Trials:
    """Of the trials, by key those with these values, each with `tune.resolve` times the evaluation samples."""
    assert spec.tune is not None
    plan, trials = _Plan(spec, spec.out / "tune"), {}
    methods = tuned_methods(spec)
    for key, several in values_of.items():
        method, at = methods[key]
        (samples,) = {job.config.evaluation.samples_per_prompt for job, _ in tried[key]}
        more = spec.tune.settings() | {"evaluation.samples_per_prompt": spec.tune.resolve * samples}
        trials[key] = [(plan.add(method, spec.tune.seed, at | {**values} | more), dict(values)) for values in several]
    plan.jobs()
    return {key: [(job, values) for job, values in jobs if job] for key, jobs in trials.items()}


class _Plan:
    """Jobs by name, and what is wrong with those that are none."""

    def __init__(self, spec: Sweep, out: Path):
        self.spec, self.out = spec, out
        self.by_name: dict[str, Job] = {}
        self.origins: dict[str, str] = {}  # of the jobs: the settings of their own
        self.faults: dict[str, None] = {}

    def settings(self, method: str, own: dict[str, Any]) -> dict[str, Any]:
        """Dotted key → value: the sweep's settings for the method, and a run's own over them."""
        spec, chosen = self.spec, dict[str, Any]()
        for layer in (spec.set, spec.settings.get(method, {}), own, {"train.threads": spec.threads}):
            for key, value in leaves(layer):
                chosen.pop(key, None)  # a later setting comes after all earlier ones, of which it may be a part
                chosen[key] = value
        return chosen

    def value(self, method: str, at: dict[str, Any], setting: str) -> float | None:
        """The number that a setting of the method has at a point of the grid; None if the run is impossible."""
        try:
            config = _resolved(self.spec, method, 0, self.settings(method, at))
        except BenchError:  # which `add` will tell
            return None
        number: float = dict(leaves(config.model_dump()))[setting]
        return number

    def add(self, method: str, seed: int, settings: dict[str, Any]) -> Job | None:
        """Plan a run with settings of its own over the sweep's; None if it is impossible."""
        spec, chosen = self.spec, self.settings(method, settings)
        try:
            if spec.nfe and "train.updates" not in chosen and registry.load("methods", method).needs.training:
                # one seed's choices of steps for all: runs of other lengths would be other configurations
                chosen["train.updates"] = _updates(spec.nfe, _resolved(spec, method, 0, chosen))
            config = _resolved(spec, method, seed, chosen)
            preflight(config)
        except BenchError as error:
            self.faults[f"{method}: {error}"] = None
            return None
        folder = run_folder(self.out, config)
        origin = ", ".join(f"{key} = {_text(value)}" for key, value in settings.items())
        if self.origins.setdefault(folder.name, origin) != origin:
            self.faults[f"{method}: {origin} makes the same run as {self.origins[folder.name]}: take one away."] = None
        options = [f"--{key}={value}" for key, value in _named(spec).items() if value is not None]
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


def _updates(nfe: int, config: RunConfig) -> int:
    """How many take this NFE, at least one."""
    if (rows := rows_of_update(config)) is None:
        raise BenchError("the method does not say its NFE (Method.nfe): leave out nfe, and set train.updates.")
    return max(1, int(nfe / rows))


def _named(spec: Sweep) -> dict[str, str | None]:
    return {"suite": spec.suite, "reward": spec.reward, "model": spec.model}


def _resolved(spec: Sweep, method: str, seed: int, chosen: Mapping[str, Any]) -> RunConfig:
    overrides = {"seed": seed} | ({} if spec.model is None else {"model.name": spec.model})
    assignments = [f"{key}={_text(value)}" for key, value in chosen.items()]
    return resolve(method, reward=spec.reward, suite=spec.suite, overrides=overrides, assignments=assignments)
