"""Which rows are compared: every run once and finished, in tables of one setting, named by what differs."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench import shipped
from bench.reporting.budgets import COSTS
from bench.reporting.identity import MEASUREMENT, RUN, identified
from bench.reporting.rows import FINGERPRINT, RANDOM, read_rows
from bench.settings import JUDGED

STATED = {"nfe": "nfe", "reward_calls": "reward_calls", "train_seconds": "gpu_hours"}  # column → what an author states
ASIDE = re.compile(r"\.old\d+$|^tune$")  # a folder that --force moved aside; a sweep's trials
SETTING = ("reward", "beta", "model", "prompts", "evaluation", "budget_unit")
MEASURED = ("evaluation.", "sampler.", "prompts.", "reward.", "model.dtype", FINGERPRINT)  # tables may differ in these


def collect(paths: Sequence[Path]) -> tuple[pd.DataFrame, list[str]]:
    """The rows of every run below `paths`, and a sentence for all left out.

    paths: run folders, folders of them, files, or names of published tables (see `bench.shipped`).

    A run counts once: not again for a copy of its folder, a folder that was moved aside, or its own `bench eval`,
    which only adds metrics. Unfinished runs, files that cannot be read and random weights are left out, and trials in
    a folder `tune` that `paths` do not name; of a failed run remains its failed row. The column
    `source` is a row's file.
    Raises BenchError for a path that is not there, FileNotFoundError when there is nothing to read, ValueError when
    nothing of it can be compared.
    """
    frames, left_out = [], []
    for folder, files in _folders([shipped.find("published", path) for path in paths]):
        final = folder / "rows.parquet"
        if (folder / "config.yaml").is_file() and not final.is_file():
            left_out.append(f"{folder} is unfinished{_last_words(folder)}.")
            continue
        for path in sorted(files, key=lambda path: path != final):
            try:
                frames.append(read_rows(path).assign(source=str(path)))
            except ValueError as error:
                left_out.append(f"{error}.")
                if path == final:
                    break  # nobody knows whether the run had finished
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    if not frame.empty:
        random = frame["status"] == RANDOM
        left_out += [f"{run} was made with random weights." for run in frame.loc[random, "run"].unique()]
        frame = frame[~random]
    if frame.empty:
        raise ValueError(" ".join(["there are no rows to compare.", *left_out]))
    frame, messages = _once(identified(frame))
    return frame, left_out + messages


def _folders(paths: Sequence[Path]) -> Iterator[tuple[Path, list[Path]]]:
    """Folders that hold rows or a run, and their Parquet files; every file once, whatever ways lead to it."""
    files_of: dict[Path, dict[Path, Path]] = {}
    for path in paths:
        if path.is_file() and path.suffix != ".parquet":
            raise ValueError(f"{path} is neither a folder nor a .parquet file of rows")
        below = sorted([*path.rglob("*.parquet"), *path.rglob("config.yaml")]) if path.is_dir() else [path]
        for file in below:
            adapter = file.name == "config.yaml" and (file.parent.parent / file.name).is_file()  # it carries its run's
            if not adapter and not any(ASIDE.search(part) for part in file.relative_to(path).parts):
                files_of.setdefault(file.parent.resolve(), {}).setdefault(file.resolve(), file)
    if not files_of:
        raise FileNotFoundError(f"no result rows found below {', '.join(map(str, paths))}")
    for files in files_of.values():
        shown = list(files.values())
        yield shown[0].parent, [file for file in shown if file.suffix == ".parquet"]


def _last_words(folder: Path) -> str:
    path = folder / "error.log"
    lines = path.read_text(encoding="utf8", errors="replace").splitlines() if path.is_file() else []
    last = next((line.strip().rstrip(".") for line in reversed(lines) if line.strip()), None)
    return f": {last}" if last else ": it has no rows.parquet yet"


def _once(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Every measurement of every run once, and what was different in a second one."""
    messages = []
    folders = {path: Path(path).parent for path in frame["source"].unique()}
    place = frame["source"].map({path: str(folder) for path, folder in folders.items()})
    failed = frame[frame["status"] == "failed"].assign(place=place)
    broken = pd.MultiIndex.from_frame(failed[[*RUN, "place"]])
    inside = pd.MultiIndex.from_frame(frame[RUN].assign(place=place)).isin(broken)
    frame = frame[~inside | (frame["status"] == "failed")]  # what a run measured before it failed
    finished = pd.MultiIndex.from_frame(frame.loc[frame["status"] != "failed", RUN])
    again = pd.MultiIndex.from_frame(frame[RUN]).isin(finished) & (frame["status"] == "failed")
    messages += [f"{path} holds a failed run that is finished elsewhere." for path in frame.loc[again, "source"]]
    # the newest version of a metric first, and a run's own rows before those of its `bench eval`
    second = frame["source"].map({path: folder.name.startswith("eval-") for path, folder in folders.items()})
    order = frame[~again].assign(second=second).sort_values(["metric_version", "second"], ascending=[False, True])
    first = order.drop_duplicates(MEASUREMENT)
    compared = [*MEASUREMENT, "value", "source", "metric_version"]
    pairs = order[compared].merge(first[compared], on=MEASUREMENT, suffixes=("", "_kept"))
    pairs = pairs[(pairs["metric_version"] == pairs["metric_version_kept"]) & pairs["value"].notna()]
    other = pairs[~np.isclose(pairs["value"], pairs["value_kept"], rtol=1e-3, atol=1e-9)]
    for first_path, path in other[["source_kept", "source"]].drop_duplicates().itertuples(index=False):
        messages.append(f"{path} holds a run of {first_path} with other values; the latter count.")
    return first.sort_index().drop(columns="second"), messages


