"""Comparing finished runs: the Markdown page and its figures."""

import math
import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from results.plots import FINETUNED, PRIOR
from results.points import plot_points
from results.selection import at_cost, floors, has_seeds, priors, settings, summary
from results.table import ARROWS, comparison_markdown, meaning, ranked

DETAILS = ("/early", "/late", "/importance", "/floor")  # parts and second opinions of a metric


def headline(frame: pd.DataFrame) -> list[str]:
    """Metrics worth a panel: those with values and a direction, without the parts that a metric is split into."""
    names = dict.fromkeys(frame.loc[frame["value"].notna() & (frame["direction"] != "none"), "metric"])
    return [name for name in names if not name.endswith(DETAILS)]


def report(
    frame: pd.DataFrame,
    left_out: Sequence[str],
    metrics: Sequence[str] | None = None,
    cost: str | None = None,
    limit: int = 0,
    figures: Path | None = None,
) -> str:
    """Markdown: a section for every setting with its table, and what was left out; figures go to a folder if given.

    frame, left_out: of `results.selection.collect`. cost, limit: see `results.selection.at_cost`.
    Raises ValueError where no row has a value of any of `metrics`.
    """
    if metrics and frame.loc[frame["metric"].isin(metrics), "value"].isna().all():
        known = sorted(frame.loc[frame["value"].notna(), "metric"].unique())
        raise ValueError(f"no row has a value of {', '.join(metrics)}; there are {', '.join(known)}")
    parts = []
    for number, (heading, rows) in enumerate(settings(frame)):
        chosen, notes = at_cost(rows, cost, limit)
        parts.append(f"### {heading}\n")
        if cost:
            parts.append(f"At most {limit:,} {cost.replace('_', ' ')} a run.\n")
        parts.append(comparison_markdown(chosen, metrics))
        parts += [f"{note}\n" for note in notes]
        if figures:
            drawn = _figures(rows, chosen, metrics, figures, number, heading)
            parts += [f"![{heading}]({name})\n" for name in drawn]
    if left_out:
        parts.append("Left out:\n\n" + "\n".join(f"- {sentence}" for sentence in left_out) + "\n")
    return "\n".join(parts)


def write_report(out: Path, *arguments: Any, **options: Any) -> Path:
    """Write `report.md` and its figures to `out`; arguments: of `report`."""
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.md"
    page.write_text(report(*arguments, **options, figures=out), encoding="utf8")
    return page


def _figures(
    rows: pd.DataFrame, chosen: pd.DataFrame, metrics: Sequence[str] | None, out: Path, number: int, heading: str
) -> list[str]:
    """Names of the figures of one setting, drawn to `out`; chosen: the rows of the table."""
    values = chosen[chosen["value"].notna() & (chosen["status"] != "failed")]
    drawable = values[values["method"] != "prior"]
    panels = [name for name in (metrics or headline(drawable)) if name in set(drawable["metric"])]
    if not panels:
        return []
    plot_methods(values, panels, out / f"methods-{number}.png", heading)
    drawn = [f"methods-{number}.png"]
    if (rows.groupby(["row", "seed"])["budget"].nunique() > 1).any():
        plot_budgets(rows[rows["status"] != "failed"], panels, out / f"budgets-{number}.png", heading)
        drawn.append(f"budgets-{number}.png")
    if found := points_of(values, panels):
        plot_points(*found, out / f"points-{number}.png", heading)
        drawn.append(f"points-{number}.png")
    return drawn


def points_of(
    rows: pd.DataFrame, metrics: Sequence[str]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray] | None:
    """Samples by name, density and extent, of every row's first seed that left its points; None if none did."""
    panels, target = {}, None
    rows = rows[[Path(path).name == "rows.parquet" for path in rows["source"]]]  # points are those of the end
    for name in ranked(rows, summary(rows), metrics):
        for source, run in rows[rows["row"] == name].sort_values("seed").groupby("source", sort=False):
            try:
                data = dict(np.load(Path(source).with_name("points.npz")))
            except (OSError, ValueError, zipfile.BadZipFile):  # not there, or not whole
                continue
            target = target or (data["density"], data["extent"])
            panels = panels or {"target": data["target"], "prior": data["prior"]}
            seed = f"{name}\nseed {run['seed'].iloc[0]}"
            tv = run.loc[run["metric"] == "tilt_tv", "value"]
            panels[seed if tv.empty else f"{seed}, TV {tv.iloc[0]:.3f}"] = data["finetuned"]
            break
    return (panels, *target) if target else None


