"""Runs at an equal cost or an equal reward gain, interpolated between their evaluations; what a gain costs."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bench.prompts import SPLITS
from bench.reporting.frontier import best_kl

TRAIN, VALIDATION, TEST = (f"reward/{split}" for split in SPLITS)
GAINS = {TEST: "test prompts", TRAIN: "training prompts"}  # whose difference to the prior is a gain, the headline first
COSTS = {  # column → (what a table calls it, unit)
    "updates": ("updates", ""),
    "nfe": ("NFE", ""),
    "network_backwards": ("backward NFE", ""),  # of the NFE
    "reward_calls": ("reward calls", ""),
    "reward_gradients": ("reward gradients", ""),
    "train_seconds": ("training time", "s"),
}
AXES = tuple(name for name in COSTS if name != "network_backwards")  # what a budget can be of
SOME = ("network_backwards", "reward_gradients")  # what not every training spends
KL = "path_kl"
MEASURED = ["value", "prior", "difference", "standard_error"]
NEAR = 2  # an evaluation within this factor of the value, on either side, is enough to interpolate
ENOUGH = 0.9  # of a cost; a run that ends between this share of it and the whole counts with its last evaluation
SELECTING = ("best_of_n", "soft_best_of_n", "fk_steering")  # methods that train nothing and choose among draws
SPENT = [*COSTS, "network_forwards", "wall_seconds"]


class Missing(NamedTuple):
    """Why a row has no values; costs: what a table calls them → what is known of them all the same."""

    why: str
    costs: Mapping[str, str] = {}
    runs: int = 0  # behind the costs
    most: float = math.nan  # how far its runs get, where one or all do not get to the limit


def measured_gains(rows: pd.DataFrame) -> list[str]:
    """Those of GAINS that the rows have, the headline first: training prompts alone where there are no test prompts."""
    return [name for name in GAINS if name in set(rows["metric"])] or [TRAIN]


def at(
    rows: pd.DataFrame, axis: str | None = None, limit: float = 0.0
) -> tuple[pd.DataFrame, dict[str, Missing], list[str]]:
    """Every run where it reaches `limit` of `axis` for the first time: one of AXES, or a reward that is gained.

    Without an axis, its last evaluation. Between two evaluations everything is linear, and a run begins as the prior
    at no cost; the column `from_prior` tells what lies between the prior and a first evaluation. A row is refused where
    of one of its runs neither evaluation is within a factor of `NEAR` of the limit, or one ends before the share
    `ENOUGH` of a cost; of a gain, only runs count that reach it. Failed runs stay, methods without training too, but
    for a gain: they are a point, no curve. What was trained elsewhere has a cost only where its author states it. What
    was measured by different versions of a metric is dropped.
    Also returns row → why it has no values, and sentences for below the table.
    """
    failed, good = rows[rows["status"] == "failed"], rows[rows["status"] != "failed"]
    trained = good.groupby("row")["updates"].transform("max") > 0
    missing: dict[str, Missing] = {}
    notes: list[str] = []
    if axis is None:
        chosen = good[good["budget"] == good.groupby(["row", "seed"])["budget"].transform("max")]
    elif axis.startswith("reward/"):
        chosen, missing, notes = _at_gain(good[trained], axis, limit)
    else:
        elsewhere = good["updates"].isna()
        unknown = elsewhere & good[axis].isna()
        chosen, missing, notes = _at_cost(good[trained | (elsewhere & ~unknown)], axis, limit)
        missing |= dict.fromkeys(good.loc[unknown, "row"], Missing("training cost unknown"))
        chosen = pd.concat([chosen, good[~trained & ~elsewhere]])
    chosen, dropped = _readable(chosen)
    if len(judged := good.loc[good["updates"].isna(), "row"].unique()):
        notes.append(
            f"Trained elsewhere, by code that was not run here, and sampled as all others: {', '.join(judged)}."
        )
    return pd.concat([chosen, failed]), missing, dropped + notes


def _at_gain(rows: pd.DataFrame, reward: str, limit: float) -> tuple[pd.DataFrame, dict[str, Missing], list[str]]:
    path = _path(rows[rows["metric"] == reward], "difference")
    crossed = _crossing(path, limit)
    missing, notes = _refused(rows, crossed, limit, reward), []
    most, runs = path.groupby("row")["x"].max(), path.groupby("row")["seed"].nunique()
    reached = crossed.groupby("row")["seed"].nunique().reindex(runs.index, fill_value=0)
    never = runs.index[reached == 0]
    missing |= {name: Missing(f"never, at most {most[name]:+.3g}", most=most[name]) for name in never}
    some = [f"{name} ({n} of {runs[name]})" for name, n in reached.items() if 0 < n < runs[name]]
    if some:
        notes.append(f"Not reached by all seeds, and values are of those that did: {', '.join(some)}.")
    if any(one.costs for one in missing.values()):
        notes.append(
            f"< and –: bounds of the cost, as no evaluation around this gain is within a factor of {NEAR} of it "
            "and an interpolation would be a guess. Costs have no marks then."
        )
    return _between(rows, crossed[~crossed["row"].isin(missing)]), missing, notes


def _at_cost(rows: pd.DataFrame, axis: str, limit: float) -> tuple[pd.DataFrame, dict[str, Missing], list[str]]:
    path = _path(rows, axis)
    ends = path.groupby(["row", "seed"]).tail(1)
    crossed, near = _crossing(path, limit), ends[(ends["x"] >= ENOUGH * limit) & (ends["x"] < limit)]
    missing = {name: one._replace(costs={}) for name, one in _refused(rows, crossed, limit, axis).items()}
    for name, own in ends.groupby("row")["x"]:
        short = int((own < ENOUGH * limit).sum())
        if axis in SOME and own.max() == 0:
            missing[name] = Missing("spends none of it")
        elif short == own.size:
            missing[name] = Missing(f"ends at {amount(own.max())}", most=own.max())
        elif short:
            missing[name] = Missing(f"{short} of {own.size} runs end before", most=own.max())
    notes = []
    if early := sorted(near.loc[~near["row"].isin(missing), "row"].unique()):
        notes.append(f"Up to {1 - ENOUGH:.0%} short of this cost, and read off at their end: {', '.join(early)}.")
    reaching = _between(rows, crossed, near)
    return reaching[~reaching["row"].isin(missing)], missing, notes


def within(
    rows: pd.DataFrame, axis: str, budget: float, most_kl: float | None = None
) -> tuple[pd.DataFrame, dict[str, Missing], pd.DataFrame]:
    """Every run where it has spent `budget` of `axis` or its path_kl reaches `most_kl` [nats], or at its end.

    Whichever comes first; a row is refused as by `at`, or where no path_kl is known. Methods without training stay as
    they are. Also returns row → why it has no values, and a line per run of a method that trains: `row`, `seed`, and
    `bound`, what stopped it (`axis`, "path_kl" or "end"), and what it had `spent` of `axis` by that evaluation.
    """
    good = rows[rows["status"] != "failed"]
    trained = good.groupby("row")["updates"].transform("max") > 0
    free, rows = good[~trained], good[trained]
    limits = {axis: (_path(rows, axis), budget)}
    if most_kl is not None:
        measured = rows[(rows["metric"] == KL) & rows["value"].notna()]
        limits[KL] = (_path(measured, "value"), most_kl)
    places = [_crossing(path, limit).assign(bound=name, limit=limit) for name, (path, limit) in limits.items()]
    ends = _path(rows, axis).groupby(["row", "seed"]).tail(1)
    places.append(ends.assign(bound="end", limit=ends["x"], share=1.0))
    every = pd.concat(places)
    start = every["before"].fillna(0.0)
    every = every.assign(place=start + every["share"] * (every["budget"] - start))
    stops = every.sort_values("place", kind="stable").drop_duplicates(["row", "seed"])
    missing = {}
    for one in stops[_is_far(stops, stops["limit"])].drop_duplicates("row").to_dict("records"):
        label = COSTS[axis][0] if one["bound"] == axis else KL
        gap = f"between {amount(one['x_before'])} and {amount(one['x'])}"
        missing[one["row"]] = Missing(f"not evaluated {gap} {label}" if label != KL else f"path_kl jumps {gap}")
    if most_kl is not None:
        unknown = stops[~stops["row"].isin(limits[KL][0]["row"])]
        missing |= {name: Missing("path_kl is not known") for name in unknown["row"]}
    chosen, _ = _readable(pd.concat([_between(rows, stops[~stops["row"].isin(missing)]), free]))
    spent = _path(rows, axis).set_index(["row", "seed", "budget"])["x"]
    ends = stops.set_index(["row", "seed", "budget"]).index
    return chosen, missing, stops[["row", "seed", "bound"]].assign(spent=spent.reindex(ends).to_numpy())


def _readable(chosen: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows without metrics of which they hold different versions, and sentences on that and on interpolation."""
    notes = []
    versions = chosen[chosen["value"].notna()].groupby("metric")["metric_version"].nunique()
    if mixed := list(versions.index[versions > 1]):
        notes.append(f"Left out, for the runs hold different versions of it: {', '.join(mixed)}.")
    if chosen.get("from_prior", pd.Series(dtype=bool)).eq(True).any():
        notes.append("‡ Interpolated between the prior and a run's first evaluation.")
    return chosen[~chosen["metric"].isin(mixed)], notes


