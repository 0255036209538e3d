"""Comparing finished runs: which rows to compare, the Markdown page, and its figures."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from results.plots import FINETUNED, PRIOR
from results.points import plot_points
from results.rows import comparable
from results.table import ARROWS, SETTING, comparison_markdown, floors

DETAILS = ("/early", "/late", "/importance", "/floor")  # parts and second opinions of a metric


def at_cost(frame: pd.DataFrame, cost: str, limit: int) -> tuple[pd.DataFrame, list[str]]:
    """Of every run, the last evaluation whose `cost` (a column, "updates" or "reward_calls") is at most `limit`.

    Also returns the methods that ended at less than half of the limit, or had no evaluation within it: they were not
    given what the others had. Methods without training cost nothing and always take part.
    """
    within = frame[frame[cost] <= limit]
    last = within[within["budget"] == within.groupby("run")["budget"].transform("max")]
    spent = frame.groupby("method")[cost].max()
    short = [name for name, most in spent.items() if 0 < most < limit / 2]
    return last, sorted({*short, *set(frame["method"]) - set(last["method"])})


def settings(frame: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    """(heading, rows) of every setting; rows of different settings are never compared."""
    for _, rows in comparable(frame).groupby(list(SETTING), sort=False):
        first = rows.iloc[0]
        yield f"{first['reward']} (β = {first['beta']:g}) on {first['model']}, prompts {first['prompts']}", rows


def headline(frame: pd.DataFrame) -> list[str]:
    """Metrics worth a panel: those with values and a direction, without the parts that a metric is split into."""
    names = dict.fromkeys(frame.loc[frame["value"].notna() & (frame["direction"] != "none"), "metric"])
    return [name for name in names if not name.endswith(DETAILS)]


def section(rows: pd.DataFrame, metrics: Sequence[str] | None, cost: str | None, limit: int) -> str:
    """The table of one setting, and below it what is not comparable. Raises ValueError as `comparison_markdown`."""
    if cost is None:
        return comparison_markdown(rows, metrics)
    chosen, short = at_cost(rows, cost, limit)
    text = f"At most {limit:,} {cost.replace('_', ' ')} a run.\n\n" + comparison_markdown(chosen, metrics)
    return text + (f"\nNot given as much, or not evaluated within it: {', '.join(short)}.\n" if short else "")


def write_report(
    frame: pd.DataFrame, folders: Sequence[Path], out: Path, metrics: Sequence[str] | None, cost: str | None, limit: int
) -> Path:
    """Write `report.md` and its figures to `out`; folders: where runs may have left `points.npz`."""
    out.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, (heading, rows) in enumerate(settings(frame)):
        parts += [f"## {heading}\n", section(rows, metrics, cost, limit)]
        panels = [name for name in (metrics or headline(rows)) if name in set(rows["metric"])]
        chosen = rows if cost is None else at_cost(rows, cost, limit)[0]
        plot_methods(chosen, panels, out / f"methods-{number}.png", heading)
        figures = ["methods"]
        if rows.groupby("run")["budget"].nunique().max() > 1:
            plot_budgets(rows, panels, out / f"budgets-{number}.png", heading)
            figures.append("budgets")
        if found := points_of(rows, folders):
            plot_points(*found, out / f"points-{number}.png", heading)
            figures.append("points")
        parts += [f"![{heading}]({name}-{number}.png)\n" for name in figures]
    page = out / "report.md"
    page.write_text("\n".join(parts), encoding="utf8")
    return page


def points_of(
    rows: pd.DataFrame, folders: Sequence[Path]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray] | None:
    """Samples by name, density and extent, from the methods' first seeds; None if no run left its points."""
    files = {path.parent.name: path for folder in folders for path in folder.rglob("points.npz")}
    last = rows[rows["budget"] == rows.groupby("run")["budget"].transform("max")]
    last = last[last["run"].isin(files) & (last["method"] != "prior")].sort_values("seed")
    if last.empty:
        return None
    runs = last.drop_duplicates("method").set_index("method")["run"]
    tv = last[last["metric"] == "tilt_tv"].groupby("method")["value"].mean()
    panels = {}
    for method in _order(last[last["value"].notna()], headline(last)):
        data = np.load(files[runs[method]])
        panels = panels or {"target": data["target"], "prior": data["prior"]}
        panels[f"{method}, TV {tv[method]:.3f}" if method in tv else method] = data["finetuned"]
    return panels, data["density"], data["extent"]