def plot_methods(rows: pd.DataFrame, metrics: Sequence[str], path: Path, title: str = "") -> None:
    """One panel a metric, rows of the table below one another: every seed a dot, what the table prints a bar.

    rows: those of the table that have a value. The dashed line is the prior, the dotted one the
    sampling floor. Sorted as the table, by the first metric.
    """
    found, before, least = summary(rows), priors(rows), floors(rows)
    order = ranked(rows, found, metrics)
    place = {name: i for i, name in enumerate(reversed(order))}
    units = rows.drop_duplicates("metric").set_index("metric")[["unit", "direction"]]
    width = 0.07 * max(map(len, order))
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.8):
        figure = Figure(figsize=(0.6 + width + 2.6 * len(metrics), 1.5 + 0.26 * len(order)), layout="constrained")
        for ax, metric in zip(figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0], metrics, strict=True):
            own = rows[(rows["metric"] == metric) & rows["row"].isin(order)]
            cells = found.xs(metric, level="metric").loc[own["row"].unique()]
            ax.scatter(own["value"], own["row"].map(place), s=9, alpha=0.35, color=FINETUNED, linewidths=0)
            error = cells["value_error"].fillna(cells["difference_error"]).fillna(0)
            height = [place[name] for name in cells.index]
            ax.errorbar(
                cells["value"], height, xerr=error, fmt="|", color="#111827", markersize=9, capsize=2, linewidth=1.2
            )
            _scale(ax, own["value"])
            for lines, style in ((before, "--"), (least, ":")):
                value = lines["value"].get(metric)
                if value is not None and np.isfinite(value) and (ax.get_xscale() == "linear" or value > 0):
                    ax.axvline(value, color=PRIOR, linestyle=style, linewidth=1.2)
            unit, direction = units.loc[metric]
            ax.set_title(f"{metric}{f' [{unit}]' if unit else ''} {ARROWS[direction]}", fontsize=10)
            ax.set_yticks(range(len(place)), list(place))
            ax.set_ylim(-0.7, len(place) - 0.3)
        inches = figure.get_figwidth()
        text = textwrap.fill(f"{title}   (-- prior, ·· sampling floor)", round(13 * inches))
        figure.suptitle(text, fontsize=11, parse_math=False)
        figure.supxlabel(textwrap.fill(f"bars: {meaning(rows)}", round(17 * inches)), fontsize=8)
        figure.savefig(path, dpi=130)


def plot_budgets(rows: pd.DataFrame, metrics: Sequence[str], path: Path, title: str = "") -> None:
    """Every metric against updates and against reward calls (log), a line per row of the table: mean ± s.e. over seeds.

    Budgets at which not all seeds of a row were evaluated are left out: the mean would change with the seeds.
    """
    rows = rows[rows["value"].notna() & (rows["updates"] > 0)]
    order = ranked(rows, summary(at_cost(rows)[0]), metrics)
    palette = sns.color_palette("tab10")
    looks = {name: (palette[i % 10], ("-", "--", ":", "-.")[i // 10 % 4]) for i, name in enumerate(order)}
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.8):
        figure = Figure(figsize=(3.2 * len(metrics) + 1.8, 6.2), layout="constrained")
        grid = figure.subplots(2, len(metrics), squeeze=False)
        for column, metric in enumerate(metrics):
            own = rows[rows["metric"] == metric]
            for ax, cost in zip(grid[:, column], ("updates", "reward_calls"), strict=True):
                for name in order:
                    line = own[own["row"] == name]
                    groups = line.groupby("budget").agg({"seed": "nunique", cost: "mean", "value": ["mean", "sem"]})
                    table = groups[groups.iloc[:, 0] == line["seed"].nunique()]
                    x, mean, error = (table.iloc[:, i].to_numpy() for i in (1, 2, 3))
                    error = np.nan_to_num(error)
                    color, style = looks[name]
                    ax.plot(x, mean, color=color, linestyle=style, linewidth=1.5, label=name)
                    ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
                ax.axhline(priors(own)["value"].get(metric), color=PRIOR, linestyle="--", linewidth=1)
                ax.set(xscale="log", xlabel=cost.replace("_", " "))
                _scale(ax, own["value"], "y")
            grid[0, column].set_title(f"{metric} {ARROWS[own.iloc[0]['direction']]}", fontsize=10)
        if has_seeds(rows):
            figure.supxlabel(f"bands: {meaning(rows)}", fontsize=8)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8, handlelength=3)
        figure.suptitle(title, fontsize=11, parse_math=False)
        figure.savefig(path, dpi=130)


def _scale(ax: matplotlib.axes.Axes, values: pd.Series, axis: str = "x") -> None:
    """Logarithmic where the values are positive and span more than two decades."""
    if values.min() > 0 and math.log10(values.max() / values.min()) > 2:
        ax.set(**{f"{axis}scale": "log"})
