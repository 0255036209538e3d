"""The command that says which method to run: `bench advise`."""

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bench import shipped
from bench.cli.options import completed, console
from bench.errors import BenchError


class Currency(StrEnum):
    """What a budget is counted in."""

    reward_calls = "reward_calls"
    reward_gradients = "reward_gradients"
    nfe = "nfe"
    updates = "updates"
    seconds = "seconds"


class Gradient(StrEnum):
    """Whether methods may use the reward's gradient."""

    yes = "yes"
    no = "no"


def advise(
    budget: Annotated[float, typer.Option(help="What training may spend, in --currency.")],
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Folders of runs of your own, beside the published rows.")
    ] = None,
    currency: Annotated[
        Currency,
        typer.Option(
            help="Unit of --budget: reward calls, gradients of the reward, NFE, updates, or seconds of training."
        ),
    ] = Currency.reward_calls,
    max_kl: Annotated[float | None, typer.Option(help="Stop where path_kl reaches so many nats.")] = None,
    gradient: Annotated[
        Gradient, typer.Option(help="no: only methods that do without the reward's gradient.")
    ] = Gradient.yes,
    prior: Annotated[str | None, typer.Option(help="Only on this model.", autocompletion=completed("models"))] = None,
    reward: Annotated[
        str | None, typer.Option("--reward", "-r", help="Only this reward.", autocompletion=completed("rewards"))
    ] = None,
) -> None:
    """Rank methods by what they gained within a budget and a KL bound, and print the commands of the best.

    It reads published rows, and yours, and says what they do not tell. See docs/report.md.

        bench advise --budget 500 --max-kl 20 --prior emoji --reward emoji_style
        bench advise --budget 200000 --currency nfe --gradient no --prior ring
        bench advise --budget 2000 --max-kl 10 runs/mine
    """
    from bench.publish.command import command
    from bench.reporting import advise as advice
    from bench.reporting.formats import show
    from bench.reporting.selection import collect

    for name, value in (("--budget", budget), ("--max-kl", max_kl)):
        if value is not None and not 0 < value < math.inf:
            raise BenchError(f"{name} {value:g}: a finite number above 0 is wanted.")
    axis = "train_seconds" if currency == Currency.seconds else currency.value
    ask = advice.Ask(budget, axis, max_kl, gradient == Gradient.yes)
    try:
        frame, left_out = collect([*shipped.shipped("published").values(), *(paths or [])])
    except (FileNotFoundError, ValueError) as error:
        raise BenchError(str(error)) from None
    found = advice.advise(advice.of_setting(frame, prior, reward), ask)
    if not found:
        without = "" if ask.gradient else " that does without the reward's gradient"
        raise BenchError(f"nothing was trained here{without}: name another --prior or --reward, or folders of runs.")
    for one in found:
        show([one.board], console)
        for name, (settings, updates) in one.tries.items():
            try:
                typer.echo(command(json.loads(settings), updates))
            except BenchError as error:
                typer.echo(f"no command for {name}: {error}")
        typer.echo("")
    for sentence in left_out:
        console.print(f"Left out: {sentence}")
