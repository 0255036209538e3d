"""`bench sweep`: the product of methods × seeds × settings as runs in processes of their own, tuned first if asked."""

import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console

from bench.diagnose.nfe import rows_of_update
from bench.errors import BenchError
from bench.runs.duration import sweep_time
from bench.runtime.files import locked
from bench.sweeps import choosing, tuned_file
from bench.sweeps import tune as tuning
from bench.sweeps.engines import Local, Ray
from bench.sweeps.jobs import (
    Job,
    Trials,
    measured,
    plan_again,
    plan_sweep,
    plan_trials,
    strength_of,
    tuned_methods,
)
from bench.sweeps.running import Engine, run_sweep
from bench.sweeps.spec import Sweep

ALIKE = 1.1  # factor between the costs of trials that counts as equal


def plan(spec: Sweep) -> list[Job]:
    """Trials of what is still to be chosen, and runs, with the choices that are made already.

    Raises BenchError listing what is impossible, in runs whose settings are still to be chosen too.
    """
    place = next(path for path in (spec.out, *spec.out.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise BenchError(f"out = {spec.out}: {place} is no folder that can be written to: choose another.")
    plan_sweep(spec)
    trials = plan_trials(spec, _widenings(spec))
    chosen = _known(spec, trials)
    open_trials = [job for key, jobs in trials.items() if key not in chosen for job, _ in jobs]
    return [*open_trials, *plan_sweep(spec, chosen)]


def sweep_length(spec: Sweep, at_once: int) -> str:
    """How long the trials and runs that are not finished will take; "" if all are. Pieces of them are tried now.

    What wider grids and trials with more samples will add is not known before.
    """
    trials = plan_trials(spec, _widenings(spec))
    chosen = _known(spec, trials)
    # what is still to be chosen hardly changes the time, but for how many configurations it is
    kept = spec.tune.most if spec.tune and spec.tune.envelope else 1
    guessed = {key: {"chosen": [values for _, values in tried[:kept]]} for key, tried in trials.items()} | chosen
    jobs = [job for key, tried in trials.items() if key not in chosen for job, _ in tried]
    left = [job.config for job in [*jobs, *plan_sweep(spec, guessed)] if job.state != "finished"]
    return f"{len(left)} runs to do: {sweep_time(left, at_once, spec.threads)}" if left else ""


def trial_budget(spec: Sweep) -> str:
    """How many trials every method gets and what each costs; "" where nothing is still to be chosen."""
    trials = plan_trials(spec, _widenings(spec))
    if spec.tune is None or not trials.keys() - _known(spec, trials).keys():
        return ""
    counts = sorted({len(jobs) for jobs in trials.values()})
    text = f"Tuning: {len(trials)} × {' or '.join(map(str, counts))} trials"
    rows = {key: max(_rows(job) for job, _ in jobs) for key, jobs in trials.items()}
    if known := {tuned_methods(spec)[key][0]: value for key, value in rows.items() if value}:
        text += f", each of {_range(known.values())} NFE in training"
        if max(known.values()) > ALIKE * min(known.values()):
            text += f" ({', '.join(f'{name} {value:,.0f}' for name, value in known.items())}; `nfe:` makes them equal)"
    return text + (f"; the grids grow up to {spec.tune.widen} times." if spec.tune.widen else ".")


def _rows(job: Job) -> float:
    """NFE of a run's training, forward and backward; 0 where the method does not say."""
    return (rows_of_update(job.config) or 0.0) * job.config.train.updates


def _range(values: Collection[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def tune(spec: Sweep, console: Console, engine: Engine) -> tuple[dict[str, dict[str, Any]], list[Job]]:
    """Run the trials that are missing and choose: (method, point) → choice, which `tuned.yaml` keeps; the failed jobs.

    Where a winner has an extreme value the grids of all methods grow, as often as `tune.widen` says, and it is chosen
    again. A trial that diverged has its result; of methods with a trial that failed otherwise nothing is chosen.
    """
    if spec.tune is None:
        return {}, []
    path, widenings = spec.out / tuned_file.FILE, _widenings(spec)
    strengths = {method: strength_of(method) for method, _ in tuned_methods(spec).values()}
    before: dict[str, dict[str, Any]] = {}
    while True:
        trials = plan_trials(spec, widenings)
        choices, failed = _choose(spec, trials, console, engine)
        choices = {k: choosing.with_replaced(one, before[k]) if k in before else one for k, one in choices.items()}
        others = tuned_file.other_choices(path, spec.tune, trials)
        kept = [*others, *(choices[key] for key in trials if key in choices)]
        tuned_file.write_choices(path, spec.tune, kept, widenings)
        wider = choosing.wider(spec.tune, list(choices.values()), strengths) if len(widenings) < spec.tune.widen else {}
        if failed or not wider:
            break
        text = ", ".join(f"{axis} ({' and '.join(sides)})" for axis, sides in wider.items())
        try:
            plan_trials(spec, [*widenings, wider])
        except BenchError as error:  # a value beyond what the setting can have
            console.print(f"Winners are at an edge of the grids, which cannot grow: {text}. {error}")
            break
        console.print(f"Wider grids for all methods, as winners are at an edge: {text}.")
        widenings, before = [*widenings, wider], choices
    console.print(f"{tuned_file.summary(list(choices.values()))} Choices in {path}.")
    return choices, failed


def _choose(
    spec: Sweep, trials: Trials, console: Console, engine: Engine
) -> tuple[dict[str, dict[str, Any]], list[Job]]:
    """Run the trials that are missing, then those tied with the chosen with more samples; choices and failed jobs."""
    assert spec.tune is not None
    choices = _known(spec, trials)
    if open_trials := {key: jobs for key, jobs in trials.items() if key not in choices}:
        console.print(f"Tuning: {spec.tune.rule()}, seed {spec.tune.seed}.")
    results = _results(open_trials, "trials", console, engine)
    methods = tuned_methods(spec)
    fresh = {key: choosing.choose(spec.tune, methods[key][0], tried) for key, tried in results.items()}
    contested = {key: [*choosing.configurations(one), *one["ties"]] for key, one in fresh.items() if one["ties"]}
    if spec.tune.resolve > 1 and contested:
        again = plan_again(spec, trials, contested)
        second = _results(again, f"trials again, with {spec.tune.resolve} times the samples", console, engine)
        for key in again:
            fresh.pop(key)
            if key in second:
                fresh[key] = choosing.choose(spec.tune, methods[key][0], results[key], second[key])
        open_trials |= {f"{key} again": jobs for key, jobs in again.items()}
    choices |= {key: one | {"at": methods[key][1]} for key, one in fresh.items()}
    return choices, [job for jobs in open_trials.values() for job, _ in jobs if measured(job) is None]


def _results(trials: Trials, stage: str, console: Console, engine: Engine) -> dict[str, list[choosing.Trial]]:
    """Run the trials that are missing; by key those of methods all of whose trials have ended."""
    if missing := [job for jobs in trials.values() for job, _ in jobs if measured(job) is None]:
        run_sweep(missing, console, engine, stage)
    found = {key: [(job.folder.name, values, measured(job)) for job, values in jobs] for key, jobs in trials.items()}
    complete: dict[str, list[choosing.Trial]] = {}
    for key, tried in found.items():
        ended: list[choosing.Trial] = [(run, values, rows) for run, values, rows in tried if rows is not None]
        if len(ended) == len(tried):
            complete[key] = ended
    return complete


def _known(spec: Sweep, trials: Trials) -> dict[str, dict[str, Any]]:
    """The choices that `tuned.yaml` holds already."""
    if spec.tune is None:
        return {}
    planned = {key: [job.folder.name for job, _ in jobs] for key, jobs in trials.items()}
    tuned_file.other_choices(spec.out / tuned_file.FILE, spec.tune, planned)  # raises where they would be lost
    return tuned_file.read_choices(spec.out / tuned_file.FILE, spec.tune, planned)


def _widenings(spec: Sweep) -> list[tuning.Widening]:
    """Those that `tuned.yaml` holds already."""
    return tuned_file.read_widenings(spec.out / tuned_file.FILE, spec.tune) if spec.tune else []


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