def nobody(missing: Mapping[str, Missing], axis: str | None, limit: float, trained: int) -> str:
    """What stands above a table where some, or all, of its `trained` rows do not get to the limit; "" where all do."""
    most = {name: one.most for name, one in missing.items() if not math.isnan(one.most)}
    if not most or axis is None:
        return ""
    first = max(most, key=lambda name: most[name])
    what = f"a reward gain of {limit:+g}" if axis in GAINS else spelled(limit, axis)
    if len(most) == trained and most[first] < limit:
        furthest = f"{most[first]:+.3g}" if axis in GAINS else amount(most[first])
        return f"No run here reaches {what}: the most is {furthest}, of {first}."
    if axis in GAINS:
        return ""
    return f"{len(most)} of {trained} trained rows have no values here, as runs of theirs end before {what}."


def spelled(limit: float, axis: str) -> str:
    """A cost in words: "1,000 updates", "2.5 seconds of training"."""
    label, unit = COSTS[axis]
    return f"{limit:,.10g} {'seconds of training' if unit else label}"


class Draws(NamedTuple):
    """What a finished sample costs a method that trains nothing but selects among `n` draws: NFE and reward calls.

    beta: of a soft selection; NaN: the best is taken. kl: at most so far are its samples from the prior's, in nats; NaN
    where nothing is known.
    """

    n: int
    nfe: int
    calls: int
    beta: float
    kl: float

    def of(self, axis: str) -> int:
        """What a finished sample costs of one of AXES."""
        return {"nfe": self.nfe, "reward_calls": self.calls}.get(axis, 0)


