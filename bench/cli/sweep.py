"""The command that runs many: `bench sweep`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from bench.cli.options import Engine, completed, console, show_warnings


def sweep(
    spec: Annotated[
        Path,
        typer.Argument(
            metavar="SPEC",
            help="A file, see below, or a sweep that ships, by name; see: bench ls sweeps.",
            autocompletion=completed("sweeps"),
        ),
    ],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at once; overrides the file.")] = None,
    on: Annotated[Engine, typer.Option(help="Where the runs are computed.")] = Engine.local,
    address: Annotated[
        str | None, typer.Option(help="With --on ray: the cluster; default: a running one, or a new one here.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every run's state and command.")] = False,
) -> None:
    """Run the product of methods, seeds and settings, several processes at once.

    Finished runs are skipped, interrupted ones resumed; a failed run does not stop the others. The file:

        suite: ring
        methods: [nabla_gfn, ddpo]
        seeds: 10                                   # or a list
        set: {train.updates: 400}                   # every run
        settings: {ddpo: {optimizer.lr: 6.0e-4}}    # by method
        grid: {reward.beta: [0.5, 1.0]}             # every combination
        tune: {grid: {optimizer.lr: [1.0e-4, 1.0e-3]}, seed: 100, largest: reward/train}
        threads: 1

    With tune: every method is first tried with each value, on a seed of its own; what the rule chose is written to
    tuned.yaml and used. With strength: true and envelope: reward/train there, rates are tried with each method's own
    strength, and the configurations on its envelope of gain and path_kl are run. Compare the runs with bench report.
    """
    show_warnings()
    from bench.sweeps import sweep as sweeps
    from bench.sweeps.jobs import plan_sweep
    from bench.sweeps.running import last_words, run_sweep
    from bench.sweeps.spec import read_sweep

    read = read_sweep(spec)
    read = read.model_copy(update={"workers": workers}) if workers else read
    planned = sweeps.plan(read)  # what is impossible is reported before anything runs
    engine = sweeps.make_engine(read, on, address)

    def say_time() -> None:
        if budget := sweeps.trial_budget(read):
            console.print(budget)
        with console.status("trying a piece of every kind of run"):
            text = sweeps.sweep_length(read, engine.slots)
        if text:
            console.print(f"Time: {text}.")

    if dry_run:
        for job in planned:
            typer.echo(f"{job.state:8} {job.command}")
        say_time()
        with sweeps.reserved(read, create=False):
            return
    with sweeps.reserved(read, create=True), engine:
        if not read.gpus:  # the runs have them to themselves
            say_time()
        choices, trials = sweeps.tune(read, console, engine)
        jobs = plan_sweep(read, choices)
        failed = run_sweep(jobs, console, engine)
    for job in [*trials, *failed]:
        words = last_words(job.log)
        console.print(Text("failed:", "red"), f"{job.folder.name}: {words} (see {job.log})")
    if trials:
        console.print("Methods with a failed trial were not run; the same command tries it again.")
    console.print(f"{len(jobs) - len(failed)} of {len(jobs)} runs are in {read.out}. Compare: bench report {read.out}")
    if trials or failed:
        raise typer.Exit(1)
