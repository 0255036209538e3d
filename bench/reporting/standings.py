"""How the rows of a table compare with the best of a column."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from bench.prompts import SPLITS
from bench.reporting.statistics import gaps, student
from bench.reporting.summary import Spread, has_seeds, is_robust, learners

WHOLES = {"tilt_tv": "tilt_sw2", "tilt_within": "tilt_sw2", "share_tv": "target_sw2", "within_mode": "target_sw2"}


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
