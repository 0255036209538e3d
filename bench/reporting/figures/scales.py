"""The lines of a figure and the scales of its axes."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from bench.reporting.budgets import COSTS
from bench.reporting.plots import PRIOR
from bench.reporting.selection import is_robust
from bench.reporting.statistics import intervals

DECADES = 2  # positive values over more of them have a logarithmic axis
STRETCH = {False: 4.0, True: 1.7}  # how much longer one row may make an axis, linear and logarithmic
FEWEST = 4  # rows, of which one can be off the scale
SHARE = 8  # one row in so many can be


class Scale(NamedTuple):
    """Of an axis: whether it is logarithmic, and its ends if it is cut."""

    log: bool
    ends: tuple[float, float] | None = None

    def shows(self, values: pd.Series) -> bool:
        """Whether any of the values is on it."""
        return self.ends is None or bool(values.between(*self.ends).any())


def gains(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the difference to the prior on the same noise, whose spread over seeds it lacks, as value."""
    return rows.assign(value=rows["difference"], support="real")


def lines_of(rows: pd.DataFrame, metric: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Row → its evaluations that all its seeds had: `budget`, the costs' means, `value`, `low`, `high`."""
    robust = bool(is_robust(rows[rows["metric"] == metric]).get(metric, False))
    evaluations = rows[(rows["metric"] == metric) & rows["value"].notna() & (rows["method"] != "prior")]
    for name, line in evaluations.groupby("row", sort=False):
        groups = line.groupby("budget")
        table = groups[list(COSTS)].mean()
        values = [group.to_numpy() for _, group in groups["value"]]
        table[["value", "low", "high"]] = intervals(values, line["support"].iloc[0], robust)
        table = table[groups["seed"].nunique() == line["seed"].nunique()]
        yield str(name), table.reset_index()


def scale_of(spans: Mapping[str, tuple[float, float]], *references: float) -> Scale:
    """The scale that shows the rows, and all references, such as the prior's value.

    spans: row → the least and the greatest value that is drawn of it. Logarithmic where all are positive and over more
    than `DECADES` decades. A row that diverged is off the scale: one of the furthest from the middle that would make
    the axis of the other rows longer than `STRETCH` times itself.
    """
    values = np.array(list(spans.values()), dtype=float).reshape(-1, 2)
    log = bool(len(values) and values.min() > 0 and values.max() > 10**DECADES * values.min())
    values = np.log10(values) if log else values
    middle = np.median(values.mean(1)) if len(values) else 0.0
    order = np.argsort(-abs(values - middle).max(1), kind="stable")  # the furthest first
    most = max(1, len(values) // SHARE) if len(values) >= FEWEST else 0
    for count in range(most, 0, -1):
        (low, high), (low_with, high_with) = (
            (values[order[n:], 0].min(), values[order[n:], 1].max()) for n in (count, count - 1)
        )
        if 0 < STRETCH[log] * (high - low) < high_with - low_with:
            known = [np.log10(x) if log else x for x in references if np.isfinite(x) and (x > 0 or not log)]
            low, high = min([low, *known]), max([high, *known])
            low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
            return Scale(log, (10**low, 10**high) if log else (low, high))
    return Scale(log)


def span(low: pd.Series, high: pd.Series | None = None) -> tuple[float, float]:
    """The least and the greatest of a line, or of its band: what `scale_of` asks for."""
    return low.min(), (low if high is None else high).max()


def set_scale(ax: Axes, scale: Scale, axis: str) -> None:
    """Give an axis, "x" or "y", its scale."""
    if scale.log:
        ax.set(**{f"{axis}scale": "log"})
    if scale.ends:
        ax.set(**{f"{axis}lim": scale.ends})


def references(ax: Axes, metric: str, before: pd.DataFrame, least: pd.DataFrame, axis: str) -> None:
    """The prior's value dashed, the floor's dotted."""
    draw = ax.axvline if axis == "x" else ax.axhline
    for lines, style in ((before, "--"), (least, ":")):
        value = lines["value"].get(metric)
        if value is not None and np.isfinite(value) and (getattr(ax, f"get_{axis}scale")() == "linear" or value > 0):
            draw(value, color=PRIOR, linestyle=style, linewidth=1.2, zorder=0.5)
