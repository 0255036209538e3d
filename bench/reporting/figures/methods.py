"""What a table prints, drawn: a dot for every run, a bar for every interval."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from bench.reporting.figures.drawing import INK, drawing
from bench.reporting.figures.scales import Scale, is_positive, references, scale_of, set_scale
from bench.reporting.leaderboard import heading, meaning, ranked
from bench.reporting.plots import FINETUNED, shortened, wrapped
from bench.reporting.summary import floors, priors, summary
from bench.reporting.table import number

ACROSS = 7  # panels beside one another, at most: more would be too small on a page


def plot_methods(rows: pd.DataFrame, metrics: Sequence[str], path: Path, title: str = "") -> None:
    """One panel per metric, rows from top to bottom as in the table: a dot for every seed, a bar for what is printed.

    rows: those of the table that have a value. The dashed line is the prior, the dotted one the sampling floor. Sorted
    as the table, by the first metric.
    """
    table, before, least = summary(rows), priors(rows), floors(rows)
    order = ranked(rows, table, metrics)
    place = {name: i for i, name in enumerate(reversed(order))}
    titles = {row["metric"]: heading(row) for row in rows.drop_duplicates("metric").to_dict("records")}
    names = [shortened(name) for name in place]
    above = {name: _broken(title) for name, title in titles.items()}
    lines = max(above[name].count("\n") for name in metrics)
    down = math.ceil(len(metrics) / ACROSS)
    across = math.ceil(len(metrics) / down)
    height = down * (1.0 + 0.26 * len(order) + 0.2 * max(0, lines - 1))
    size = 0.6 + 0.07 * max(map(len, names)) + 2.6 * across, 0.6 + height
    note = f"-- prior, ·· sampling floor; dots: runs; bars, as square brackets in the table. {meaning(rows, metrics)}"
    with drawing(path, size, title, note.partition(" Round brackets")[0]) as figure:
        axes = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
        for ax in axes[len(metrics) :]:
            ax.remove()
        for ax, metric in zip(axes, metrics, strict=False):
            drawn = rows[(rows["metric"] == metric) & rows["row"].isin(order)]
            cells = table.xs(metric, level="metric").loc[drawn["row"].unique()]
            bars = _bars(cells)
            look: dict[str, Any] = {"fmt": "|", "color": INK, "markersize": 9, "capsize": 2, "linewidth": 1.2}
            ax.scatter(drawn["value"], drawn["row"].map(place), s=16, alpha=0.5, color=FINETUNED, linewidths=0)
            ax.errorbar(cells["value"], cells.index.map(place), xerr=bars, **look)
            set_scale(ax, _scale(rows, metric, drawn, cells["value"].to_numpy() + bars * [[-1], [1]]), "x")
            references(ax, metric, before, least, "x")
            _name_beyond(ax, cells["value"], place)
            ax.set_title(above[metric], fontsize=10, parse_math=False)
            if ax.get_xscale() == "linear":
                ax.xaxis.set_major_locator(MaxNLocator(4))
            else:
                few = ax.get_xlim()[1] < 30 * ax.get_xlim()[0]  # a decade alone would be one number or none
                ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if few else (1.0,), numticks=5))
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_yticks(range(len(names)), names, parse_math=False)
            ax.set_ylim(-0.7, len(place) - 0.3)


def _broken(title: str) -> str:
    """The title in lines, which may break behind a slash, and not before its arrow."""
    glued = re.sub(" (?=[↑↓])", "\N{NO-BREAK SPACE}", title.replace("/", "/ "))
    return wrapped(glued, 26).replace("/ ", "/").replace("\N{NO-BREAK SPACE}", " ")


def _bars(cells: pd.DataFrame) -> np.ndarray:
    """How far the intervals that the table prints reach below and above the values [2, rows]."""
    alone = cells["value_low"].notna()  # else the difference's interval, around the value
    low = (cells["value"] - cells["value_low"]).where(alone, cells["difference"] - cells["difference_low"])
    high = (cells["value_high"] - cells["value"]).where(alone, cells["difference_high"] - cells["difference"])
    return np.nan_to_num([low, high]).clip(0)


def _scale(rows: pd.DataFrame, metric: str, drawn: pd.DataFrame, ends: np.ndarray) -> Scale:
    """Of a panel: ends of intervals [2, rows] may ask for a logarithmic axis, but only runs are a row off the scale."""
    runs = {str(name): values for name, values in drawn.groupby("row")["value"]}
    centre, positive = priors(rows)["value"].get(metric, np.nan), is_positive(rows, metric)
    scale, wide = (scale_of(shown, centre, positive=positive) for shown in (runs, runs | {"": ends.ravel()}))
    return Scale(wide.log, scale.ends if scale.log == wide.log else None)


def _name_beyond(ax: Axes, values: pd.Series, place: dict[str, int]) -> None:
    """Print what is off the scale at its edge."""
    for name, value in values[~values.between(*ax.get_xlim())].items():
        side, x = ("left", 0.03) if value < ax.get_xlim()[0] else ("right", 0.97)
        text = f"◂ {number(value)}" if side == "left" else f"{number(value)} ▸"
        ax.text(x, place[name], text, transform=ax.get_yaxis_transform(), ha=side, va="bottom", fontsize=8)
