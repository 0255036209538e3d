"""What a gain in reward costs: lines from the prior on through every evaluation."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from matplotlib.ticker import MaxNLocator

from bench.reporting.budgets import KL, measured_gains
from bench.reporting.figures.drawing import FAINT, INK, drawing, end_names, leaves, legend, name_leaving, settle, spread
from bench.reporting.figures.looks import SHADES, Look, families, looks
from bench.reporting.figures.scales import Scale, is_positive, lines_of, references, scale_of, set_scale
from bench.reporting.frontier import ENOUGH, Frontier
from bench.reporting.leaderboard import heading
from bench.reporting.plots import shortened
from bench.reporting.statistics import student
from bench.reporting.summary import floors, priors

TRADED = ("diversity", "coverage", "fid_prior", "path_kl", "tilt_sw2", "target_sw2")  # against the reward
TOGETHER = 16  # lines in a panel that the eye can still follow
NOTE = "one dot per evaluation, from the prior (◆) on, where the scale shows it; means over seeds as in the table"
LEAST = (
    "; black: the least KL of these prompts at every gain (the methods' path_kl is of all prompts), with its 95 % "
    "band, up to where the prior's samples run out (|); dashed: best of n = 2, 4, … draws, at most; dotted: soft best "
    "of {n}; hollow: from under {enough} effective samples"
)
SOFT = 8  # of how many draws
SHOWN = 0.05  # of a curve's largest KL; what is less need not be on a logarithmic scale


class Trade(NamedTuple):
    """A panel: what is across (a reward, or the KL), the metric over it with its heading, row → line, both scales, and
    the prior, the floor and the least KL.
    """

    across: str
    metric: str
    heading: str
    lines: dict[str, pd.DataFrame]
    scales: tuple[Scale, Scale]
    before: pd.DataFrame
    least: pd.DataFrame
    frontier: Frontier | None

    @property
    def start(self) -> tuple[float, float]:
        """The prior's place; NaN where it is not known."""
        return self.before["value"].get(self.across, np.nan), self.before["value"].get(self.metric, np.nan)


def plot_trades(
    rows: pd.DataFrame,
    metrics: Sequence[str],
    path: Path,
    order: Sequence[str],
    title: str = "",
    frontier: Frontier | None = None,
) -> bool:
    """The training reward against what it costs: one dot per checkpoint, one line per method, from the prior on.

    The reward is that on test prompts, of rows that have it. Against the KL stand the least that any method can have
    and what selecting among draws has, if they are known.
    More than `TOGETHER` lines are small multiples, a line of them for every family, the others in grey. Draws those of
    `metrics` that are worth a panel and returns whether there were any.
    """
    return _plot(trades_of(rows, metrics, order, frontier), rows, path, order, title)


def plot_checks(rows: pd.DataFrame, path: Path, order: Sequence[str], title: str = "") -> bool:
    """The reward that was trained on, and beside it every other one that was measured, against the KL to the prior.

    A reward that falls where the trained one rises shows over-optimisation (Gao et al., 2023, arXiv:2210.10760).
    Returns whether there were any.
    """
    return _plot(checks_of(rows, order), rows, path, order, title)


def checks_of(rows: pd.DataFrame, order: Sequence[str]) -> list[Trade]:
    """Panels of the trained reward and the others, of the rows in `order`; none where no other was measured."""
    gained = measured_gains(rows)[0]
    kl = {name: line for name, line in lines_of(rows, KL) if name in order}
    split = gained.rpartition("/")[2]
    others = [name for name in rows["metric"].unique() if re.fullmatch(f"reward/[^/]+/{split}", name)]
    panels = [gained, *others] if kl and others else []
    return [_trade(rows, KL, kl, metric, None) for metric in panels]


def _plot(trades: Sequence[Trade], rows: pd.DataFrame, path: Path, order: Sequence[str], title: str) -> bool:
    """Draw the panels, if there are any, and say whether there are."""
    if not trades:
        return False
    across = rows[rows["metric"] == trades[0].across]
    names = [name for name in order if name in set(across["row"])]
    draw = _by_family if len(names) > TOGETHER else _together
    draw(trades, names, looks(order), path, title, heading(across.iloc[0]))
    return True


def trades_of(
    rows: pd.DataFrame, metrics: Sequence[str], order: Sequence[str], frontier: Frontier | None = None
) -> list[Trade]:
    """Panels of those of `metrics` that are worth one, of the rows in `order`; none without a reward."""
    gained = measured_gains(rows)[0]
    reward = {name: line for name, line in lines_of(rows, gained) if name in order}
    measured = set(rows["metric"])
    traded = [name for name in metrics if name.split("/")[0].startswith(TRADED) and name in measured]
    return [_trade(rows, gained, reward, metric, frontier if metric == KL else None) for metric in traded if reward]


