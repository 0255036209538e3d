"""Runs at an equal cost or an equal reward gain, interpolated between their evaluations; what a gain costs."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

GAIN = "reward/train"  # its difference to the prior is the gain
COSTS = {  # column → (what a table calls it, unit)
    "updates": ("updates", ""),
    "reward_calls": ("reward calls", ""),
    "network_rows": ("network rows", ""),
    "train_seconds": ("training time", "s"),
}
MEASURED = ["value", "prior", "difference", "standard_error"]
NEAR = 2  # an evaluation within this factor of the value, on either side, is enough to interpolate
SPENT = [*COSTS, "reward_gradients", "network_forwards", "network_backwards", "wall_seconds"]


class Missing(NamedTuple):
    """Why a row has no values; costs: what a table calls them → what is known of them all the same."""

    why: str
    costs: Mapping[str, str] = {}
    runs: int = 0  # behind the costs


def at(
    rows: pd.DataFrame, axis: str | None = None, limit: float = 0.0
) -> tuple[pd.DataFrame, dict[str, Missing], list[str]]:
    """Every run where it reaches `limit` of `axis` for the first time: a column of COSTS, or "gain".

    Without an axis, its last evaluation. Between two evaluations everything is linear, and a run begins as the prior
    at no cost; the column `from_prior` tells what lies between the prior and a first evaluation. A row is refused where
    of one of its runs neither evaluation is within a factor of `NEAR` of the limit. Runs that end before a cost count
    with their last evaluation; of a gain, only runs that reach it. Failed runs stay, methods without training too, but
    for a gain: they are a point, no curve. What was measured by different versions of a metric is dropped.
    Also returns row → why it has no values, and sentences for below the table.
    """
    failed, good = rows[rows["status"] == "failed"], rows[rows["status"] != "failed"]
    trained = good.groupby("row")["updates"].transform("max") > 0
    missing: dict[str, Missing] = {}
    notes: list[str] = []
    if axis is None:
        chosen = good[good["budget"] == good.groupby(["row", "seed"])["budget"].transform("max")]
    elif axis == "gain":
        path = _path(good[trained & (good["metric"] == GAIN)], "difference")
        crossed = _crossing(path, limit)
        missing = _refused(good, crossed, limit)
        chosen = _between(good[trained], crossed[~crossed["row"].isin(missing)])
        most, runs = path.groupby("row")["x"].max(), path.groupby("row")["seed"].nunique()
        reached = crossed.groupby("row")["seed"].nunique().reindex(runs.index, fill_value=0)
        missing |= {name: Missing(f"never, at most {most[name]:+.3g}") for name in runs.index[reached == 0]}
        some = [f"{name} ({n} of {runs[name]})" for name, n in reached.items() if 0 < n < runs[name]]
        if some:
            notes.append(f"Not reached by all seeds, and values are of those that did: {', '.join(some)}.")
        if any(one.costs for one in missing.values()):
            notes.append(
                f"< and –: bounds of the cost, as no evaluation around this gain is within a factor of {NEAR} of it "
                "and an interpolation would be a guess. Costs have no marks then."
            )
    else:
        path = _path(good[trained], axis)
        ends = path.groupby(["row", "seed"]).tail(1)
        short = ends[ends["x"] < limit]
        crossed = _crossing(path, limit)
        missing = {name: one._replace(costs={}) for name, one in _refused(good, crossed, limit, axis).items()}
        reaching = _between(good[trained], crossed, short)
        chosen = pd.concat([reaching[~reaching["row"].isin(missing)], good[~trained]])
        if less := sorted(short.loc[short["x"] < limit / 2, "row"].unique()):
            notes.append(f"Not given as much: {', '.join(less)}.")
    if chosen.get("from_prior", pd.Series(dtype=bool)).eq(True).any():
        notes.append("‡ Interpolated between the prior and a run's first evaluation.")
    versions = chosen[chosen["value"].notna()].groupby("metric")["metric_version"].nunique()
    if mixed := list(versions.index[versions > 1]):
        notes.insert(0, f"Left out, for the runs hold different versions of it: {', '.join(mixed)}.")
    return pd.concat([chosen[~chosen["metric"].isin(mixed)], failed]), missing, notes


def _refused(rows: pd.DataFrame, crossed: pd.DataFrame, limit: float, axis: str = "gain") -> dict[str, Missing]:
    """The rows of which some run was evaluated too far from the limit on both sides, with bounds of their costs."""
    far = crossed[(crossed["x"] > NEAR * limit) & (crossed["x_before"] < limit / NEAR)]
    spent = rows.drop_duplicates(["row", "seed", "budget"]).set_index(["row", "seed", "budget"])[list(COSTS)]
    refused = {}
    for name in far["row"].unique():
        places = crossed[crossed["row"] == name]
        after = spent.reindex(pd.MultiIndex.from_frame(places[["row", "seed", "budget"]])).max()
        before = spent.reindex(pd.MultiIndex.from_frame(places[["row", "seed", "before"]])).fillna(0.0).min()
        first = not before["updates"]
        why = "passed before its first evaluation" if first else "passed between two evaluations"
        if axis != "gain":
            why = f"not evaluated between {before[axis]:,g} and {after[axis]:,g}"
        ends = {column: [_amount(one[column]) for one in (before, after)] for column in COSTS}
        costs = {COSTS[column][0]: f"< {high}" if first else f"{low} – {high}" for column, (low, high) in ends.items()}
        refused[str(name)] = Missing(why, costs, places["seed"].nunique())
    return refused


def _amount(cost: float) -> str:
    return f"{cost:.2g}" if cost < 10 else f"{cost:,.0f}"


def _path(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """A line for every evaluation of every run, in order: `x`, and `before`, `x_before` of the one before it."""
    path = rows.drop_duplicates(["row", "seed", "budget"]).sort_values(["row", "seed", "budget"])
    path = path[["row", "seed", "budget"]].assign(x=path[column])
    runs = path.groupby(["row", "seed"])
    return path.assign(before=runs["budget"].shift(), x_before=runs["x"].shift(fill_value=0.0))


def _crossing(path: pd.DataFrame, limit: float) -> pd.DataFrame:
    """The first evaluation of every run at which `x` is `limit` or more, and the `share` of the way to it."""
    first = path[path["x"] >= limit].drop_duplicates(["row", "seed"])
    return first.assign(share=((limit - first["x_before"]) / (first["x"] - first["x_before"])).clip(0, 1).fillna(1.0))


def _between(rows: pd.DataFrame, *chosen: pd.DataFrame) -> pd.DataFrame:
    """Rows at the `share` of the way from evaluation `before` (NaN: the prior) to `budget`; no share: at `budget`."""
    places = pd.concat(chosen).drop(columns=["x", "x_before"])
    rows = rows.assign(from_prior=False)
    after = rows.merge(
        places.assign(share=places.get("share", 1.0)).fillna({"share": 1.0}), on=["row", "seed", "budget"]
    )
    names = ["budget", *MEASURED, *SPENT]
    earlier = rows[["row", "seed", "metric", *names]].rename(columns={name: f"{name}_0" for name in names})
    both = after.merge(
        earlier, how="left", left_on=["row", "seed", "metric", "before"], right_on=["row", "seed", "metric", "budget_0"]
    )
    origin = both["before"].isna()
    constant = both["metric"].str.endswith("/floor")
    start = {"value": both["prior"].where(~constant, both["value"]), "prior": both["prior"]}
    for name in names:
        low = both[f"{name}_0"].mask(origin, start.get(name, 0.0)).astype(float)
        moved = low + both["share"] * (both[name] - low)
        both[name] = both[name].astype(float).mask(both["share"] < 1, moved)
    both["from_prior"] = origin & (both["share"] < 1)
    return both[rows.columns]


def with_costs(rows: pd.DataFrame, direction: str = "none") -> pd.DataFrame:
    """The rows and, as metrics, what every run cost; "lower" where the cheapest shall be marked."""
    runs = rows[rows["status"] != "failed"].drop_duplicates(["row", "seed"])
    blank: dict[str, Any] = dict.fromkeys(["prior", "difference", "standard_error", "degrees"], np.nan)
    blank |= {"direction": direction, "metric_version": 1, "status": "ok", "note": ""}
    blank |= {"support": "positive", "prior_is_best": False}
    costs = [
        runs.assign(metric=name, unit=unit, value=runs[column].astype(float), **blank)
        for column, (name, unit) in COSTS.items()
    ]
    return pd.concat([rows, *costs], ignore_index=True)


def common_gains(rows: pd.DataFrame) -> list[float]:
    """Two gains that methods can be compared at: what half of those that learn reach in every seed, and half of it."""
    trained = rows[(rows["metric"] == GAIN) & (rows["status"] != "failed") & (rows["updates"] > 0)]
    reached = trained.groupby(["row", "seed"])["difference"].max().groupby("row").min()
    reached = reached[reached > 0].sort_values(ascending=False)
    if len(reached) < 2:
        return []
    most = reached.iloc[(len(reached) - 1) // 2]
    unit = 10.0 ** (math.floor(math.log10(most)) - 1)
    most = math.floor(most / unit) * unit
    return [float(f"{most / 2:.2g}"), float(f"{most:.2g}")]