def plot_methods(rows: pd.DataFrame, metrics: Sequence[str], path: Path, title: str = "") -> None:
    """One panel a metric, methods below one another: every seed a dot, mean ± standard error over seeds a bar.

    The dashed line is the prior, the dotted one the sampling floor. Methods are sorted by the last metric.
    """
    rows = rows[rows["value"].notna() & (rows["method"] != "prior")]
    order = _order(rows, metrics)
    place = {method: i for i, method in enumerate(reversed(order))}
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.8):
        figure = Figure(figsize=(2.0 + 2.6 * len(metrics), 1.3 + 0.26 * len(order)), layout="constrained")
        for ax, metric in zip(figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0], metrics, strict=True):
            own = rows[rows["metric"] == metric]
            ax.scatter(own["value"], own["method"].map(place), s=9, alpha=0.35, color=FINETUNED, linewidths=0)
            groups = own.groupby("method")["value"]
            mean, error = groups.mean(), groups.sem().fillna(0)
            height = [place[method] for method in mean.index]
            ax.errorbar(mean, height, xerr=error, fmt="|", color="#111827", markersize=9, capsize=2, linewidth=1.2)
            lines = [(own["prior"].mean(), "--"), (floors(rows).get(metric), ":")]
            _scale(ax, own["value"])
            for value, style in lines:
                if value is not None and np.isfinite(value) and (ax.get_xscale() == "linear" or value > 0):
                    ax.axvline(value, color=PRIOR, linestyle=style, linewidth=1.2)
            first = own.iloc[0]
            unit = f" [{first['unit']}]" if first["unit"] else ""
            ax.set_title(f"{metric}{unit} {ARROWS[first['direction']]}", fontsize=10)
            ax.set_yticks(range(len(place)), list(place))
            ax.set_ylim(-0.7, len(place) - 0.3)
        figure.suptitle(f"{title}   (-- prior, ·· sampling floor)", fontsize=11, parse_math=False)
        figure.savefig(path, dpi=130)


def plot_budgets(rows: pd.DataFrame, metrics: Sequence[str], path: Path, title: str = "") -> None:
    """Every metric against updates and against reward calls (log), a line per method: mean ± s.e. over seeds."""
    rows = rows[rows["value"].notna() & (rows["updates"] > 0)]
    order = _order(rows, metrics)
    palette = sns.color_palette("tab10")
    looks = {name: (palette[i % 10], ("-", "--", ":", "-.")[i // 10 % 4]) for i, name in enumerate(order)}
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.8):
        figure = Figure(figsize=(3.2 * len(metrics) + 1.8, 6.2), layout="constrained")
        grid = figure.subplots(2, len(metrics), squeeze=False)
        for column, metric in enumerate(metrics):
            own = rows[rows["metric"] == metric]
            for ax, cost in zip(grid[:, column], ("updates", "reward_calls"), strict=True):
                for method in order:
                    table = own[own["method"] == method].groupby("budget").agg({cost: "mean", "value": ["mean", "sem"]})
                    x, mean, error = (table.iloc[:, i].to_numpy() for i in range(3))
                    error = np.nan_to_num(error)
                    color, style = looks[method]
                    ax.plot(x, mean, color=color, linestyle=style, linewidth=1.5, label=method)
                    ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
                ax.axhline(own["prior"].mean(), color=PRIOR, linestyle="--", linewidth=1)
                ax.set(xscale="log", xlabel=cost.replace("_", " "))
                _scale(ax, own["value"], "y")
            grid[0, column].set_title(f"{metric} {ARROWS[own.iloc[0]['direction']]}", fontsize=10)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8, handlelength=3)
        figure.suptitle(title, fontsize=11, parse_math=False)
        figure.savefig(path, dpi=130)


def _order(rows: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """Methods, the best by the first metric with "lower is better" first, else by the first metric."""
    directions = rows.drop_duplicates("metric").set_index("metric")["direction"]
    key = next((name for name in metrics if directions.get(name) == "lower"), metrics[0])
    means = rows[rows["metric"] == key].groupby("method")["value"].mean()
    ranked = means.sort_values(ascending=directions[key] == "lower").index
    return [*ranked, *sorted(set(rows["method"]) - set(ranked))]


def _scale(ax: matplotlib.axes.Axes, values: pd.Series, axis: str = "x") -> None:
    """Logarithmic where the values are positive and span more than two decades."""
    if values.min() > 0 and math.log10(values.max() / values.min()) > 2:
        ax.set(**{f"{axis}scale": "log"})
