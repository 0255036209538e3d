"""The command `bench run`."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.cli.options import (
    AddedMetrics,
    ModelName,
    PromptsName,
    RewardName,
    Set,
    SuiteName,
    completed,
    console,
    show_warnings,
)
from bench.errors import BenchError

if TYPE_CHECKING:
    from bench.settings import RunConfig


def run(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="METHOD",
            help="Finetuning method; see: bench ls methods.",
            autocompletion=completed("methods"),
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="The same as METHOD.", autocompletion=completed("methods"))
    ] = None,
    reward: RewardName = None,
    model: ModelName = None,
    prompts: PromptsName = None,
    suite: SuiteName = None,
    seed: Annotated[int | None, typer.Option(help="Seed of training noise, choices and weights.")] = None,
    updates: Annotated[int | None, typer.Option(help="Optimiser updates.")] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Run folder, or its URL (s3://…, gs://…); default runs/SUITE/REWARD/METHOD-seedN-HASH."
        ),
    ] = None,
    metric: AddedMetrics = None,
    assignments: Set = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Batches, and what else it takes to fit a GPU: 16gb, 24gb, 48gb or 80gb."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and its cost.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="With --dry-run: score a few prior samples, and say what β means on them.")
    ] = False,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="With --dry-run: say what fits a GPU of this size, such as 24gb, not this one's."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start anew; an earlier run in the folder is moved aside.")
    ] = False,
    track: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Also log to a tracker that accelerate knows, such as wandb or mlflow. Repeatable."
        ),
    ] = None,
    num_processes: Annotated[
        int, typer.Option(min=1, help="Processes that share the run, one a GPU; accelerate launch works too.")
    ] = 1,
) -> None:
    """Finetune a model with one method, evaluate it, and write tables and pictures.

    The same command again resumes an interrupted run, or reports a finished one.

        bench run nabla_gfn
        bench run ddpo --reward emoji_style --updates 200 --seed 1
        bench run draft --set method.depth=1 --set optimizer.lr=1e-3
        bench run nabla_gfn --reward "hps+0.1*aesthetic" --num-processes 8
    """
    method = _method_of(name, method)
    if probe and not dry_run:
        raise BenchError("--probe belongs to --dry-run: bench run METHOD --dry-run --probe.")
    if gpu_memory and not dry_run:
        raise BenchError("--gpu-memory belongs to --dry-run; --preset 24gb fits a run to a GPU.")
    from bench.config import beta_origin, parse_assignment, resolve

    if track:
        from bench.runs.trackers import require_trackers

        require_trackers(track)
    named = {"model.name": model, "prompts.name": prompts, "seed": seed, "train.updates": updates}
    overrides: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    config = resolve(
        method, reward=reward, suite=suite, overrides=overrides, assignments=assignments, metrics=metric or ()
    )
    show_warnings()
    notes = []
    if preset:
        from bench.runs.presets import fitted, preset_text

        keys = [parse_assignment(text)[0] for text in assignments or []]
        found = fitted(config, preset, keys, num_processes)
        config = found.config
        notes.append(preset_text(preset, found))

    from bench.runs.preflight import preflight
    from bench.runs.remote import run_place
    from bench.runtime import processes

    folder, mirror = run_place(out, config)
    if mirror and force:
        raise BenchError(f"--force would replace the run at {out}: give another --out.")
    if dry_run:
        _show_plan(config, mirror.url if mirror else folder, num_processes, gpu_memory, probe, notes)
        return
    if num_processes > 1 and not processes.launched():
        preflight(config)
        raise typer.Exit(processes.launch(num_processes, sys.argv[1:]))
    console.quiet = not processes.is_main()
    for note in [*notes, f"β = {config.reward.beta:g} for {config.reward.name} ({beta_origin(config)})."]:
        console.print(note)
    with processes.main_first():
        preflight(config)
    with ExitStack() as locks:
        from bench.runs.run import Run  # the libraries load when it is known that nothing is missing

        job = Run(config, folder, console, track or (), mirror=mirror)
        if not job.go(force, locks):
            console.print("This run is finished; nothing was computed.")
        if processes.is_main():
            job.report()


def _method_of(name: str | None, option: str | None) -> str:
    """The method that the argument or the option names."""
    if name and option and name != option:
        raise BenchError(f"two methods are given, {name!r} and --method {option!r}: one run trains with one.")
    if not (method := name or option):
        raise BenchError("which method? For example: bench run nabla_gfn (bench ls methods shows all).")
    return method


def _show_plan(
    config: "RunConfig",
    place: Path | str,
    num_processes: int,
    gpu_memory: str | None,
    probe: bool,
    notes: Sequence[str],
) -> None:
    """What `--dry-run` prints: the configuration and its cost; probe: also what β means on samples of the prior."""
    from bench.runs.combinations import gpu_bytes
    from bench.runs.plan import show_plan
    from bench.runs.preflight import check

    check(config)
    for note in notes:
        console.print(note)
    show_plan(config, place, num_processes, console, gpu_bytes(gpu_memory) if gpu_memory else None)
    if probe:
        from bench.hub import obtain
        from bench.runs.probe import show_probe
        from bench.runs.requirements import training_requirements

        obtain(training_requirements(config))
        show_probe(config, console)
