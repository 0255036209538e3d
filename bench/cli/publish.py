"""The commands that published rows are checked and added with."""

from pathlib import Path
from typing import Annotated

import typer

from bench.cli.options import console
from bench.errors import BenchError

Out = Annotated[Path | None, typer.Option(help="Folder to write.")]


def reproduce(
    rows: Annotated[
        Path,
        typer.Argument(
            metavar="ROWS",
            help="A Parquet file of rows, a folder of them, or a published table by name; bench ls published.",
        ),
    ],
    run: Annotated[str | None, typer.Option(help="The run, or how its name begins.")] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="Or the method of the row.")] = None,
    seed: Annotated[int | None, typer.Option(help="Its seed.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting that the row has. Repeatable.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="How it is computed here, train.micro_batch for one."),
    ] = None,
    out: Out = None,
) -> None:
    """Do a published run again, from the configuration that its rows carry, and say how far each metric agrees.

    Exits with status 1 if a value differs by more than rounding, three standard errors, or what training makes of
    rounding on another processor: the same at first, and later no farther apart than two seeds.

        bench reproduce ring --method rtb --seed 3
        bench reproduce emoji --run draft-seed0
    """
    from bench.publish.reproduce import compare_again, find_run

    run_rows = find_run(rows, run, method, seed, setting or [])
    if not compare_again(rows, run_rows, assignments or [], out, console):
        raise typer.Exit(1)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, as it was made or packed.")],
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="How it is computed here, train.sample_batch for one."),
    ] = None,
) -> None:
    """Evaluate the adapter of a run again, on the same noise, and say how far each metric agrees with the run's rows.

    Compares every column that a table reads, and lists what cannot be verified without training. Exits with status 1 if
    a number differs by more than rounding and three standard errors.

        bench verify runs/ring/rtb-seed0-1a2b3c4d
    """
    from bench.publish.reproduce import verify as verify_run

    if not verify_run(folder, assignments or [], console):
        raise typer.Exit(1)


def pack(
    folder: Annotated[Path, typer.Argument(metavar="RUNS", help="Folder of a sweep.")],
    out: Annotated[Path, typer.Option(help="Folder to write, or an archive: .zip, .tar.gz.")],
) -> None:
    """Gather a sweep's finished runs for others: rows, configurations, adapters, samples; nothing of this machine.

    bench pack runs/ring --out ring-mymethod.zip
    """
    from bench.publish.pack import pack_runs

    count, left_out = pack_runs(folder, out)
    for text in left_out:
        typer.echo(f"left out: {text}")
    typer.echo(
        f"{count} runs are in {out}. Check an adapter: bench verify; publish: bench merge {out} results/published/…"
    )


def merge(
    packs: Annotated[
        list[Path], typer.Argument(metavar="PACK… PUBLISHED", help="What bench pack wrote; the target last.")
    ],
) -> None:
    """Add packed runs to a published folder, if they were made as the rows there.

    Checked are schema, configuration, evaluation set, metric versions, contents behind names, tuning, that the code was
    a commit of this repository without changes, and that no value contradicts one of the same run. Nothing is written
    if anything is wrong.

        bench merge ring-mymethod.zip results/published/ring
    """
    from bench.publish.merge import merge_packs

    if len(packs) < 2:
        raise BenchError(
            "bench merge takes packs and then the published folder: bench merge PACK results/published/ring"
        )
    merged = merge_packs(packs[:-1], packs[-1])
    text = f"{merged.added} runs added to {packs[-1]}"
    text += f"; {merged.extended} that were there have new rows" if merged.extended else ""
    typer.echo(text + (f"; {merged.present} were there already." if merged.present else "."))
