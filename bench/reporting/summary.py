"""What a table prints: centres over seeds with intervals, the values of the prior, floors and how these scatter."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from bench.reporting.budgets import TRAIN
from bench.reporting.efficiency import widened
from bench.reporting.statistics import MANY, SCALES, around, differences, intervals, student


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
