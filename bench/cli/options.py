"""What the commands share: options whose names the shell completes, and the console."""

import logging
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler

from bench.runtime.console import TextConsole
from bench.runtime.files import expanded

console = TextConsole()


class Kind(StrEnum):
    """What `bench ls` lists."""

    methods = "methods"
    rewards = "rewards"
    metrics = "metrics"
    models = "models"
    prompts = "prompts"
    suites = "suites"
    sweeps = "sweeps"
    published = "published"


class Engine(StrEnum):
    """What computes a sweep."""

    local = "local"
    ray = "ray"


def with_home(command: Callable) -> Callable:
    """A command whose paths may begin with `~` also where the shell leaves it, as in `--out=~/runs`."""

    @wraps(command)
    def call(**arguments: Any) -> Any:
        return command(**{name: expanded(value) for name, value in arguments.items()})

    return call


def completed(kind: str) -> Callable[[str], list[str]]:
    """What the shell offers for the beginning of a name of that kind."""

    def offer(incomplete: str) -> list[str]:
        from bench.diagnose.listing import names

        return [name for name in names(kind) if name.startswith(incomplete)]

    return offer


def _folder(place: str) -> Path:
    """The path of a folder of runs, which are fetched if it is a URL."""
    from bench.runs.remote import readable

    return readable(place)


Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting, for example train.updates=50. Repeatable."),
]
RewardName = Annotated[
    str | None,
    typer.Option(
        "--reward",
        "-r",
        help="Reward; it also selects its natural suite. See: bench ls rewards.",
        autocompletion=completed("rewards"),
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Named model, local diffusers folder, or hub id.", autocompletion=completed("models")),
]
PromptsName = Annotated[
    str | None,
    typer.Option(
        "--prompts", help="Prompt set, or a .txt/.json/.csv/.parquet file.", autocompletion=completed("prompts")
    ),
]
SuiteName = Annotated[
    str | None,
    typer.Option("--suite", help="Named setting; see: bench ls suites.", autocompletion=completed("suites")),
]
MethodName = Annotated[
    str, typer.Option("--method", "-m", help="Finetuning method.", autocompletion=completed("methods"))
]
RunFolders = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Run folders, folders of them, URLs of either, or published tables by name (see: bench ls published); "
        "default runs/.",
        parser=_folder,
        autocompletion=completed("published"),
    ),
]
AddedMetrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="Measure this too, beside the setting's own metrics. Repeatable; see: bench ls metrics.",
        autocompletion=completed("metrics"),
    ),
]


def show_warnings() -> None:
    """Warnings go through rich."""
    logging.basicConfig(
        level=logging.WARNING, handlers=[RichHandler(console=console, show_path=False)], format="%(message)s"
    )
