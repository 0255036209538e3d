"""A published run done again, and a shipped adapter evaluated again, beside the rows that they came with."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from bench import config as configs
from bench import environment, registry
from bench.errors import BenchError, did_you_mean
from bench.renames import current, renamed
from bench.reporting.agreement import agreement, sentence
from bench.reporting.rows import FINGERPRINT, read_rows
from bench.runs.evaluate import evaluate_stored
from bench.runs.preflight import preflight
from bench.runs.rows import comparable_settings
from bench.runs.run import Run
from bench.settings import EXECUTION, RunConfig

COLORS = {"equal": "green", "rounding": "green", "noise": "yellow"}


def find_run(path: Path, run: str | None, method: str | None, seed: int | None, settings: list[str]) -> pd.DataFrame:
    """The rows of the one run below `path` that is meant. Raises BenchError if none or several are."""
    frame = _read(path)
    frame = frame[frame["status"] != "failed"]
    for name, value in (("method", method), ("seed", seed)):
        if value is not None and value not in set(frame[name]):
            raise BenchError(
                f"no row of {path} has {name} = {value}{did_you_mean(str(value), map(str, set(frame[name])))}"
            )
        frame = frame if value is None else frame[frame[name] == value]
    frame = frame if run is None else frame[frame["run"].str.startswith(run)]
    for key, value in map(configs.parse_assignment, settings):
        chosen = {text: renamed(json.loads(text)).get(key) for text in frame["settings"].unique()}
        frame = frame[frame["settings"].map(chosen).map(lambda setting, value=value: setting == value)]
    runs = list(frame["run"].unique())
    if len(runs) != 1:
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
    if foreign := [text for text in assignments if not text.startswith(EXECUTION)]:
        raise BenchError(f"--set {foreign[0]} would make another run: only {', '.join(EXECUTION)} may change.")
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
    config = configs.from_settings(settings | measured, assignments)
    now = comparable_settings(config)
    if changed := [key for key, value in current(settings).items() if now.get(key) != value]:
        raise BenchError(f"this version cannot have {', '.join(changed)} as {first['run']} had it.")
    return config


def run_again(rows: pd.DataFrame, assignments: list[str], out: Path | None, console: Console) -> pd.DataFrame:
    """Do the run again, or go on with it, in `out`; its new rows."""
    config = config_of(rows, assignments)
    job = Run(config, out or Path("runs/reproduced") / rows["run"].iloc[0], console)
    with contextlib.ExitStack() as held:
        preflight(config)
        job.go(False, held)
    return _read(job.folder)


def last_rows(folder: Path) -> pd.DataFrame:
    """The rows of a run's last evaluation. Raises BenchError if it has none."""
    rows = _read(folder / "rows.parquet")
    if "failed" in set(rows["status"]):
        raise BenchError(f"the run in {folder} failed: it left no adapter.")
    return rows


def verify_adapter(folder: Path, assignments: list[str], console: Console) -> pd.DataFrame:
    """Evaluate the adapter in the folder of a run again; the new values as rows."""
    if foreign := [text for text in assignments if not text.startswith(EXECUTION)]:
        raise BenchError(f"--set {foreign[0]} would measure something else: only {', '.join(EXECUTION)} may change.")
    return pd.DataFrame(evaluate_stored(folder, assignments, console)[-1])


def show(published: pd.DataFrame, again: pd.DataFrame, console: Console) -> bool:
    """Print how far each value agrees, and what else was different; whether all agree."""
    compared = agreement(published, again)
    table = Table(box=None, pad_edge=False, title=published["run"].iloc[0], title_justify="left")
    for name in ("updates", "metric", "published", "again", "difference", "s.e.", "agrees"):
        table.add_column(name, justify="left" if name in ("metric", "agrees") else "right")
    for row in compared.itertuples():
        color = COLORS.get(row.verdict, "red")
        numbers = [_number(value) for value in (row.published, row.again, row.difference, row.errors)]
        table.add_row(str(row.budget), row.metric, *numbers, f"[{color}]{row.verdict}[/]")
    console.print(table)
    console.print(sentence(compared), highlight=False)
    first, here = published.iloc[0], environment.describe()
    then = {"revision": first["revision"], "hardware": first["hardware"], **json.loads(first["packages"])}
    now = {"revision": here["revision"], "hardware": here["hardware"], **here["packages"]}
    settings = (renamed(json.loads(frame["settings"].iloc[0])) for frame in (published, again))
    before, after = (of.get(FINGERPRINT, "") for of in settings)
    then, now = then | {"weights": before[:8]}, now | {"weights": after[:8]}
    different = [f"{name} {then[name]} → {now[name]}" for name in then if then[name] and then[name] != now.get(name)]
    if different:
        console.print(f"Published with other: {', '.join(different)}.", highlight=False, soft_wrap=True)
    return set(compared["verdict"]) <= set(COLORS)


def _number(value: Any) -> str:
    return "–" if pd.isna(value) else f"{value:.4g}"
