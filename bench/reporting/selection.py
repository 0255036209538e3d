"""Which rows are compared: every run once and finished, in tables of one setting, in rows named by what differs."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bench import shipped
from bench.prompts import SPLITS
from bench.reporting.budgets import COSTS, TRAIN
from bench.reporting.efficiency import widened
from bench.reporting.identity import MEASUREMENT, RUN, identified
from bench.reporting.rows import FINGERPRINT, RANDOM, read_rows
from bench.reporting.statistics import MANY, SCALES, around, differences, gaps, intervals, student
from bench.settings import JUDGED

STATED = {"nfe": "nfe", "reward_calls": "reward_calls", "train_seconds": "gpu_hours"}  # column → what an author states
ASIDE = re.compile(r"\.old\d+$|^tune$")  # a folder that --force moved aside; a sweep's trials
WHOLES = {"tilt_tv": "tilt_sw2", "tilt_within": "tilt_sw2", "share_tv": "target_sw2", "within_mode": "target_sw2"}
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


def has_seeds(rows: pd.DataFrame) -> bool:
    """Whether some row of the table has several seeds; then its errors are those over seeds, and no others."""
    return bool(rows.groupby("row")["seed"].nunique().max() > 1)


def is_robust(rows: pd.DataFrame) -> pd.Series:
    """Metric → whether every row of the table has so many values of it that interquartile means are printed."""
    counts = rows[rows["value"].notna()].groupby(["metric", "row"], sort=False)["seed"].nunique()
    return counts.groupby("metric", sort=False).min() >= MANY


def without_levels(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, with distances to the prior and their floors as what they exceed the prior's own by.

    The prior's own samples are at no distance but for their number: a Fréchet distance of 300 between small sets says
    nothing. What is left is the difference within the seed, on the same noise.
    """
    base = rows["metric"].str.removesuffix("/floor")
    measured = rows["prior"].notna() & (rows["direction"] == "lower") & rows["prior_is_best"]
    levels = rows.loc[measured & (rows["prior"] != 0), "metric"].unique()
    own = rows[measured & rows["metric"].isin(levels)].groupby(["run", "budget", "metric"])["prior"].first()
    keys = pd.MultiIndex.from_arrays([rows["run"], rows["budget"], base])
    before = pd.Series(own.reindex(keys).to_numpy(), index=rows.index)
    excess = base.isin(levels) & before.notna()
    unit = (rows["unit"] + " over the prior").str.strip()
    zero = rows["prior"].where(rows["prior"].isna(), 0.0)
    return rows.assign(
        value=rows["value"].where(~excess, rows["value"] - before),
        prior=rows["prior"].where(~excess, zero),
        support=rows["support"].where(~excess, "real"),
        unit=rows["unit"].where(~excess, unit),
    )


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """(row, metric) → what a table prints and a figure draws, from rows that `bench.reporting.budgets.at` chose.

    Columns: `value` and `difference`, centres over seeds, and the ends of their intervals, `value_low` and so on: over
    seeds if the table has several, else by the evaluation's own error; `seeds`, those with a value; `paired`, whether
    the difference says more than the value (the prior's is neither zero by definition nor the same in all seeds);
    `from_prior`, whether a value is interpolated between the prior and a first evaluation.
    """
    several, robust = has_seeds(rows), is_robust(rows)
    rows = rows[rows["value"].notna()]
    rows = rows.assign(from_prior=rows.get("from_prior", False))
    groups = rows.groupby(["row", "metric"], sort=False)
    table = groups.agg(
        seeds=("seed", "nunique"),
        priors=("prior", "nunique"),
        error=("standard_error", "first"),
        df=("degrees", "first"),
        support=("support", "first"),
        from_prior=("from_prior", "any"),
    )
    kinds = robust.reindex(table.index.get_level_values("metric")).to_numpy(bool)
    places_of = groups.indices  # pandas' own loop over thousands of groups takes seconds
    values = [rows["value"].to_numpy()[places_of[key]] for key in table.index]
    differ = [rows["difference"].to_numpy()[places_of[key]] for key in table.index]
    paired = [(v[~np.isnan(d)], (v - d)[~np.isnan(d)]) for v, d in zip(values, differ, strict=True)]
    unpaired = np.array([len(before) > 0 and not before.any() for _, before in paired], bool)  # the prior's is zero
    for name, function, groups_of in (("value", intervals, values), ("difference", differences, paired)):
        ends = np.full((len(values), 3), np.nan)
        for (kind, support), places in table.groupby([kinds, "support"]).indices.items():
            ends[places] = function([groups_of[i] for i in places], support, kind)
        table[[name, f"{name}_low", f"{name}_high"]] = ends
    for end in ("", "_low", "_high"):
        table[f"difference{end}"] = table[f"difference{end}"].mask(unpaired, table[f"value{end}"])
    if not several:
        value, difference, error, degrees = (table[name].to_numpy() for name in ("value", "difference", "error", "df"))
        own, between = np.full((len(table), 2), np.nan), around(difference, error, degrees, "real")
        for support, places in table.groupby("support").indices.items():
            own[places] = around(value[places], error[places], degrees[places], str(support))
        alone = unpaired | np.isnan(difference)
        table[["value_low", "value_high"]] = np.where(alone[:, None], own, np.nan)
        table[["difference_low", "difference_high"]] = np.where(unpaired[:, None], own, between)
    table["paired"] = ~unpaired & table["difference_low"].notna() & ((table["priors"] > 1) | (not several))
    return widened(table.drop(columns=["error", "df", "priors", "support"]), rows)


