"""Which rows are compared: every run once and finished, in tables of one setting, in rows named by what differs."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from results.rows import RANDOM, read_rows

ASIDE = re.compile(r"\.old\d+$|^tune$")  # a folder that --force moved aside; a sweep's trials
SETTING = ("reward", "beta", "model", "prompts", "evaluation", "budget_unit")
RUN = ["method", "settings", "seed"]
SAME = [*RUN, "evaluation", "metric", "budget"]  # what is counted once
MEASURED = ("evaluation.", "sampler.", "prompts.", "reward.")  # settings that tables may differ in


def collect(paths: Sequence[Path]) -> tuple[pd.DataFrame, list[str]]:
    """The rows of every run below `paths` (run folders, folders of them, or files), and a sentence for all left out.

    A run counts once: not again for a copy of its folder, a folder that was moved aside, or its own `bench eval`,
    which only adds metrics. Unfinished runs, files that cannot be read and random weights are left out, and trials in
    a folder `tune` that `paths` do not name; of a failed run remains its failed row. The column
    `source` is a row's file.
    Raises FileNotFoundError when there is nothing to read, ValueError when nothing of it can be compared.
    """
    frames, left_out = [], []
    for folder, files in _folders(paths):
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
    frame, told = _once(frame)
    return frame, left_out + told


def _folders(paths: Sequence[Path]) -> Iterator[tuple[Path, list[Path]]]:
    """Folders that hold rows or a run, and their Parquet files; every file once, whatever ways lead to it."""
    found: dict[Path, dict[Path, Path]] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}")
        below = sorted([*path.rglob("*.parquet"), *path.rglob("config.yaml")]) if path.is_dir() else [path]
        for file in below:
            if not any(ASIDE.search(part) for part in file.relative_to(path).parts):
                found.setdefault(file.parent.resolve(), {}).setdefault(file.resolve(), file)
    if not found:
        raise FileNotFoundError(f"no result rows found below {', '.join(map(str, paths))}")
    for files in found.values():
        shown = list(files.values())
        yield shown[0].parent, [file for file in shown if file.suffix == ".parquet"]


def _last_words(folder: Path) -> str:
    path = folder / "error.log"
    lines = path.read_text(encoding="utf8", errors="replace").splitlines() if path.is_file() else []
    last = next((line.strip().rstrip(".") for line in reversed(lines) if line.strip()), None)
    return f": {last}" if last else ": it has no rows.parquet yet"


def _once(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Every (configuration, seed, evaluation, metric, budget) once, and what was different in a second one."""
    told = []
    place = frame["source"].map(lambda path: str(Path(path).parent))
    failed = frame[frame["status"] == "failed"].assign(place=place)
    broken = pd.MultiIndex.from_frame(failed[[*RUN, "place"]])
    inside = pd.MultiIndex.from_frame(frame[RUN].assign(place=place)).isin(broken)
    frame = frame[~inside | (frame["status"] == "failed")]  # what a run measured before it failed
    finished = pd.MultiIndex.from_frame(frame.loc[frame["status"] != "failed", RUN])
    again = pd.MultiIndex.from_frame(frame[RUN]).isin(finished) & (frame["status"] == "failed")
    told += [f"{path} holds a failed run that is finished elsewhere." for path in frame.loc[again, "source"]]
    # the newest version of a metric first, and a run's own rows before those of its `bench eval`
    second = frame["source"].map(lambda path: Path(path).parent.name.startswith("eval-"))
    order = frame[~again].assign(second=second).sort_values(["metric_version", "second"], ascending=[False, True])
    kept = order.drop_duplicates(SAME)
    pairs = order.merge(kept[[*SAME, "value", "source", "metric_version"]], on=SAME, suffixes=("", "_kept"))
    pairs = pairs[(pairs["metric_version"] == pairs["metric_version_kept"]) & pairs["value"].notna()]
    other = pairs[~np.isclose(pairs["value"], pairs["value_kept"], rtol=1e-3, atol=1e-9)]
    for first, path in other[["source_kept", "source"]].drop_duplicates().itertuples(index=False):
        told.append(f"{path} holds a run of {first} with other values; the latter count.")
    return kept.sort_index().drop(columns="second"), told


