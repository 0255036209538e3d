"""The lines of a figure and the scales of its axes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from bench.reporting.budgets import COSTS
from bench.reporting.plots import PRIOR
from bench.reporting.statistics import intervals
from bench.reporting.summary import is_robust

DECADES = 2  # positive values over more of them have a logarithmic axis
STRETCH = {False: 4.0, True: 1.7}  # how much longer one row may make an axis, linear and logarithmic
FEWEST = 4  # rows, of which one can be off the scale
SHARE = 8  # one row in so many can be


class Scale(NamedTuple):
    """The scale of an axis.

    log: whether it is logarithmic. ends: of an axis that is cut. symlog: whether it is linear up to 1 and logarithmic
    from there on.
    """

    log: bool
    ends: tuple[float, float] | None = None
    symlog: bool = False

    def shows(self, values: pd.Series) -> pd.Series:
        """Which of the values are on it."""
        return values.between(*(self.ends or (-np.inf, np.inf)))


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


def is_positive(rows: pd.DataFrame, metric: str) -> bool:
    """Whether the metric declares its values to be, without which a logarithmic axis might hide zero."""
    return bool((rows.loc[rows["metric"] == metric, "support"] == "positive").all())


def scale_of(
    drawn: Mapping[str, ArrayLike], *references: float, positive: bool = True, within: ArrayLike = ()
) -> Scale:
    """The scale that shows the rows, and all references, such as the prior's value.

    drawn: row → the values that are drawn of it, without NaN. Logarithmic where all are positive, as declared, and over
    more than `DECADES` decades. A row that diverged is off the scale: one of the furthest from the middle that would
    make the axis of the other rows longer than `STRETCH` times itself. Of fewer than `FEWEST` rows the same goes for
    values. within: where no row is off the scale, the values at which it ends, as the others are beyond the other axis.
    """
    rows = [np.asarray(values, dtype=float) for values in drawn.values()]
    rows = rows if len(rows) >= FEWEST else [value for values in rows for value in values.reshape(-1, 1)]
    spans = np.array([(row.min(), row.max()) for row in rows]).reshape(-1, 2)
    log = bool(positive and len(spans) and spans.min() > 0 and spans.max() > 10**DECADES * spans.min())
    spans = np.log10(spans) if log else spans
    middle = np.median(spans.mean(1)) if len(spans) else 0.0
    spans = spans[np.argsort(-abs(spans - middle).max(1), kind="stable")]  # the furthest first
    most = max(1, len(spans) // SHARE) if len(spans) >= FEWEST else 0
    for count in range(most, 0, -1):
        low, high = spans[count:, 0].min(), spans[count:, 1].max()
        if 0 < STRETCH[log] * (high - low) < spans[count - 1 :, 1].max() - spans[count - 1 :, 0].min():
            return _cut(low, high, references, log)
    if not len(seen := np.asarray(within, dtype=float)):
        return Scale(log)
    seen = np.log10(seen) if log else seen
    return _cut(seen.min(), seen.max(), references, log)


def _cut(low: float, high: float, references: Sequence[float], log: bool) -> Scale:
    """The scale that ends there; linear where less than a decade is left, which has hardly a number on a log axis."""
    if log and high - low < 1:
        low, high, log = 10**low, 10**high, False
    return Scale(log, _ends(low, high, references, log))


def _ends(low: float, high: float, references: Sequence[float], log: bool) -> tuple[float, float]:
    """Of an axis that shows all this, with a margin; low and high are logarithms where it is logarithmic."""
    known = [np.log10(x) if log else x for x in references if np.isfinite(x) and (x > 0 or not log)]
    low, high = min([low, *known]), max([high, *known])
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    return (10**low, 10**high) if log else (low, high)


def set_scale(ax: Axes, scale: Scale, axis: str) -> None:
    """Give an axis, "x" or "y", its scale."""
    if scale.log:
        ax.set(**{f"{axis}scale": "log"})
    if scale.symlog:
        getattr(ax, f"set_{axis}scale")("symlog", linthresh=1)
    if scale.ends:
        ax.set(**{f"{axis}lim": scale.ends})


def references(ax: Axes, metric: str, before: pd.DataFrame, least: pd.DataFrame, axis: str) -> None:
    """The prior's value dashed, the floor's dotted."""
    draw = ax.axvline if axis == "x" else ax.axhline
    for lines, style in ((before, "--"), (least, ":")):
        value = lines["value"].get(metric)
        if value is not None and np.isfinite(value) and (getattr(ax, f"get_{axis}scale")() == "linear" or value > 0):
            draw(value, color=PRIOR, linestyle=style, linewidth=1.2, zorder=0.5)
