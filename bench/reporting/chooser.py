"""What the page needs to say which method to run within any budget and KL bound, as `bench advise` does for one."""

from typing import Any

import pandas as pd

from bench.reporting.advise import selections
from bench.reporting.budgets import AXES, COSTS, ENOUGH, GAINS, KL, NEAR
from bench.reporting.ranking import measures
from bench.reporting.selection import failures
from bench.reporting.statistics import CONFIDENCE, FEW


def choices(rows: pd.DataFrame) -> dict[str, Any] | None:
    """Every evaluation of every run of a setting, with its costs and its KL; None where nothing was trained.

    rows: of `bench.reporting.selection.settings`. `chooser.js` beside this file reads it: `measures`, by one of which
    methods are ranked, the known target's distance first; `axes`, with a budget that most rows reach; per row the
    values of its runs, evaluations in order, each list with one entry an evaluation and None where nothing is known.
    """
    good = rows[(rows["status"] != "failed") & rows["value"].notna()]
    trained = good[good.groupby("row")["updates"].transform("max") > 0]
    if not (names := measures(trained)):
        return None
    runs = trained.drop_duplicates(["row", "seed", "budget"]).set_index(["row", "seed", "budget"])[list(AXES)]
    tables = {name: trained[trained["metric"] == name].set_index(["row", "seed", "budget"]) for name in (*names, KL)}
    columns = runs.assign(
        kl=tables[KL]["value"],
        **{name: tables[name]["difference" if name in GAINS else "value"] for name in names},
        **{f"prior of {name}": 0.0 if name in GAINS else tables[name]["prior"] for name in names},
    ).sort_index()
    listed: dict[str, list[dict[str, Any]]] = {}
    for (row, seed), own in columns.groupby(level=["row", "seed"], sort=False):
        values = {name: _short(own[name]) for name in (*AXES, "kl", *names)}
        starts = {name: _short(own[f"prior of {name}"].bfill())[0] for name in names}
        budgets = own.index.get_level_values("budget").tolist()
        listed.setdefault(str(row), []).append({"seed": int(seed), "at": budgets, "starts": starts, **values})
    ends = runs.groupby(["row", "seed"]).max().groupby("row").max()
    return {
        "measures": [{"name": name, "gain": name in GAINS} for name in names],
        "hardware": sorted(trained["hardware"].unique()),
        "axes": [
            {"name": axis, "label": label, "unit": unit, "budget": _usual(ends[axis])}
            for axis in AXES
            for label, unit in [COSTS[axis]]
            if (ends[axis] > 0).any()
        ],
        "near": NEAR,
        "enough": ENOUGH,
        "level": 1 - CONFIDENCE,
        "few": FEW,
        "rows": listed,
        "failed": failures(rows),
        "free": [
            {"said": said, "each": {axis: cost.of(axis) for axis in AXES}, "kl": None if pd.isna(cost.kl) else cost.kl}
            for cost, said in selections(good[good["updates"] == 0]).values()
        ],
    }


def _usual(ends: pd.Series) -> float:
    """A budget that half of the rows that spend anything reach."""
    return float(f"{ends[ends > 0].median():.2g}")


def _short(values: pd.Series) -> list[float | None]:
    return [None if pd.isna(value) else float(f"{value:.6g}") for value in values]