def settings(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(heading, rows) of every setting; rows of different settings are never compared.

    The column `row` names a row of the table: the method, and the settings in which its configurations here differ.
    Headings that would be equal name what was measured differently.
    """
    chosen = {text: json.loads(text) for text in frame["settings"].unique()}
    rewards = frame["settings"].map(lambda text: json.dumps(_part(chosen[text], ("reward.",))))
    tables = [rows for _, rows in frame.assign(rewards=rewards).groupby([*SETTING, "rewards"], sort=False)]
    headings = [_heading(rows.iloc[0]) for rows in tables]
    for heading, rows in zip(headings, tables, strict=True):
        alike = [other for title, other in zip(headings, tables, strict=True) if title == heading]
        suffix = ""
        if len(alike) > 1:
            own, *_ = parts = [_part(chosen[one["settings"].iloc[0]], MEASURED) for one in (rows, *alike)]
            suffix = _differences(own, parts) or f"evaluation {rows['evaluation'].iloc[0]}"
        yield f"{heading}; {suffix}" if suffix else heading, _named(rows, chosen)


def _heading(row: pd.Series) -> str:
    return f"{row['reward']} (β = {row['beta']:g}) on {row['model']}, prompts {row['prompts']}"


def _part(chosen: dict[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in chosen.items() if key.startswith(prefixes)}


def _named(rows: pd.DataFrame, chosen: dict[str, dict[str, Any]]) -> pd.DataFrame:
    texts = rows.groupby("method")["settings"].unique().to_dict()

    def name(method: str, text: str) -> str:
        different = _differences(chosen[text], [chosen[other] for other in texts[method]])
        return f"{method} ({different})" if different else method

    pairs = list(zip(rows["method"], rows["settings"], strict=True))
    names = {pair: name(*pair) for pair in dict.fromkeys(pairs)}
    return rows.assign(row=[names[pair] for pair in pairs])


def _differences(own: dict[str, Any], several: Sequence[dict[str, Any]]) -> str:
    """`key = value` of all settings in which `several` differ, with the values of `own`; a dash for one it lacks."""
    keys = [key for key in own | {key: None for one in several for key in one}]
    texts = {key: [json.dumps(one[key]) if key in one else "–" for one in (own, *several)] for key in keys}
    return ", ".join(f"{key} = {found[0]}" for key, found in texts.items() if len(set(found)) > 1)


def at_cost(rows: pd.DataFrame, cost: str | None = None, limit: int = 0) -> tuple[pd.DataFrame, list[str]]:
    """Of every run, the last evaluation whose `cost` (a column, "updates" or "reward_calls") is at most `limit`.

    Without a cost, the last of all; failed runs stay. What was measured by different versions of a metric is dropped.
    Also returns sentences: which metrics that are, and which rows of the table ended at less than half of the limit or
    had no evaluation within it, and so were not given what the others had. Methods without training always take part.
    """
    failed, good = rows[rows["status"] == "failed"], rows[rows["status"] != "failed"]
    within = good if cost is None else good[good[cost] <= limit]
    last = within[within["budget"] == within.groupby(["row", "seed"])["budget"].transform("max")]
    spent = {} if cost is None else good.groupby("row")[cost].max()
    short = [name for name, most in spent.items() if 0 < most < limit / 2]
    versions = last[last["value"].notna()].groupby("metric")["metric_version"].nunique()
    mixed = list(versions.index[versions > 1])
    notes = [f"Left out, for the runs hold different versions of it: {', '.join(mixed)}."] if mixed else []
    if short := sorted({*short, *set(good["row"]) - set(last["row"])}):
        notes.append(f"Not given as much, or not evaluated within it: {', '.join(short)}.")
    return pd.concat([last[~last["metric"].isin(mixed)], failed]), notes


def has_seeds(rows: pd.DataFrame) -> bool:
    """Whether some row of the table has several seeds; then its errors are those over seeds, and no others."""
    return bool(rows.groupby("row")["seed"].nunique().max() > 1)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """(row, metric) → what a table prints and a figure draws, from rows that `at_cost` chose.

    Columns: `value` and `difference`, means over seeds; `value_error` and `difference_error`, their standard errors:
    over seeds if the table has several, else the evaluation's own; `seeds`, those with a value; `paired`, whether the
    difference says more than the value (the prior's is neither zero by definition nor the same in all seeds).
    """
    found = rows[rows["value"].notna()].groupby(["row", "metric"], sort=False)
    means = found.agg(
        value=("value", "mean"),
        value_error=("value", "sem"),
        difference=("difference", "mean"),
        difference_error=("difference", "sem"),
        seeds=("seed", "nunique"),
        own=("standard_error", "first"),
        priors=("prior", "nunique"),
    )
    several = has_seeds(rows)
    if not several:
        alone = means["difference"].isna() | np.isclose(means["difference"], means["value"], rtol=1e-12, atol=0)
        means["value_error"] = means["own"].where(alone)
        means["difference_error"] = means["own"]
    zero = np.isclose(means["difference"], means["value"], rtol=1e-12, atol=0)
    means["paired"] = ~zero & means["difference_error"].notna() & ((means["priors"] > 1) | (not several))
    return means.drop(columns=["own", "priors"])


def priors(rows: pd.DataFrame) -> pd.DataFrame:
    """Metric → `value`, the prior's mean over seeds, and `value_error`, the standard error over them if they differ."""
    means = rows.groupby(["metric", "seed"])["prior"].mean().groupby("metric").agg(["mean", "sem", "nunique"])
    return pd.DataFrame({"value": means["mean"], "value_error": means["sem"].where(means["nunique"] > 1)})


def floors(rows: pd.DataFrame) -> pd.DataFrame:
    """Metric → `value` and `value_error` of its sampling floor, where rows named `<metric>/floor` hold one.

    Over seeds: mean and standard error of the seeds' own floors, equal for all methods; else the deviation of draws.
    """
    own = rows[rows["metric"].str.endswith("/floor") & rows["value"].notna()]
    seeds = own.groupby([own["metric"].str.removesuffix("/floor"), "seed"])[["value", "standard_error"]].mean()
    means = seeds.groupby("metric").agg(value=("value", "mean"), sem=("value", "sem"), own=("standard_error", "mean"))
    distinct = seeds.groupby("metric")["value"].nunique() > 1
    error = means["sem"].where(distinct) if has_seeds(rows) else means["own"]
    return pd.DataFrame({"value": means["value"], "value_error": error})
