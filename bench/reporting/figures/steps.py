"""Lines by family, the others in grey: KL by sampling step, and performance profiles."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from bench.reporting.figures.drawing import FAINT, drawing, legend, panels, shape
from bench.reporting.figures.looks import families, looks
from bench.reporting.plots import shortened
from bench.reporting.statistics import profile
from bench.reporting.summary import summary


def plot_steps(rows: pd.DataFrame, path: Path, order: Sequence[str], title: str = "") -> None:
    """`path_kl` of every sampling step, from noise to sample; small multiples by family, the others in grey.

    rows: those of the table that have a value, with `path_kl_steps/NN` among their metrics.
    """
    steps_of = summary(rows)["value"].unstack("metric").filter(like="path_kl_steps/").sort_index(axis=1)
    lines = {name: values.to_numpy() for name, values in steps_of.reindex(order).dropna(how="all").iterrows()}
    kinds, styles = families(list(lines)), looks(order)
    steps = np.arange(1, steps_of.shape[1] + 1)
    note = "from noise (step 1) to the sample; means over seeds as in the table"
    with drawing(path, _size(kinds), title, note) as figure:
        axes = panels(figure, list(kinds))
        for kind, ax in axes.items():
            for name in lines:
                ax.plot(steps, lines[name], color=FAINT, linewidth=0.8, zorder=1)
            for name in kinds[kind]:
                look = styles[name]._asdict()
                ax.plot(steps, lines[name], label=name, **look, markersize=3.5, linewidth=1.4)
            log = any((line > 0).any() for line in lines.values())  # nothing was learned in a run of zeros
            ax.set(xlabel="sampling step", yscale="log" if log else "linear")
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            legend(ax, kinds[kind], styles)
        figure.supylabel("path_kl of the step [nats]", fontsize=9)


def plot_profiles(scores: Mapping[str, Mapping[str, np.ndarray]], path: Path, title: str = "") -> None:
    """Performance profiles: of every method the share of runs that reach a share of the best method's gain.

    scores: method → setting → normalised gains of its runs; settings count equally. Small multiples by family.
    """
    kinds, styles = families(list(scores)), looks(list(scores))
    levels = np.linspace(-0.25, 1.25, 301)
    lines = {name: profile(tasks, levels) for name, tasks in scores.items()}
    counts = {name: sum(map(len, tasks.values())) for name, tasks in scores.items()}
    with drawing(
        path, _size(kinds), title, "gain as a share of the best method's, per setting; 0 is the prior"
    ) as figure:
        axes = panels(figure, list(kinds))
        for kind, ax in axes.items():
            for name in lines:
                ax.step(levels, lines[name], color=FAINT, linewidth=0.8, zorder=1)
            for name in kinds[kind]:
                ax.step(levels, lines[name], color=styles[name].color, linewidth=1.5)
            ax.set_ylim(-0.03, 1.03)
            own = {name: styles[name]._replace(marker="") for name in kinds[kind]}
            named = {f"{shortened(name)} (n = {counts[name]})": look for name, look in own.items()}
            legend(ax, list(named), named)
        figure.supylabel("share of runs", fontsize=9)


def _size(kinds: Mapping[str, Sequence[str]]) -> tuple[float, float]:
    """Room for the panels, with names below them in two columns."""
    lines, columns = shape(len(kinds))
    return 3.3 * columns + 0.4, (2.7 + 0.09 * max(map(len, kinds.values()))) * lines + 0.8