def settings(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(heading, rows) of every setting; rows of different settings are never compared.

    The column `row` names a row of the table: the method, and the settings in which its configurations here differ.
    Headings that would be equal name what was measured differently.
    """
    numbers, texts = pd.factorize(frame["settings"])  # the long texts themselves are not copied row by row
    chosen = {text: json.loads(text) for text in texts}
    apart = np.array([json.dumps(_part(one, ("reward.", FINGERPRINT))) for one in chosen.values()], dtype=object)
    tables = [rows for _, rows in frame.assign(apart=apart[numbers]).groupby([*SETTING, "apart"], sort=False)]
    headings = [_heading(rows.iloc[0]) for rows in tables]
    for heading, rows in zip(headings, tables, strict=True):
        alike = [other for title, other in zip(headings, tables, strict=True) if title == heading]
        suffix = ""
        if len(alike) > 1:
            mine, *_ = parts = [_part(chosen[one["settings"].iloc[0]], MEASURED) for one in (rows, *alike)]
            suffix = differing(mine, parts) or f"evaluation {rows['evaluation'].iloc[0]}"
        yield f"{heading}; {suffix}" if suffix else heading, _named(rows, chosen)


def failures(rows: pd.DataFrame) -> dict[str, int]:
    """Row → its failed runs, of rows that have any."""
    return rows[rows["status"] == "failed"].groupby("row")["run"].nunique().to_dict()


def _heading(row: pd.Series) -> str:
    return f"{row['reward']} (β = {row['beta']:g}) on {row['model']}, prompts {row['prompts']}"


def _part(chosen: dict[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in chosen.items() if key.startswith(prefixes)}


def _named(rows: pd.DataFrame, chosen: dict[str, dict[str, Any]]) -> pd.DataFrame:
    texts = rows.groupby("method")["settings"].unique().to_dict()

    def name(method: str, text: str) -> str:
        different = differing(chosen[text], [chosen[other] for other in texts[method]])
        return f"{method} ({different})" if different else method

    pairs = list(zip(rows["method"], rows["settings"], strict=True))
    names = {pair: name(*pair) for pair in dict.fromkeys(pairs)}
    calls = rows["network_forwards"] + rows["network_backwards"]
    return _without_unknown(rows.assign(row=[names[pair] for pair in pairs], nfe=calls), chosen)


def _without_unknown(rows: pd.DataFrame, chosen: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """The rows; of judged models without the costs of training that their authors do not state."""
    judged = rows["settings"].map(lambda text: chosen[text].get("method.name") == JUDGED).astype(bool)
    if not judged.any():
        return rows
    costs = {}
    for column in COSTS:
        key = f"method.cost.{STATED.get(column)}"
        known = rows["settings"].map(lambda text, key=key: chosen[text].get(key) is not None)
        costs[column] = rows[column].astype(float).mask(judged & ~known.astype(bool))
    return rows.assign(**costs)


def differing(settings: dict[str, Any], several: Sequence[dict[str, Any]]) -> str:
    """`key = value` of all settings in which `several` differ, values of `settings`; a dash for one that it lacks."""
    keys = [key for key in settings | {key: None for one in several for key in one}]
    texts = {key: [json.dumps(one[key]) if key in one else "–" for one in (settings, *several)] for key in keys}
    return ", ".join(f"{key} = {values[0]}" for key, values in texts.items() if len(set(values)) > 1)
