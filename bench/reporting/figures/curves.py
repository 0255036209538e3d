"""Learning curves: a metric against every cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator

from bench.reporting.budgets import AXES, COSTS, GAINS
from bench.reporting.figures.drawing import FAINT, drawing, legend, name_leaving, settle
from bench.reporting.figures.looks import Look, families, looks
from bench.reporting.figures.scales import Scale, gains, is_positive, lines_of, references, scale_of, set_scale
from bench.reporting.summary import floors, priors


def plot_curves(rows: pd.DataFrame, metric: str, path: Path, order: Sequence[str], title: str = "") -> None:
    """A metric against every cost that is spent (log): panels in a line for every family of methods, others in grey.

    order: the rows of the table. Markers are evaluations, bands the table's intervals. Evaluations that not all seeds
    of a row had are left out: the centre would change with the seeds. The training reward, on training or test prompts,
    is drawn less the prior's on the same noise, whose spread over seeds would hide what a method adds.
    """
    before, least = priors(rows), floors(rows)
    title = f"{title}: {metric}"
    if metric in GAINS:
        rows, before = gains(rows), before.assign(value=0.0)
        title += " less the prior's on the same noise"
    lines = {name: line for name, line in lines_of(rows, metric) if name in order}
    bands = {name: pd.concat([line["value"], line["low"], line["high"]]).dropna() for name, line in lines.items()}
    scale = scale_of(bands, before["value"].get(metric, np.nan), positive=is_positive(rows, metric))
    kinds = families([name for name in order if name in lines])
    costs = [cost for cost in AXES if any((line[cost] > 0).any() for line in lines.values())]
    size = 2.9 * len(costs) + 2.2, 2.3 * len(kinds) + 1.1
    with drawing(path, size, title, "markers: evaluations; bands: 95 % over seeds; -- prior, ·· floor") as figure:
        grid = figure.subplots(len(kinds), len(costs), squeeze=False, sharex="col", sharey=True)
        set_scale(grid[0, 0], scale, "y")
        for axes, (kind, names) in zip(grid, kinds.items(), strict=True):
            for ax, cost in zip(axes, costs, strict=True):
                ax.set(xscale="log")
                _lines(ax, lines, cost, scale, {name: looks(order)[name] for name in names})
                references(ax, metric, before, least, "y")
                ax.minorticks_off()
            axes[0].set_ylabel(kind)
            legend(axes[-1], names, looks(order), right=True)
        for ax, (label, unit) in zip(grid[-1], (COSTS[cost] for cost in costs), strict=True):
            ax.set_xlabel(f"{label} [{unit}]" if unit else label)
            _ticks(ax)
        settle(figure)
        for axes, names in zip(grid, kinds.values(), strict=True):
            for ax, cost in zip(axes, costs, strict=True):
                own = {name: _spent(lines[name], cost)[[cost, "value"]].to_numpy() for name in names}
                own = {name: line for name, line in own.items() if len(line)}
                name_leaving(ax, {name: (*line.T, looks(order)[name].color) for name, line in own.items()})


def _lines(ax: Axes, lines: Mapping[str, pd.DataFrame], cost: str, scale: Scale, own: Mapping[str, Look]) -> None:
    """Lines with their bands; those without a look in grey, without a band."""
    for name, line in lines.items():
        line = _spent(line, cost)
        if look := own.get(name):
            ax.plot(line[cost], line["value"], **look._asdict(), label=name, markersize=4, linewidth=1.4)
            if scale.shows(line["value"]).any():
                ax.fill_between(line[cost], line["low"], line["high"], color=look.color, alpha=0.18, linewidth=0)
        else:
            ax.plot(line[cost], line["value"], color=FAINT, linewidth=0.8, zorder=1)


def _spent(line: pd.DataFrame, cost: str) -> pd.DataFrame:
    """Where anything of the cost is spent, which alone a logarithmic axis shows."""
    return line[line[cost] > 0]


def _ticks(ax: Axes) -> None:
    low, high = np.log10(ax.get_xlim())
    steps = (1, 2, 5) if high - low < 1.3 else (1, 3) if high - low < 2.5 else (1,)
    ax.xaxis.set_major_locator(LogLocator(subs=steps))
    ax.xaxis.set_major_formatter(lambda x, _: EngFormatter(sep="")(x) if x >= 1 else f"{x:g}")