def draws(rows: pd.DataFrame) -> dict[str, Draws]:
    """Row → its cost per finished sample, of the methods in `SELECTING`: they train nothing and spend nothing else."""
    found = {}
    for one in rows[rows["method"].isin(SELECTING)].drop_duplicates("row").to_dict("records"):
        own = {key: value for key, value in json.loads(one["settings"]).items() if value is not None}
        own |= {key.removeprefix("evaluation."): value for key, value in own.items() if "evaluation.sampler" in key}
        if {"method.n", "sampler.steps", "sampler.guidance"} <= own.keys():
            n, steps, guided = own["method.n"], own["sampler.steps"], own["sampler.guidance"] > 1
            redraws = {round(share * steps) for share in own.get("method.resample_at", ())} & set(range(1, steps))
            known = one["method"] != "fk_steering"  # whose draws are not independent
            beta = float("nan") if one["method"] == "best_of_n" else one["beta"]
            nfe, calls = n * steps * (2 if guided else 1), n * (len(redraws) + 1)
            found[one["row"]] = Draws(n, nfe, calls, beta, best_kl(n) if known else float("nan"))
    return found


def _refused(rows: pd.DataFrame, crossed: pd.DataFrame, limit: float, axis: str) -> dict[str, Missing]:
    """The rows of which some run was evaluated too far from the limit on both sides, with bounds of their costs."""
    far = crossed[_is_far(crossed, limit)]
    spent = rows.drop_duplicates(["row", "seed", "budget"]).set_index(["row", "seed", "budget"])[list(COSTS)]
    refused = {}
    for name in far["row"].unique():
        places = crossed[crossed["row"] == name]
        after = spent.reindex(pd.MultiIndex.from_frame(places[["row", "seed", "budget"]])).max()
        before = spent.reindex(pd.MultiIndex.from_frame(places[["row", "seed", "before"]])).fillna(0.0).min()
        first = not before["updates"]
        why = "passed before its first evaluation" if first else "passed between two evaluations"
        if axis not in GAINS:
            why = f"not evaluated between {before[axis]:,g} and {after[axis]:,g}"
        ends = {column: [amount(one[column]) for one in (before, after)] for column in COSTS}
        costs = {
            COSTS[column][0]: high if not after[column] else f"< {high}" if first else f"{low} – {high}"
            for column, (low, high) in ends.items()
        }
        refused[str(name)] = Missing(why, costs, places["seed"].nunique())
    return refused


