"""The command `bench`. Nothing heavy is imported until a command runs."""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from bench import __version__
from bench.cli.advise import advise
from bench.cli.checks import doctor, profile_setting, test_plugin
from bench.cli.compare import compare
from bench.cli.frontier import frontier
from bench.cli.judge import judge
from bench.cli.models import convert, export, push, sample
from bench.cli.options import (
    AddedMetrics,
    Kind,
    MethodName,
    ModelName,
    PromptsName,
    RewardName,
    Set,
    SuiteName,
    completed,
    console,
    show_warnings,
    with_home,
)
from bench.cli.publish import merge, pack, reproduce, verify
from bench.cli.report import report, serve
from bench.cli.sweep import sweep
from bench.errors import BenchError, disk_error
from bench.runtime.console import TextConsole, print_anything
from bench.runtime.stopping import Interrupted, end_with_launcher, signals_stop

if TYPE_CHECKING:
    from bench.settings import RunConfig

application = typer.Typer(
    help="Compare reward-finetuning methods for diffusion models: one sampler, one evaluation, every method.\n\n"
    "Start with: bench run nabla_gfn",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nabla-bench {__version__}")
        raise typer.Exit()


@application.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What every command shares. Its help is the application's."""


@application.command()
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
    method = _one_method(name, method)
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


def _one_method(name: str | None, option: str | None) -> str:
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


@application.command()
def fetch(
    suite: SuiteName = None,
    reward: RewardName = None,
    model: ModelName = None,
    method: MethodName = "nabla_gfn",
    assignments: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say sizes only.")] = False,
) -> None:
    """Download what a setting needs: weights of model, rewards and feature spaces, and prompts. Sizes are said first.

    bench fetch --suite sd15-hps
    bench fetch --reward image_reward --model sd21 --dry-run
    """
    from bench.config import resolve

    overrides = {} if model is None else {"model.name": model}
    config = resolve(method, reward=reward, suite=suite, overrides=overrides, assignments=assignments)
    show_warnings()
    from bench.hub import obtain
    from bench.runs.plan import show_requirements
    from bench.runs.requirements import requirements

    needs = requirements(config)
    show_requirements(needs, console)
    if not dry_run:
        obtain(needs)
        console.print("Everything is here.")


@application.command("ls")
def list_names(
    kind: Annotated[Kind | None, typer.Argument(help="What to list; everything if left out.")] = None,
) -> None:
    """List what can be named: plugins, models, prompts, suites, sweeps, tables; a GPU or downloads are marked."""
    from bench.diagnose.listing import describe

    for chosen in [kind] if kind else Kind:
        table = Table(title=chosen.value, title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.add_column("name", style="cyan", no_wrap=True)
        table.add_column("what it is")
        rows = list(describe(chosen.value))
        if any(needs for *_, needs in rows):
            table.add_column("needs")
        for row in rows:
            table.add_row(*row[: len(table.columns)])
        console.print(table)
        console.print()


@application.command("eval")
def evaluate_run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    assignments: Set = None,
) -> None:
    """Evaluate a finished run again, for example with more samples.

        bench eval runs/emoji/emoji_clip/nabla_gfn-seed0-1a2b3c4d --set evaluation.samples_per_prompt=32

    Results go into a folder of their own inside the run's.
    """
    show_warnings()
    from bench.runs.evaluate import evaluate_again

    path = evaluate_again(folder, assignments or [], console)
    console.print(f"Results in {path}")


application.command("profile")(profile_setting)
application.command("selftest")(test_plugin)
for command in (
    *(sweep, judge, report, frontier, serve, advise, compare, sample, export, push, convert),
    *(doctor, reproduce, verify, pack, merge),
):
    application.command()(command)
for registered in application.registered_commands:
    if registered.callback:
        registered.callback = with_home(registered.callback)


def app() -> None:
    """Entry point: errors meant for people are printed as they are and exit with status 2."""
    print_anything()
    try:
        with signals_stop():
            if "LOCAL_RANK" in os.environ:  # one of several processes
                end_with_launcher()
            _require_text(sys.argv[1:])
            application()
    except (BenchError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # of several processes one speaks and a launcher ends the others; unless this failed alone
        told = disk_error(error) if isinstance(error, OSError) else str(error)
        TextConsole(stderr=True).print(Text("Error:", "red"), told)
        sys.exit(2)
    except Interrupted as error:
        if os.environ.get("RANK", "0") == "0":
            kept = {"run": "the last checkpoint", "sweep": "the last checkpoint", "judge": "what was drawn"}
            place = kept.get(" ".join(sys.argv[1:2]))
            resumes = f" The same command resumes from {place}." if place else ""
            TextConsole(stderr=True).print(f"Interrupted.{resumes}")
        sys.exit(error.status)


def _require_text(words: Sequence[str]) -> None:
    """Raise BenchError for a word that is no text, in a locale without UTF-8 any that is not ASCII."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise BenchError(
                f"{word!r} is no text in this locale: set LC_ALL=C.UTF-8 and unset PYTHONUTF8, or use other letters."
            ) from None
