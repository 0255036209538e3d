"""A published run done again, and a shipped adapter evaluated again, beside the rows that they came with."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import config as configs
from bench import registry
from bench.diagnose.nfe import least_counts
from bench.errors import BenchError, did_you_mean
from bench.renames import current
from bench.reporting.agreement import AGREE, COUNTED, NAMED, TOLD, agreement, measurements, sentence
from bench.reporting.amplified import AMPLIFIED, amplified, began_alike
from bench.reporting.frontier import FILE
from bench.reporting.identity import RUN, canonical
from bench.reporting.rows import FINGERPRINT, SCHEMA, read_rows
from bench.reporting.selection import collect, differing
from bench.reporting.selection import settings as by_setting
from bench.runs.evaluate import evaluate_stored, execution_of
from bench.runs.preflight import preflight
from bench.runs.rows import comparable_settings
from bench.runs.run import Run
from bench.settings import RunConfig

COLORS = {"equal": "green", "rounding": "green", "noise": "yellow", AMPLIFIED: "yellow"}


def find_run(path: Path, run: str | None, method: str | None, seed: int | None, settings: list[str]) -> pd.DataFrame:
    """The rows of the one run below `path`, or of a published table of that name, that is meant.

    Raises BenchError if none or several are.
    """
    try:
        frame, _ = collect([path])
    except (OSError, ValueError) as error:
        raise BenchError(str(error)) from None
    frame = frame[frame["status"] != "failed"]
    for name, value in (("method", method), ("seed", seed)):
        if value is not None and value not in set(frame[name]):
            raise BenchError(
                f"no row of {path} has {name} = {value}{did_you_mean(str(value), map(str, set(frame[name])))}"
            )
        frame = frame if value is None else frame[frame[name] == value]
    frame = frame if run is None else frame[frame["run"].str.startswith(run)]
    for key, value in map(configs.parse_assignment, settings):
        chosen = {text: json.loads(text).get(key) for text in frame["settings"].unique()}
        frame = frame[frame["settings"].map(chosen).map(lambda setting, value=value: setting == value)]
    if len(frame[RUN].drop_duplicates()) != 1:
        runs = list(frame["run"].unique())
        shown = ", ".join(runs[:6]) + (", …" if len(runs) > 6 else "")
        which = f"{len(runs)} runs ({shown})" if runs else "no run"
        raise BenchError(f"{which} in {path}: choose one with --run, or --method, --seed and --setting.")
    return frame


def _read(path: Path) -> pd.DataFrame:
    try:
        return read_rows(path)
    except (OSError, ValueError) as error:
        raise BenchError(str(error)) from None


def config_of(rows: pd.DataFrame, assignments: list[str]) -> RunConfig:
    """The configuration that a run's rows carry; how it is computed (`EXECUTION`) is the suite's, or assigned.

    Raises BenchError if this version knows it no longer, or would compute another.
    """
    first = rows.iloc[0]
    settings = current(json.loads(first["settings"]))
    settings.pop(FINGERPRINT, None)
    bases = dict.fromkeys(name.partition("/")[0] for name in rows["metric"])
    parts = [name.split("/") for name in rows["metric"].unique()]
    names = dict.fromkeys(part[1] for part in parts if part[0] == "reward" and len(part) == 3)
    measured = {
        "seed": int(first["seed"]),
        "evaluation.metrics": [name for name in bases if name in registry.plugins("metrics")],
        "evaluation.rewards": [
            name for name in names if name in registry.plugins("rewards") and name != first["reward"]
        ],
        "evaluation.at": sorted({int(budget) for budget in rows["budget"]} - {settings["train.updates"], 0}),
    }
    keys = tuple(configs.from_settings(settings | measured, []).execution())
    if foreign := [text for text in assignments if not text.startswith(keys)]:
        raise BenchError(f"--set {foreign[0]} would make another run: only {', '.join(keys)} may change.")
    config = configs.from_settings(settings | measured, assignments)
    now = comparable_settings(config)
    if changed := [key for key, value in current(settings).items() if now.get(key) != value]:
        raise BenchError(f"this version cannot have {', '.join(changed)} as {first['run']} had it.")
    return config


def configs_below(paths: Sequence[Path], assignments: list[str]) -> Iterator[tuple[RunConfig, list[Path]]]:
    """The configuration of a run of every setting below `paths`, and where the setting's curves belong.

    That is beside the rows or, of the folder of a run, beside this folder. Raises BenchError where there are no rows.
    """
    try:
        frame, _ = collect(paths)
    except (OSError, ValueError) as error:
        raise BenchError(str(error)) from None
    for _, rows in by_setting(frame[frame["status"] != "failed"]):
        folders = {Path(source).parent for source in rows["source"].unique()}
        places = {folder.parent if (folder / "config.yaml").is_file() else folder for folder in folders}
        yield config_of(rows[rows["run"] == rows["run"].iloc[0]], assignments), sorted(place / FILE for place in places)


def run_again(rows: pd.DataFrame, assignments: list[str], out: Path | None, console: Console) -> pd.DataFrame:
    """Do the run again, or go on with it, in `out`; its new rows."""
    config = config_of(rows, assignments)
    job = Run(config, out or Path("runs/reproduced") / rows["run"].iloc[0], console)
    with contextlib.ExitStack() as held:
        preflight(config)
        job.go(False, held)
    return _read(job.folder)


def compare_again(path: Path, rows: pd.DataFrame, assignments: list[str], out: Path | None, console: Console) -> bool:
    """Do the run of these rows again (see `run_again`) and print how far it agrees; whether all of it does.

    path: where the rows are from; those of the other seeds there tell how far apart two runs may be.
    """
    again = run_again(rows, assignments, out, console)
    frame, first = collect([path])[0], rows.iloc[0]
    seeds = frame[(frame["status"] != "failed") & (frame[RUN] == first[RUN])[["method", "settings"]].all(axis=1)]
    compared = amplified(agreement(rows, again, COUNTED), seeds)
    agrees = _show(rows, again, compared, console)
    if AMPLIFIED in set(compared["verdict"]):
        console.print(
            "Amplified: the first evaluation agrees, and what differs later does so by no more than the seeds do, as "
            "training amplifies rounding. That the values are those of the adapter, bench verify says.",
        )
    elif "differs" in set(compared["verdict"]) and not began_alike(compared):
        console.print("The first evaluation differs already: rounding is not the reason.")
    return agrees


def verify(folder: Path, assignments: list[str], console: Console) -> bool:
    """Evaluate the adapter in the folder of a run, or of a packed one, and print how far its rows agree.

    Whether all of them do. Raises BenchError if the folder holds no finished run.
    """
    if not (folder / "rows.parquet").is_file():
        raise BenchError(f"{folder} holds no finished run: it has no rows.parquet.")
    keys = execution_of(folder)
    if foreign := [text for text in assignments if not text.startswith(keys)]:
        raise BenchError(f"--set {foreign[0]} would measure something else: only {', '.join(keys)} may change.")
    rows = _read(folder / "rows.parquet")
    if "failed" in set(rows["status"]):
        raise BenchError(f"the run in {folder} failed: it left no adapter.")
    stored = evaluate_stored(folder, assignments, console)
    again = pd.DataFrame(stored.rows).assign(schema=SCHEMA)
    named = NAMED if set(rows["settings"]) == set(again["settings"]) else []  # else of another version, with its names
    counted = COUNTED if stored.counted else []
    agrees = _show(rows, again, agreement(rows, again, [*named, *counted], same_noise=True), console)
    least = {} if stored.counted else least_counts(stored.core, configs.read(folder / "config.yaml"))
    fewer = [f"{name} is {n:,}, at least {least[name]:,}" for name in least if (n := rows[name].min()) < least[name]]
    if fewer:
        console.print(f"Fewer than such a run needs: {'; '.join(fewer)}.")
    unknown = [name for name in (*NAMED, *COUNTED, *TOLD) if name not in (*named, *counted)]
    unknown = [f"{name} (only that it is at least {least[name]:,})" if name in least else name for name in unknown]
    unknown += [f"all of {path.name}" for path in sorted(folder.glob("rows-at-*.parquet"))]
    console.print(f"Not verified, as nothing is trained: {', '.join(unknown)}.")
    return agrees and not fewer


def _show(published: pd.DataFrame, again: pd.DataFrame, compared: pd.DataFrame, console: Console) -> bool:
    """Print how far each value agrees, and what else was different; whether all agree."""
    table = Table(box=None, pad_edge=False, title=published["run"].iloc[0], title_justify="left")
    for name in ("updates", "metric", "published", "again", "difference", "s.e.", "agrees"):
        table.add_column(name, justify="left" if name in ("metric", "agrees") else "right")
    others = compared[(compared["column"] != "value") & (compared["verdict"] == "differs")]
    lines = pd.concat([measurements(compared), others]).sort_values(["budget", "metric"], kind="stable")
    for row in lines.itertuples():
        color = COLORS.get(row.verdict, "red")
        name = row.metric if row.column == "value" else f"{row.metric}: {row.column}"
        cells = _cells(row.column, row.published, row.again)
        table.add_row(str(row.budget), name, *cells, _cell(row.difference), _cell(row.errors), Text(row.verdict, color))
    console.print(table)
    console.print(sentence(compared))
    then, now = (_told(frame) for frame in (published, again))
    names = [name for name in then if then[name] and then[name] != now.get(name)]
    different = [f"{name} {then[name]} → {now.get(name, '–')}" for name in names]
    if different:
        console.print(f"Published with other: {', '.join(different)}.")
    return set(compared["verdict"]) <= set(AGREE)


def _told(rows: pd.DataFrame) -> dict[str, Any]:
    """Where a run was made: what is said where it is different, but need not be the same."""
    first = rows.iloc[0]
    return {"revision": first["revision"], "hardware": first["hardware"], **json.loads(first["packages"])}


def _cells(column: str, published: Any, again: Any) -> tuple[str, str]:
    """Two entries of a column as text; of two settings what is different."""
    if column == "settings" and not pd.isna(published) and not pd.isna(again):
        one, two = (dict(json.loads(canonical(text))) for text in (published, again))
        return differing(one, [two]), differing(two, [one])
    return _cell(published), _cell(again)


def _cell(value: Any) -> str:
    if pd.isna(value):
        return "–"
    return value if isinstance(value, str) else f"{value:.4g}"
