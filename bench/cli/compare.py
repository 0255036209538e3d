"""`bench compare`: is this better than that, and how sure is it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.options import console
from bench.errors import BenchError

if TYPE_CHECKING:
    import pandas as pd


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A run, a folder of its seeds, or TABLE/METHOD.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The same; METHOD alone: of A's table.")],
    form: Annotated[str, typer.Option("--format", metavar="table|md", help="Output format.")] = "table",
) -> None:
    """Compare two configurations in paired seeds: at their ends, at equal NFE, reward calls and reward gain.

    TABLE is a published table (bench ls published) or a folder of runs, METHOD a row of it.

        bench compare ring/rtb adjoint_matching
        bench compare runs/mine ring/adjoint_matching
        bench compare "runs/sweep/ddpo (optimizer.lr = 0.001)" "ddpo (optimizer.lr = 0.0001)"
    """
    from bench.reporting import comparison, formats

    if form not in ("table", "md"):
        raise BenchError(f"--format {form}: table or md is wanted.")
    table = first.rpartition("/")[0]
    if not _is_place(second) and not _is_place(second.rpartition("/")[0]):
        second = f"{table}/{second}"
    try:
        sides = _rows(first), _rows(second)
    except (FileNotFoundError, ValueError) as error:
        raise BenchError(str(error)) from None
    found = comparison.compare(*sides, (first, second))
    if form == "md":
        typer.echo(f"{formats.markdown(found.board)}\n\n{found.sentence}")
        return
    formats.show([found.board], console, wide=True)
    console.print(found.sentence)


def _is_place(text: str) -> bool:
    from bench import shipped

    return bool(text) and (Path(text).exists() or text in shipped.shipped("published"))


def _rows(given: str) -> "pd.DataFrame":
    """A configuration's rows: of a place, or of a row's name behind a place."""
    from bench.reporting.comparison import one_configuration
    from bench.reporting.selection import collect

    place, name = (given, None) if _is_place(given) else given.rpartition("/")[::2]
    if not place:
        raise BenchError(f"{given}: neither a folder, nor a published table, nor TABLE/METHOD; see bench ls published.")
    frame, _ = collect([Path(place)])
    return one_configuration(frame, name, place)