def _trade(
    rows: pd.DataFrame, gained: str, reward: Mapping[str, pd.DataFrame], metric: str, frontier: Frontier | None
) -> Trade:
    before = priors(rows)
    lines = {
        name: reward[name].merge(line, on="budget", suffixes=("_reward", ""))
        for name, line in lines_of(rows, metric)
        if name in reward
    }
    lines = {name: line for name, line in lines.items() if len(line)}
    start = [before["value"].get(name, np.nan) for name in (gained, metric)]
    least = floors(rows)
    if gained == KL:  # all is shown, from the prior's 0 to the methods that leave it furthest
        scales = Scale(False, symlog=True), Scale(False)
    else:
        across = scale_of({name: line["value_reward"] for name, line in lines.items()}, start[0], positive=False)
        inside = {name: across.shows(line["value_reward"]) for name, line in lines.items()}
        drawn = {name: line["value"] for name, line in lines.items() if inside[name].any()}
        seen = pd.concat([values[inside[name]] for name, values in drawn.items()]) if across.ends and drawn else ()
        known = [] if frontier is None else [share * curve_of(frontier, gained)["kl"].max() for share in (SHOWN, 1)]
        known += [start[1], least["value"].get(metric, np.nan)]
        scales = across, scale_of(drawn, *known, positive=is_positive(rows, metric), within=seen)
    title = heading(rows[rows["metric"] == metric].iloc[0])
    return Trade(gained, metric, title, lines, scales, before, least, frontier)


def curve_of(frontier: Frontier, gained: str, kind: str = "tilt", n: int | None = None) -> pd.DataFrame:
    """A curve on the prompts of the gain."""
    return frontier.curve(gained.partition("/")[2], kind, n)


