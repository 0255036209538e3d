"""The command `bench`. Nothing heavy is imported until a command runs."""

import inspect
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
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
    Kind,
    MethodName,
    ModelName,
    RewardName,
    Set,
    SuiteName,
    console,
    show_warnings,
    with_home,
)
from bench.cli.publish import merge, pack, reproduce, verify
from bench.cli.report import report, serve
from bench.cli.run import run
from bench.cli.sweep import sweep
from bench.errors import BenchError, disk_error
from bench.runtime.console import TextConsole, print_anything
from bench.runtime.stopping import Interrupted, end_with_launcher, signals_stop

application = typer.Typer(
    help="Compare methods that finetune diffusion and flow-matching models on a reward: one sampler, one "
    "evaluation.\n\n"
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


application.command()(run)


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

    Results go into a folder of their own inside the run's.

        bench eval runs/emoji/emoji_clip/nabla_gfn-seed0-1a2b3c4d --set evaluation.samples_per_prompt=32
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


def _reflowed(docstring: str) -> str:
    """Prose with a line for each paragraph, for terminals of any width; commands and what is indented stay.

    Square brackets are escaped: rich would take [nabla_gfn, ddpo] for markup and drop it.
    """
    paragraphs = escape(inspect.cleandoc(docstring)).split("\n\n")
    return "\n\n".join(part if part.startswith((" ", "bench ")) else part.replace("\n", " ") for part in paragraphs)


for registered in application.registered_commands:
    if registered.callback:
        registered.help = _reflowed(registered.callback.__doc__ or "")
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
        message = disk_error(error) if isinstance(error, OSError) else str(error)
        TextConsole(stderr=True).print(Text("Error:", "red"), message)
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
