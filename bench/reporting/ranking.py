"""Methods in the order of one number, and which are not separated from the first."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from bench.reporting.answers import DISTANCES
from bench.reporting.budgets import GAINS, measured_gains
from bench.reporting.statistics import CONFIDENCE, gaps, holm, intervals, paired_p


class Rank(NamedTuple):
    """A row's centre over seeds with Student's interval, and its difference to the first row within seeds.

    The difference is one of logarithms where the metric is positive. p: of Student's test that it is 0, by Holm's
    method; NaN of the first row and where it cannot be tested.
    """

    value: float
    low: float
    high: float
    first: bool
    gap: float = float("nan")
    gap_low: float = float("nan")
    gap_high: float = float("nan")
    p: float = float("nan")

    @property
    def separated(self) -> bool:
        """Whether it differs from the first row, after the correction."""
        return self.p < 1 - CONFIDENCE


def measures(rows: pd.DataFrame) -> list[str]:
    """Metrics of the rows by which methods are ranked, the best first: the distance to a known target, then gains."""
    measured = set(rows["metric"])
    return [name for name in (*DISTANCES, *measured_gains(rows)) if name in measured]


def ranking(chosen: pd.DataFrame, metric: str) -> dict[str, Rank]:
    """Row → its rank by a metric, the best first; of a reward by its gain over the prior on the same noise.

    chosen: rows with one evaluation a run, as `bench.reporting.budgets.within` gives. The first is the best among the
    rows with the most seeds, as others were drawn on other noise. The mean of a positive metric is the geometric one.
    """
    own = chosen[(chosen["metric"] == metric) & chosen["value"].notna()]
    gained = metric in GAINS
    support = "real" if gained else own["support"].iloc[0]
    sign = 1 if gained or own["direction"].iloc[0] == "higher" else -1
    runs = own.pivot(index="row", columns="seed", values="difference" if gained else "value")
    values = {str(name): line.dropna() for name, line in runs.iterrows()}
    ends = dict(zip(values, intervals([line.to_numpy() for line in values.values()], support), strict=True))
    order = sorted(values, key=lambda name: -sign * ends[name][0])
    most = max(map(len, values.values()))
    first = next(name for name in order if len(values[name]) == most)
    pairs = {}
    for name in order:
        shared = values[name].index.intersection(values[first].index)
        pairs[name] = values[name][shared].to_numpy(), values[first][shared].to_numpy()
    apart, logs = gaps(list(pairs.values()), support)
    scaled = [[np.log(side) if log else side for side in pair] for pair, log in zip(pairs.values(), logs, strict=True)]
    p_values = {name: paired_p(x - y) for name, (x, y) in zip(pairs, scaled, strict=True) if name != first}
    tested = [name for name, p in p_values.items() if not np.isnan(p)]
    corrected = dict(zip(tested, holm([p_values[name] for name in tested]), strict=True))
    found = {}
    for name, (gap, gap_low, gap_high) in zip(order, apart, strict=True):
        value, low, high = ends[name]
        found[name] = Rank(value, low, high, name == first)
        if name != first:
            p = corrected.get(name, float("nan"))
            found[name] = found[name]._replace(gap=gap, gap_low=gap_low, gap_high=gap_high, p=p)
    return found