def learners(rows: pd.DataFrame, table: pd.DataFrame) -> tuple[list[str], float]:
    """The rows whose gain of the training reward is at least half of the best one's, and that half; none if none gains.

    The best is one of the rows with the most seeds.
    """
    if TRAIN not in table.index.get_level_values("metric"):
        return [], float("nan")
    cells = table.xs(TRAIN, level="metric").drop(rows.loc[rows["method"] == "prior", "row"].unique(), errors="ignore")
    half = cells.loc[cells["seeds"] == cells["seeds"].max(), "difference"].max() / 2
    return (list(cells.index[cells["difference"] >= half]), half) if half > 0 else ([], half)


class Spread(NamedTuple):
    """The ends between which 95 % of a metric's floors fall, and the largest difference between rows of a table."""

    low: float
    high: float
    apart: float

    @property
    def hides(self) -> bool:
        """Whether the floors scatter as widely as the rows differ."""
        return self.high - self.low >= self.apart


def spreads(rows: pd.DataFrame, table: pd.DataFrame) -> dict[str, Spread]:
    """Metric → how its floor's draws scatter, of all seeds, beside how far the rows that are compared lie apart.

    Draws are independent sets of the prior, or of the target. Where the prior is best the rows are the `learners`, if
    there are two.
    """
    drawn = rows[rows["metric"].str.endswith("/floor") & rows["value"].notna()]
    drawn = drawn.drop_duplicates(["metric", "seed", "budget"]).drop_duplicates(["metric", "seed"])
    learned, _ = learners(rows, table)
    limited = set(rows.loc[rows["prior_is_best"], "metric"])
    untrained = rows.loc[rows["method"] == "prior", "row"].unique()
    found = {}
    for name, own in drawn.groupby("metric"):
        metric = str(name).removesuffix("/floor")
        if metric not in table.index.get_level_values("metric"):
            continue
        values = table["value"].xs(metric, level="metric").drop(untrained, errors="ignore").dropna()
        compared = values[values.index.isin(learned)] if metric in limited else values
        compared = compared if len(compared) > 1 else values
        counts = own["degrees"].fillna(0) + 1  # draws of a seed, of which the row has the mean and the deviation
        mean = np.average(own["value"], weights=counts)
        squares = (counts * (own["value"] - mean) ** 2 + (counts - 1) * own["standard_error"].fillna(0) ** 2).sum()
        if len(compared) > 1 and counts.sum() > 1:
            reach = student(np.inf) * np.sqrt(squares / (counts.sum() - 1))
            low, high = np.clip((mean - reach, mean + reach), *SCALES[own["support"].iloc[0]].ends)
            found[metric] = Spread(low, high, np.ptp(compared))
    return found


class Standing(NamedTuple):
    """A row in a column: "best", "tie" or "", and its tested difference to the best with the interval.

    The difference is one of logarithms where the metric is positive; where the best equals the prior, it is the
    printed difference to the prior.
    """

    mark: str
    gap: float = float("nan")
    gap_low: float = float("nan")
    gap_high: float = float("nan")


def whole_of(metric: str) -> str:
    """The error of which a metric is a part, on the same prompts; empty for one that is none."""
    names = metric.split("/")
    whole = WHOLES.get(names[0], "")
    return f"{whole}/{names[-1]}" if whole and names[-1] in SPLITS else whole


