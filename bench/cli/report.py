"""The commands that compare finished runs: `bench report` and `bench serve`."""

import math
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bench.cli.options import RunFolders, console
from bench.errors import BenchError, did_you_mean


class Format(StrEnum):
    """What `bench report` writes."""

    table = "table"
    md = "md"
    csv = "csv"
    latex = "latex"
    html = "html"


def report(
    paths: RunFolders = None,
    metrics: Annotated[str | None, typer.Option(help="Comma-separated metrics; default the usual ones.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="All metrics that have values, and levels of distances to the prior.")
    ] = False,
    at_reward_gain: Annotated[
        str | None,
        typer.Option(
            metavar="X[,X…]",
            help="Compare where every run first gains so much reward, on test and on training prompts.",
        ),
    ] = None,
    at_updates: Annotated[float | None, typer.Option(min=1, help="Compare every run at so many updates.")] = None,
    at_reward_calls: Annotated[float | None, typer.Option(min=1, help="The same at so many reward calls.")] = None,
    at_reward_gradients: Annotated[
        float | None, typer.Option(min=1, help="The same at so many gradients of the reward.")
    ] = None,
    at_nfe: Annotated[
        float | None, typer.Option(min=1, help="The same at an NFE: passes of samples through the denoiser.")
    ] = None,
    at_network_rows: Annotated[float | None, typer.Option(min=1, hidden=True, help="Former name of --at-nfe.")] = None,
    at_seconds: Annotated[float | None, typer.Option(min=0, help="The same at so many seconds of training.")] = None,
    wide: Annotated[
        bool, typer.Option("--wide", help="All columns on the screen, in tables one below the other.")
    ] = False,
    form: Annotated[
        Format, typer.Option("--format", help="Output format; html: one self-contained page.")
    ] = Format.table,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.md, .csv, .tex and figures, with html the page too; or the page's file."),
    ] = None,
) -> None:
    """Compare finished runs: a table for every setting, methods as rows, and figures.

    bench report runs/emoji --metrics reward/test,reward/train,path_kl
    bench report ring --at-reward-calls 12800 --out report
    bench report runs/ring --at-reward-gain 0.5,1 --format latex
    """
    from bench.reporting import formats
    from bench.reporting import report as results
    from bench.reporting.selection import collect

    costs = {
        "updates": at_updates,
        "reward_calls": at_reward_calls,
        "reward_gradients": at_reward_gradients,
        "nfe": at_nfe or at_network_rows,
        "train_seconds": at_seconds,
    }
    axis, limits = _compared_at(costs, at_reward_gain)
    question = results.Question(tuple(metrics.split(",")) if metrics else (), axis, limits, every)
    try:
        frame, left_out = collect(paths or [Path("runs")])
        measured = set(frame["metric"])
        for name in question.metrics:
            if name not in measured:
                raise BenchError(f"--metrics: no row has {name!r}{did_you_mean(name, measured)}")
        if form == Format.html or out:
            alone = out is None or (form == Format.html and out.suffix == ".html")
            written = [] if out is None or alone else [results.write_report(out, frame, left_out, question)]
            if form == Format.html:
                from bench.reporting.page import write_page

                page = out if out and alone else (out or Path("report")) / "report.html"
                written.append(write_page(page, frame, left_out, question))
            console.print(f"Written: {', '.join(map(str, written))}")
            return
        found = results.compared(frame, question)
    except (FileNotFoundError, ValueError) as error:
        raise BenchError(str(error)) from None
    if form == Format.md:
        typer.echo(results.text(found, left_out))
    elif form == Format.csv:
        typer.echo(formats.to_csv(found.boards), nl=False)
    elif form == Format.latex:
        typer.echo("\n".join(map(formats.latex, found.boards)), nl=False)
    else:
        formats.show(found.boards, console, wide or every or bool(question.metrics))
        for sentence in left_out:
            console.print(f"Left out: {sentence}")


def _compared_at(costs: Mapping[str, float | None], gains: str | None) -> tuple[str | None, tuple[float, ...]]:
    """The axis on which runs are compared at equal values, and these; no axis for their last evaluations."""
    asked: dict[str, tuple[float, ...]] = {axis: (limit,) for axis, limit in costs.items() if limit is not None}
    if gains:
        try:
            asked["gain"] = tuple(map(float, gains.split(",")))
        except ValueError:
            raise BenchError(f"--at-reward-gain {gains}: numbers separated by commas are wanted.") from None
        if min(asked["gain"]) <= 0:
            raise BenchError("--at-reward-gain: a gain over the prior is larger than 0.")
    if not all(math.isfinite(limit) for limits in asked.values() for limit in limits):
        raise BenchError("--at-... takes finite numbers: without it every run counts with its last evaluation.")
    if len(asked) > 1:
        raise BenchError("--at-... options are comparisons of their own: give one of them.")
    return next(iter(asked.items()), (None, (0.0,)))


def serve(
    paths: RunFolders = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On this machine alone; 0: any free one.")] = 0,
) -> None:
    """Open the page of bench report --format html in a browser, until Ctrl-C.

    bench serve runs/emoji
    """
    import tempfile
    import webbrowser
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    from bench.reporting.page import write_page
    from bench.reporting.report import Question
    from bench.reporting.selection import collect

    with tempfile.TemporaryDirectory() as folder:
        try:
            write_page(Path(folder) / "report.html", *collect(paths or [Path("runs")]), Question())
        except (FileNotFoundError, ValueError) as error:
            raise BenchError(str(error)) from None
        try:
            server = ThreadingHTTPServer(("127.0.0.1", port), partial(SimpleHTTPRequestHandler, directory=folder))
        except OSError as error:
            raise BenchError(f"--port {port}: {error.strerror}; give another, or 0 for any free one.") from None
        with server:
            address = f"http://127.0.0.1:{server.server_port}/report.html"
            console.print(f"{address} (Ctrl-C ends it)")
            webbrowser.open(address)
            server.serve_forever()