def _is_far(crossed: pd.DataFrame, limit: float | pd.Series) -> pd.Series:
    """Whether both evaluations around the limit are too far from it to interpolate."""
    return (crossed["x"] > NEAR * limit) & (crossed["x_before"] < limit / NEAR)


def amount(cost: float) -> str:
    """A cost as text: whole from ten on."""
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
    for name in names:
        low = both[f"{name}_0"].mask(origin, both["prior"] if name in ("value", "prior") else 0.0).astype(float)
        low = low.mask(constant, both[name]) if name in MEASURED else low
        moved = low + both["share"] * (both[name] - low)
        both[name] = both[name].astype(float).mask(both["share"] < 1, moved)
    both["from_prior"] = origin & (both["share"] < 1)
    return both[rows.columns]


def with_costs(rows: pd.DataFrame, direction: str = "none") -> pd.DataFrame:
    """The rows and, as metrics, what every run cost; "lower" where the cheapest shall be marked.

    Of SOME none is: methods that spend nothing of it would win.
    """
    runs = rows[rows["status"] != "failed"].drop_duplicates(["row", "seed"])
    blank: dict[str, Any] = dict.fromkeys(["prior", "difference", "standard_error", "degrees"], np.nan)
    blank |= {"direction": direction, "metric_version": 1, "status": "ok", "note": ""}
    blank |= {"support": "positive", "prior_is_best": False}
    own = {column: {"direction": "none"} for column in SOME}
    costs = [
        runs.assign(metric=name, unit=unit, value=runs[column].astype(float), **blank | own.get(column, {}))
        for column, (name, unit) in COSTS.items()
    ]
    return pd.concat([rows, *costs], ignore_index=True)


def common_gains(rows: pd.DataFrame, reward: str) -> list[float]:
    """Two gains that methods can be compared at: what half of those that learn reach in every seed, and half of it.

    reward: one of GAINS.
    """
    trained = rows[(rows["metric"] == reward) & (rows["status"] != "failed") & (rows["updates"] > 0)]
    reached = trained.groupby(["row", "seed"])["difference"].max().groupby("row").min()
    reached = reached[reached > 0].sort_values(ascending=False)
    if len(reached) < 2:
        return []
    most = reached.iloc[(len(reached) - 1) // 2]
    unit = 10.0 ** (math.floor(math.log10(most)) - 1)
    most = math.floor(most / unit) * unit
    return [float(f"{most / 2:.2g}"), float(f"{most:.2g}")]