def standings(
    rows: pd.DataFrame, table: pd.DataFrame, metrics: Sequence[str], scatter: Mapping[str, Spread]
) -> dict[tuple[str, str], Standing]:
    """(row, metric) → how it compares with the best; a tie where the interval of the difference to it holds zero.

    The best is one of the rows with the most seeds: others were drawn on other noise, or are the seeds that got there.
    Differences are taken within seeds, which share noise; of single evaluations their errors are added in squares.
    Of a metric at which the prior is best only `learners` are compared, and what is beyond the prior's equals it. Of a
    part of an error (`WHOLES`) only rows are compared that are marked at the whole: right shares of modes in the wrong
    shape are no success.
    Nothing is marked where no error is known, or where the floor scatters as widely as the rows differ.

    table: their `summary`; scatter: their `spreads`.
    """
    found: dict[tuple[str, str], Standing] = {}
    robust = is_robust(rows)
    learned, _ = learners(rows, table)
    hidden = [metric for metric, spread in scatter.items() if spread.hides]
    wholes = set(filter(None, map(whole_of, metrics)))
    rows = rows[rows["metric"].isin({*metrics, *wholes}.difference(hidden)) & (rows["direction"] != "none")]
    rows = rows[rows["value"].notna()]
    compared = list(rows[rows["method"] != "prior"].groupby("metric", sort=False))
    for metric, measured in sorted(compared, key=lambda one: bool(whole_of(one[0]))):  # parts after wholes
        sign = 1 if measured["direction"].iloc[0] == "higher" else -1
        limited = measured["prior_is_best"].iloc[0]
        if (whole := whole_of(metric)) in {*rows["metric"], *hidden}:
            marked = [row for (row, name), one in found.items() if name == whole and one.mark]
            measured = measured[measured["row"].isin(marked)]
        measured = measured[measured["row"].isin(learned)] if limited else measured
        if measured["row"].nunique() < 2:
            continue
        cells = table.xs(metric, level="metric").loc[measured["row"].unique()]
        score = sign * cells["value"]
        if limited:
            score = (sign * cells["difference"]).clip(upper=0).fillna(score)
        full = score[cells["seeds"] == cells["seeds"].max()]
        best = list(full.index[full == full.max()]) if limited and full.max() == 0 else [full.idxmax()]
        others = cells.index.drop(best)
        if limited and full.max() == 0:
            ends = cells.loc[others, ["difference", "difference_low", "difference_high"]].to_numpy()
            known = cells["difference_low"].notna().any()
        else:
            ends = _gaps(measured, best[0], others, has_seeds(rows), bool(robust[metric]))
            known = not np.isnan(ends[:, 1]).all()
        if known:
            found |= {(name, metric): Standing("best") for name in best}
            marks = ["tie" if low <= 0 <= high else "" for _, low, high in ends]
            found |= {(name, metric): Standing(*one) for name, *one in zip(others, marks, *ends.T, strict=True)}
    return {key: one for key, one in found.items() if key[1] in metrics}


def _gaps(rows: pd.DataFrame, best: str, others: Sequence[str], several: bool, robust: bool) -> np.ndarray:
    """Difference to the best of every other row, with its interval, [G, 3]; of logarithms if the metric is positive."""
    support = rows["support"].iloc[0]
    if several:
        seeds = rows.pivot(index="row", columns="seed", values="value")
        pairs = [(seeds.loc[name].to_numpy(), seeds.loc[best].to_numpy()) for name in others]
        common = [~np.isnan(x + y) for x, y in pairs]
        return gaps([(x[own], y[own]) for (x, y), own in zip(pairs, common, strict=True)], support, robust)[0]
    single = rows.set_index("row")
    value, error = single["value"], single["standard_error"]
    if support == "positive" and value.min() > 0:
        value, error = np.log(value), error / value
    reach = np.hypot(error[others], error[best]) * student(np.fmin(single["degrees"][others], single["degrees"][best]))
    return np.stack([value[others] - value[best] + shift * reach for shift in (0, -1, 1)], 1)


def priors(rows: pd.DataFrame) -> pd.DataFrame:
    """Metric → the prior's `value`, and over seeds, if they differ, `value_low` and `value_high`."""
    means = rows.groupby(["metric", "seed"], sort=False)["prior"].mean().dropna()
    return _ends(means, is_robust(rows), _supports(rows))


def floors(rows: pd.DataFrame) -> pd.DataFrame:
    """Metric → `value`, `value_low`, `value_high` of its sampling floor, where rows named `<metric>/floor` hold one.

    Over seeds, of the seeds' own floors, equal for all methods; else of the mean of the evaluation's draws.
    """
    floor_rows = rows[rows["metric"].str.endswith("/floor") & rows["value"].notna()]
    floor_rows = floor_rows.assign(metric=floor_rows["metric"].str.removesuffix("/floor"))
    supports = _supports(floor_rows)
    seeds = floor_rows.groupby(["metric", "seed"])[["value", "standard_error", "degrees"]].mean()
    table = _ends(seeds["value"], is_robust(floor_rows), supports)
    if not has_seeds(rows):
        draws = seeds.groupby("metric").mean()
        errors = draws["standard_error"] / (draws["degrees"] + 1) ** 0.5
        for name, draw in draws.iterrows():
            value, error, degrees = (np.array([x]) for x in (draw["value"], errors[name], draw["degrees"]))
            table.loc[name, ["value_low", "value_high"]] = around(value, error, degrees, supports[name])[0]
    return table


def _supports(rows: pd.DataFrame) -> pd.Series:
    return rows.groupby("metric", sort=False)["support"].first()


def _ends(means: pd.Series, robust: pd.Series, supports: pd.Series) -> pd.DataFrame:
    """(metric, seed) → value, as metric → centre and interval; no interval where all seeds have one value."""
    names = means.index.get_level_values("metric").unique()
    ends = [intervals([means[name].to_numpy()], supports[name], bool(robust.get(name, False)))[0] for name in names]
    table = pd.DataFrame(ends, index=names, columns=["value", "value_low", "value_high"], dtype=float)
    same = table["value_low"] == table["value_high"]
    table.loc[same, ["value_low", "value_high"]] = np.nan
    return table
