"""`bench sweep`: the product of methods × seeds × settings as runs in processes of their own, tuned first if asked."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console

from bench.errors import BenchError
from bench.runs.duration import sweep_time
from bench.runtime.files import locked
from bench.sweeps import tune as tuning
from bench.sweeps.engines import Local, Ray
from bench.sweeps.jobs import Job, measured, plan_sweep, plan_trials
from bench.sweeps.running import Engine, run_sweep
from bench.sweeps.spec import Sweep


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


def sweep_length(spec: Sweep, at_once: int) -> str:
    """How long the trials and runs that are not finished will take; "" if all are. Pieces of them are tried now."""
    trials = plan_trials(spec)
    chosen = _known(spec, trials)
    guessed = {key: {"chosen": {}} for key in trials} | chosen  # what is still to be chosen hardly changes the time
    jobs = [job for key, tried in trials.items() if key not in chosen for job, _ in tried]
    left = [job.config for job in [*jobs, *plan_sweep(spec, guessed)] if job.state != "finished"]
    return f"{len(left)} runs to do: {sweep_time(left, at_once)}" if left else ""


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