def _together(
    trades: Sequence[Trade], names: Sequence[str], styles: Mapping[str, Look], path: Path, title: str, label: str
) -> None:
    """All lines in a panel, two panels in a line, names at the lines' ends."""
    columns = min(2, len(trades))
    lines = -(-len(trades) // columns)
    height = max(3.6, 0.17 * len(names) + 1.2)
    with drawing(path, (5.2 * columns, height * lines + 1.0), title, _note(trades)) as figure:
        grid = figure.add_gridspec(lines + 1, columns, height_ratios=[0.4, *[height] * lines])
        _key(figure.add_subplot(grid[0, :]), names)
        axes = [figure.add_subplot(grid[1 + i // columns, i % columns]) for i in range(len(trades))]
        for ax, trade in zip(axes, trades, strict=True):
            _draw(ax, trade, {name: styles[name] for name in names})
            ax.set(xlabel=label)
            ax.set_ylabel(shortened(trade.heading), parse_math=False)
            if ax.get_xscale() == "linear":
                ax.xaxis.set_major_locator(MaxNLocator(6))
        ends = [_ends(trade, names, styles) for ax, trade in zip(axes, trades, strict=True)]
        inside = [
            end_names(ax, {name: (x[-1], y[-1], color) for name, (x, y, color) in own.items() if not leaves(ax, x, y)})
            for ax, own in zip(axes, ends, strict=True)
        ]
        settle(figure)
        for ax, trade, own, labels in zip(axes, trades, ends, inside, strict=True):
            spread(ax, labels)
            name_leaving(ax, own, trade.start)


def _by_family(
    trades: Sequence[Trade], names: Sequence[str], styles: Mapping[str, Look], path: Path, title: str, label: str
) -> None:
    """A line of panels for every family, the others in grey."""
    kinds = families(names)
    with drawing(path, (3.9 * len(trades) + 2.0, 2.3 * len(kinds) + 1.1), title, _note(trades)) as figure:
        grid = figure.subplots(len(kinds), len(trades), squeeze=False, sharex="col", sharey="col")
        for axes, (kind, members) in zip(grid, kinds.items(), strict=True):
            for ax, trade in zip(axes, trades, strict=True):
                _draw(ax, trade, {name: styles[name] for name in members})
                cost = shortened(trade.heading)
                ax.set_ylabel(f"{kind}\n{cost}" if ax is axes[0] else cost, parse_math=False)
            legend(axes[-1], members, styles, right=True)
        for ax in grid[-1]:
            ax.set_xlabel(label)
        for ax in grid.flat:
            if ax.get_yscale() == "linear":  # the same ticks at any height: those of another one have wider labels
                ax.yaxis.set_major_locator(MaxNLocator(5))
        settle(figure)
        for axes, members in zip(grid, kinds.values(), strict=True):
            for ax, trade in zip(axes, trades, strict=True):
                name_leaving(ax, _ends(trade, members, styles), trade.start)


def _note(trades: Sequence[Trade]) -> str:
    known = any(trade.frontier is not None for trade in trades)
    return NOTE + (LEAST.format(n=SOFT, enough=ENOUGH) if known else "")


def _draw(ax: Axes, trade: Trade, own: Mapping[str, Look]) -> None:
    """A panel; lines without a look are grey."""
    set_scale(ax, trade.scales[0], "x")
    set_scale(ax, trade.scales[1], "y")
    start = trade.start
    shown = pd.notna(start[1]) and (ax.get_yscale() == "linear" or start[1] > 0)
    for name, line in trade.lines.items():
        x, y = line["value_reward"], line["value"]
        if not trade.scales[0].shows(x).any():
            continue  # nothing of it is on the scale, which its height would stretch
        color, width = (own[name].color, 1.2) if name in own else (FAINT, 0.8)
        if line["updates"].iloc[0] > 0 and shown:
            ax.plot([start[0], x.iloc[0]], [start[1], y.iloc[0]], color=color, linewidth=0.8, alpha=0.5, zorder=1)
        ax.plot(
            x, y, color=color, marker=own[name].marker if name in own else None, markersize=3.5, linewidth=width,
            zorder=2 if name in own else 1,
        )  # fmt: skip
    if shown:
        ax.plot(start[0], start[1], "D", color=INK, markersize=6, zorder=5)
    references(ax, trade.metric, trade.before.iloc[:0], trade.least, "y")
    if trade.frontier is not None:
        _draw_least(ax, trade.frontier, trade.across, start[0])


def _draw_least(ax: Axes, frontier: Frontier, gained: str, prior: float) -> None:
    """The least KL with its band and its end, and the selections; prior: its mean of the reward `gained`."""
    curve = curve_of(frontier, gained)
    x, kl = prior + curve["gain"], curve["kl"]
    reach = np.exp(student(np.inf) * (curve["kl_error"] / kl).fillna(0.0))
    needed = kl >= SHOWN * kl.max() * (ax.get_yscale() == "log")
    ax.update_datalim(np.column_stack([x, kl])[needed])
    still: dict[str, Any] = {"color": INK, "scalex": False, "scaley": False}  # what else is drawn stretches no axis
    ax.add_artist(Line2D(*_from_zero(x, kl), color=INK, linewidth=1.6, zorder=4))
    ax.plot(x.iloc[-1:], kl.iloc[-1:], "|", markersize=10, markeredgewidth=1.6, zorder=4, **still)
    for kind, n, style in (("best_of_n", None, "--"), ("soft_best_of_n", SOFT, ":")):
        own = curve_of(frontier, gained, kind, n)
        points = _from_zero(prior + own["gain"], own["kl"])
        ax.add_artist(Line2D(*points, color=INK, linestyle=style, linewidth=1.0, zorder=3))
    best = curve_of(frontier, gained, "best_of_n")
    for few, face in ((False, INK), (True, "white")):
        own = best[(best["effective"] < ENOUGH) == few]
        ax.plot(prior + own["gain"], own["kl"], "o", markersize=3.5, markerfacecolor=face, zorder=3, **still)
    band = np.column_stack([np.r_[x, x[::-1]], np.r_[kl / reach, (kl * reach)[::-1]]])[1:-1]  # no logarithm of none
    ax.add_artist(Polygon(band, color=INK, alpha=0.15, linewidth=0, zorder=3))


def _from_zero(x: pd.Series, kl: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Points of a curve; from a KL of 0 on its root is linear, which a line between logarithms would not show."""
    if len(kl) < 2 or kl[0] > 0:
        return x.to_numpy(), kl.to_numpy()
    near = np.r_[0, np.geomspace(1e-4, 1, 30)]
    return np.r_[x[0] + near * (x[1] - x[0]), x[2:]], np.r_[near**2 * kl[1], kl[2:]]


def _ends(
    trade: Trade, names: Sequence[str], styles: Mapping[str, Look]
) -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    """Row → x, y and colour of its line."""
    columns = ("value_reward", "value")
    lines = {name: trade.lines[name] for name in names if name in trade.lines}
    return {name: (*(line[c].to_numpy() for c in columns), styles[name].color) for name, line in lines.items()}


def _key(ax: Axes, names: Sequence[str]) -> None:
    """Which family has which hue, in a place of its own."""
    ax.set_axis_off()
    handles = [Line2D([], [], color=SHADES[kind][0], label=kind, linewidth=3) for kind in families(names)]
    ax.legend(handles=handles, loc="center", ncols=len(handles), frameon=False, fontsize=8, columnspacing=1.2)
