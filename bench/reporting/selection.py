"""Which rows are compared: every run once and finished, in tables of one setting, in rows named by what differs."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.renames import renamed
from bench.reporting.rows import FINGERPRINT, RANDOM, read_rows
from bench.reporting.statistics import MANY, over_seeds, student

ASIDE = re.compile(r"\.old\d+$|^tune$")  # a folder that --force moved aside; a sweep's trials
SETTING = ("reward", "beta", "model", "prompts", "evaluation", "budget_unit")
RUN = ["method", "configuration", "seed"]
SAME = [*RUN, "evaluation", "metric", "budget"]  # what is counted once
MEASURED = ("evaluation.", "sampler.", "prompts.", "reward.", "model.dtype", FINGERPRINT)  # tables may differ in these


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
    texts = {text: json.dumps(renamed(json.loads(text)), sort_keys=True) for text in frame["settings"].unique()}
    frame, messages = _once(frame.assign(settings=frame["settings"].map(texts)))
    return frame, left_out + messages


def _folders(paths: Sequence[Path]) -> Iterator[tuple[Path, list[Path]]]:
    """Folders that hold rows or a run, and their Parquet files; every file once, whatever ways lead to it."""
    files_of: dict[Path, dict[Path, Path]] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}")
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
    """Every (configuration, seed, evaluation, metric, budget) once, and what was different in a second one."""
    messages = []
    frame = frame.assign(configuration=pd.factorize(frame["settings"])[0])  # a number for a long text
    place = frame["source"].map(lambda path: str(Path(path).parent))
    failed = frame[frame["status"] == "failed"].assign(place=place)
    broken = pd.MultiIndex.from_frame(failed[[*RUN, "place"]])
    inside = pd.MultiIndex.from_frame(frame[RUN].assign(place=place)).isin(broken)
    frame = frame[~inside | (frame["status"] == "failed")]  # what a run measured before it failed
    finished = pd.MultiIndex.from_frame(frame.loc[frame["status"] != "failed", RUN])
    again = pd.MultiIndex.from_frame(frame[RUN]).isin(finished) & (frame["status"] == "failed")
    messages += [f"{path} holds a failed run that is finished elsewhere." for path in frame.loc[again, "source"]]
    # the newest version of a metric first, and a run's own rows before those of its `bench eval`
    second = frame["source"].map(lambda path: Path(path).parent.name.startswith("eval-"))
    order = frame[~again].assign(second=second).sort_values(["metric_version", "second"], ascending=[False, True])
    first = order.drop_duplicates(SAME)
    compared = [*SAME, "value", "source", "metric_version"]
    pairs = order[compared].merge(first[compared], on=SAME, suffixes=("", "_kept"))
    pairs = pairs[(pairs["metric_version"] == pairs["metric_version_kept"]) & pairs["value"].notna()]
    other = pairs[~np.isclose(pairs["value"], pairs["value_kept"], rtol=1e-3, atol=1e-9)]
    for first_path, path in other[["source_kept", "source"]].drop_duplicates().itertuples(index=False):
        messages.append(f"{path} holds a run of {first_path} with other values; the latter count.")
    return first.sort_index().drop(columns=["second", "configuration"]), messages


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
            suffix = _differences(mine, parts) or f"evaluation {rows['evaluation'].iloc[0]}"
        yield f"{heading}; {suffix}" if suffix else heading, _named(rows, chosen)


def _heading(row: pd.Series) -> str:
    return f"{row['reward']} (β = {row['beta']:g}) on {row['model']}, prompts {row['prompts']}"


def _part(chosen: dict[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in chosen.items() if key.startswith(prefixes)}


def _named(rows: pd.DataFrame, chosen: dict[str, dict[str, Any]]) -> pd.DataFrame:
    texts = rows.groupby("method")["settings"].unique().to_dict()

    def name(method: str, text: str) -> str:
        several = [chosen[other] for other in texts[method]]
        common = set.intersection(*map(set, several))  # a setting that came later was as its default
        mine, *others = ({key: one[key] for key in one if key in common} for one in (chosen[text], *several))
        different = _differences(mine, others)
        return f"{method} ({different})" if different else method

    pairs = list(zip(rows["method"], rows["settings"], strict=True))
    names = {pair: name(*pair) for pair in dict.fromkeys(pairs)}
    calls = rows["network_forwards"] + rows["network_backwards"]
    return rows.assign(row=[names[pair] for pair in pairs], network_rows=calls)


def _differences(settings: dict[str, Any], several: Sequence[dict[str, Any]]) -> str:
    """`key = value` of all settings in which `several` differ, with the values of `own`; a dash for one it lacks."""
    keys = [key for key in settings | {key: None for one in several for key in one}]
    texts = {key: [json.dumps(one[key]) if key in one else "–" for one in (settings, *several)] for key in keys}
    return ", ".join(f"{key} = {values[0]}" for key, values in texts.items() if len(set(values)) > 1)


def has_seeds(rows: pd.DataFrame) -> bool:
    """Whether some row of the table has several seeds; then its errors are those over seeds, and no others."""
    return bool(rows.groupby("row")["seed"].nunique().max() > 1)


def is_robust(rows: pd.DataFrame) -> pd.Series:
    """Metric → whether every row of the table has so many values of it that interquartile means are printed."""
    counts = rows[rows["value"].notna()].groupby(["metric", "row"], sort=False)["seed"].nunique()
    return counts.groupby("metric", sort=False).min() >= MANY


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """(row, metric) → what a table prints and a figure draws, from rows that `bench.reporting.budgets.at` chose.

    Columns: `value` and `difference`, centres over seeds, and the ends of their intervals, `value_low` and so on: over
    seeds if the table has several, else by the evaluation's own error; `seeds`, those with a value; `paired`, whether
    the difference says more than the value (the prior's is neither zero by definition nor the same in all seeds).
    """
    several, robust = has_seeds(rows), is_robust(rows)
    rows = rows[rows["value"].notna()]
    groups = rows.groupby(["row", "metric"], sort=False)
    table = groups.agg(
        seeds=("seed", "nunique"),
        priors=("prior", "nunique"),
        error=("standard_error", "first"),
        df=("degrees", "first"),
    )
    kinds = robust.reindex(table.index.get_level_values("metric")).to_numpy(bool)
    for name in ("value", "difference"):
        values = [group.dropna().to_numpy() for _, group in groups[name]]
        ends = np.full((len(values), 3), np.nan)
        for kind in (False, True):
            places = np.flatnonzero(kinds == kind)
            ends[places] = over_seeds([values[i] for i in places], kind)
        table[[name, f"{name}_low", f"{name}_high"]] = ends
    zero = np.isclose(table["difference"], table["value"], rtol=1e-12, atol=0)
    if not several:
        reach = (table["error"] * student(table["df"])).to_numpy()
        unpaired = (table["difference"].isna() | zero).to_numpy()
        for name, half_width in (("value", np.where(unpaired, reach, np.nan)), ("difference", reach)):
            table[f"{name}_low"], table[f"{name}_high"] = table[name] - half_width, table[name] + half_width
    table["paired"] = ~zero & table["difference_low"].notna() & ((table["priors"] > 1) | (not several))
    return table.drop(columns=["error", "df", "priors"])


def standings(rows: pd.DataFrame, table: pd.DataFrame) -> dict[tuple[str, str], str]:
    """(row, metric) → "best", or "tie" where the interval of the difference to the best holds zero.

    The best is one of the rows with the most seeds: others were drawn on other noise, or are the seeds that got there.
    Differences are taken within seeds, which share noise; of single evaluations their errors are added in squares.
    Nothing is marked where no error is known.
    """
    several, robust, marks = has_seeds(rows), is_robust(rows), {}
    rows = rows[(rows["direction"] != "none") & rows["value"].notna() & (rows["method"] != "prior")]
    for metric, measured in rows.groupby("metric", sort=False):
        centres, counts = (
            table["value"].xs(metric, level="metric"),
            measured.groupby("row", sort=False)["seed"].nunique(),
        )
        centres, whole = centres.loc[counts.index], counts.index[counts == counts.max()]
        best = centres[whole].idxmax() if measured["direction"].iloc[0] == "higher" else centres[whole].idxmin()
        others = centres.index.drop(best)
        if several:
            seeds = measured.pivot(index="row", columns="seed", values="value")
            ends = over_seeds(
                [(seeds.loc[name] - seeds.loc[best]).dropna().to_numpy() for name in others], robust[metric]
            )
        else:
            single = measured.set_index("row")[["value", "standard_error", "degrees"]]
            error = np.hypot(single.loc[others, "standard_error"], single.loc[best, "standard_error"])
            reach = error * student(np.fmin(single.loc[others, "degrees"], single.loc[best, "degrees"]))
            ends = np.stack([centres[others] - centres[best] + sign * reach for sign in (0, -1, 1)], 1)
        if not len(others) or np.isnan(ends[:, 1]).all():
            continue
        marks[best, metric] = "best"
        marks |= {(name, metric): "tie" for name, (_, low, high) in zip(others, ends, strict=True) if low <= 0 <= high}
    return marks


def priors(rows: pd.DataFrame) -> pd.DataFrame:
    """Metric → the prior's `value`, and over seeds, if they differ, `value_low` and `value_high`."""
    means = rows.groupby(["metric", "seed"], sort=False)["prior"].mean().dropna()
    return _ends(means, is_robust(rows))


def floors(rows: pd.DataFrame) -> pd.DataFrame:
    """Metric → `value`, `value_low`, `value_high` of its sampling floor, where rows named `<metric>/floor` hold one.

    Over seeds, of the seeds' own floors, equal for all methods; else of the mean of the evaluation's draws.
    """
    floor_rows = rows[rows["metric"].str.endswith("/floor") & rows["value"].notna()]
    seeds = floor_rows.groupby([floor_rows["metric"].str.removesuffix("/floor"), "seed"])[
        ["value", "standard_error", "degrees"]
    ].mean()
    table = _ends(seeds["value"], is_robust(floor_rows).rename(lambda name: name.removesuffix("/floor")))
    if not has_seeds(rows):
        draws = seeds.groupby("metric").mean()
        reach = student(draws["degrees"]) * draws["standard_error"] / (draws["degrees"] + 1) ** 0.5
        table["value_low"], table["value_high"] = table["value"] - reach, table["value"] + reach
    return table


def _ends(means: pd.Series, robust: pd.Series) -> pd.DataFrame:
    """(metric, seed) → value, as metric → centre and interval; no interval where all seeds have one value."""
    names = means.index.get_level_values("metric").unique()
    ends = [over_seeds([means[name].to_numpy()], bool(robust.get(name, False)))[0] for name in names]
    table = pd.DataFrame(ends, index=names, columns=["value", "value_low", "value_high"], dtype=float)
    same = table["value_low"] == table["value_high"]
    table.loc[same, ["value_low", "value_high"]] = np.nan
    return table
