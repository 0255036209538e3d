"""Figures of a comparison: what its table says, its learning curves, its trade-offs. PNG and SVG in one style."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator
from PIL import Image

from bench.errors import BenchError
from bench.reporting.budgets import AXES, COSTS, GAIN
from bench.reporting.leaderboard import heading, meaning, ranked
from bench.reporting.plots import FINETUNED, PRIOR, legend, save, shortened, wrapped
from bench.reporting.selection import floors, is_robust, priors, summary
from bench.reporting.statistics import intervals, profile
from bench.reporting.table import number

FAMILIES = {  # what a method learns from; one of another package is among the others
    "reward gradient": "refl draft draft_1 draft_full draft_lv alignprop leap_align",
    "policy gradient": "ddpo grpo dpok flow_grpo flow_grpo_cps dance_grpo mix_grpo grpo_guard flow_dppo",
    "gradient matching": "nabla_gfn nabla_gfn_noflow nabla_gfn_published nabla_gfn_adjoint nabla_db "
    "adjoint_matching vgg_flow vgg_flow_pruned",
    "balance": "rtb rtb_softmax tmpo db res_db dag_kl",
    "regression on samples": "nft awm rvm ram tilt_matching online_dpo",
}
FAMILY = {name: family for family, names in FAMILIES.items() for name in names.split()}
TRADED = ("diversity", "coverage", "fid_prior", "path_kl", "tilt_tv")  # against the reward
TOGETHER = 16  # lines in a panel that can still be told apart
INK, FAINT = "#111827", "#d1d5db"
OFF = 4  # quartile ranges from the quartiles, beyond which a value may be off the scale
SQUEEZED = 0.5  # and is, where the others would have less than this share of it


@contextmanager
def _figure(path: Path, size: tuple[float, float], title: str, note: str = "") -> Iterator[Figure]:
    """A figure that is written to `path` and beside it as SVG, with the same bytes every time."""
    style = {"svg.hashsalt": "nabla-bench", "svg.fonttype": "none"}
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.8), matplotlib.rc_context(style):
        title = wrapped(title, 12 * size[0])
        more = 0.2 * max(0, title.count("\n") - 1)  # inches that a long title takes
        figure = Figure(figsize=(size[0], size[1] + more), layout="constrained")
        yield figure
        figure.suptitle(title, fontsize=11, parse_math=False)
        if note:
            figure.supxlabel(textwrap.fill(note, round(17 * size[0])), fontsize=8, parse_math=False)
        save(figure, path, dpi=130)
        figure.set_layout_engine("none")  # found once
        save(figure, path.with_suffix(".svg"), metadata={"Date": None})


def family(name: str) -> str:
    """Of a row of a table, whose settings or copies stand behind a bracket."""
    return FAMILY.get(name.split(" (")[0], "others")


def _families(order: Sequence[str]) -> dict[str, list[str]]:
    members = {kind: [name for name in order if family(name) == kind] for kind in (*FAMILIES, "others")}
    return {kind: names for kind, names in members.items() if names}


def plot_methods(rows: pd.DataFrame, metrics: Sequence[str], path: Path, title: str = "") -> None:
    """One panel a metric, rows of the table below one another: every seed a dot, what the table prints a bar.

    rows: those of the table that have a value. The dashed line is the prior, the dotted one the
    sampling floor. Sorted as the table, by the first metric.
    """
    table, before, least = summary(rows), priors(rows), floors(rows)
    order = ranked(rows, table, metrics)
    place = {name: i for i, name in enumerate(reversed(order))}
    titles = {row["metric"]: heading(row) for row in rows.drop_duplicates("metric").to_dict("records")}
    names = [shortened(name) for name in place]
    above = {name: wrapped(title.replace("/", "/ "), 26).replace("/ ", "/") for name, title in titles.items()}
    lines = max(above[name].count("\n") for name in metrics)
    size = 0.6 + 0.07 * max(map(len, names)) + 2.6 * len(metrics), 1.6 + 0.26 * len(order) + 0.2 * max(0, lines - 1)
    note = f"-- prior, ·· sampling floor; dots: runs; bars, as square brackets in the table. {meaning(rows, metrics)}"
    note = note.partition(" Round brackets")[0]
    with _figure(path, size, title, note) as figure:
        for ax, metric in zip(figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0], metrics, strict=True):
            drawn = rows[(rows["metric"] == metric) & rows["row"].isin(order)]
            cells = table.xs(metric, level="metric").loc[drawn["row"].unique()]
            ax.scatter(drawn["value"], drawn["row"].map(place), s=16, alpha=0.5, color=FINETUNED, linewidths=0)
            alone = cells["value_low"].notna()  # else the difference's interval, around the value
            low = (cells["value"] - cells["value_low"]).where(alone, cells["difference"] - cells["difference_low"])
            high = (cells["value_high"] - cells["value"]).where(alone, cells["difference_high"] - cells["difference"])
            reach = np.nan_to_num([low, high]).clip(0)
            height = [place[name] for name in cells.index]
            bar = {"fmt": "|", "color": INK, "markersize": 9, "capsize": 2, "linewidth": 1.2}
            ax.errorbar(cells["value"], height, xerr=reach, **bar)
            _scale(ax, drawn, metric)
            _references(ax, metric, before, least, "x")
            for name, value in cells["value"][~cells["value"].between(*ax.get_xlim())].items():  # off the scale
                side, x = ("left", 0.03) if value < ax.get_xlim()[0] else ("right", 0.97)
                text = f"◂ {number(value)}" if side == "left" else f"{number(value)} ▸"
                ax.text(x, place[name], text, transform=ax.get_yaxis_transform(), ha=side, va="bottom", fontsize=8)
            ax.set_title(above[metric], fontsize=10, parse_math=False)
            ax.xaxis.set_major_locator(MaxNLocator(4) if ax.get_xscale() == "linear" else LogLocator(numticks=5))
            ax.set_yticks(range(len(names)), names, parse_math=False)
            ax.set_ylim(-0.7, len(place) - 0.3)


def plot_curves(rows: pd.DataFrame, metric: str, path: Path, order: Sequence[str], title: str = "") -> None:
    """A metric against every cost (log), a line of small multiples for every family of methods, the others in grey.

    order: the rows of the table. Markers are evaluations, bands the table's intervals. Evaluations that not all seeds
    of a row had are left out: the centre would change with the seeds. The training reward is drawn less the prior's on
    the same noise, whose spread over seeds would hide what a method adds.
    """
    before, least = priors(rows), floors(rows)
    title = f"{title}: {metric}"
    if metric == GAIN:
        rows, before = rows.assign(value=rows["difference"], support="real"), before.assign(value=0.0)
        title += " less the prior's on the same noise"
    lines = {name: line for name, line in lines_of(rows, metric) if name in order}
    families = _families([name for name in order if name in lines])
    size = 2.9 * len(AXES) + 2.2, 2.3 * len(families) + 1.1
    palette = sns.color_palette("colorblind")
    with _figure(path, size, title, "markers: evaluations; bands: 95 % over seeds; -- prior, ·· floor") as figure:
        grid = figure.subplots(len(families), len(AXES), squeeze=False, sharex="col", sharey=True)
        for axes, (kind, names) in zip(grid, families.items(), strict=True):
            for ax, column in zip(axes, AXES, strict=True):
                handles = []
                for name, line in lines.items():
                    if name not in names:
                        ax.plot(line[column], line["value"], color=FAINT, linewidth=0.8, zorder=1)
                for i, name in enumerate(names):
                    line, color = lines[name], palette[i % len(palette)]
                    look = {"color": color, "marker": "osD^vPX*<>"[i % 10], "markersize": 4, "linewidth": 1.4}
                    handles += ax.plot(line[column], line["value"], label=name, **look)
                    ax.fill_between(line[column], line["low"], line["high"], color=color, alpha=0.18, linewidth=0)
                _references(ax, metric, before, least, "y")
                ax.set(xscale="log")
                ax.minorticks_off()
            _scale(axes[0], rows, metric, "y")
            axes[0].set_ylabel(kind)
            beside = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5), "frameon": False, "fontsize": 8}
            legend(axes[-1], handles, names, **beside)
        for ax, (label, unit) in zip(grid[-1], (COSTS[column] for column in AXES), strict=True):
            ax.set_xlabel(f"{label} [{unit}]" if unit else label)
            low, high = np.log10(ax.get_xlim())
            ticks = (1, 2, 5) if high - low < 1.3 else (1, 3) if high - low < 2.5 else (1,)
            ax.xaxis.set_major_locator(LogLocator(subs=ticks))
            ax.xaxis.set_major_formatter(lambda x, _: EngFormatter(sep="")(x) if x >= 1 else f"{x:g}")


def plot_trades(rows: pd.DataFrame, metrics: Sequence[str], path: Path, order: Sequence[str], title: str = "") -> bool:
    """The training reward against what it costs: a dot a checkpoint, a line a method, from the prior on.

    More than `TOGETHER` lines are small multiples, a line of them for every family, the others in grey. Draws those of
    `metrics` that are worth a panel and returns whether there were any.
    """
    reward = {name: line for name, line in lines_of(rows, GAIN) if name in order}
    panels = [name for name in metrics if name.split("/")[0].startswith(TRADED) and name != GAIN]
    if not reward or not panels:
        return False
    families = _families([name for name in order if name in reward])
    apart, palette = len(reward) > TOGETHER, sns.color_palette("colorblind")
    groups = families if apart else {"": list(reward)}
    looks = {
        name: {"color": palette[(j if apart else i) % 10], "marker": "osD^vPX*<>"[j % 10] if apart else "o"}
        for i, names in enumerate(families.values())
        for j, name in enumerate(names)
    }
    height = 2.3 if apart else max(4.6, 0.17 * len(reward) + 1.6)
    size = (3.9 if apart else 4.6) * len(panels) + (2.0 if apart else 0.4), height * len(groups) + 1.1 * apart
    note = "a dot an evaluation, from the prior (◆) on, where the scale shows it; means over seeds as in the table;"
    note += " what would squeeze the others is off the scale"
    titles = {row["metric"]: heading(row) for row in rows.drop_duplicates("metric").to_dict("records")}
    with _figure(path, size, title, note) as figure:
        grid = figure.subplots(len(groups), len(panels), squeeze=False, sharex="col", sharey="col")
        for axes, (kind, names) in zip(grid, groups.items(), strict=True):
            for ax, metric in zip(axes, panels, strict=True):
                ends = _trades(ax, rows, reward, metric, {name: looks[name] for name in names})
                price = shortened(titles[metric])
                ax.set_ylabel(f"{kind}\n{price}" if apart and ax is axes[0] else price, parse_math=False)
                if not apart:
                    _label_ends(ax, ends, size[1] - 1.2)
            if apart:
                handles = [matplotlib.lines.Line2D([], [], **looks[name], markersize=4) for name in names]
                beside = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5), "frameon": False, "fontsize": 8}
                legend(axes[-1], handles, names, **beside)
        for ax in grid[-1]:
            ax.set_xlabel(titles[GAIN])
        if not apart:
            colors = {kind: looks[names[0]]["color"] for kind, names in families.items()}
            handles = [matplotlib.lines.Line2D([], [], color=color, label=kind) for kind, color in colors.items()]
            grid[0, 0].legend(handles=handles, fontsize=8, loc="best", framealpha=0.9)
    return True


def _trades(
    ax: Axes, rows: pd.DataFrame, reward: Mapping[str, pd.DataFrame], metric: str, looks: Mapping[str, dict]
) -> list[tuple[float, float, str, tuple[float, ...]]]:
    """Draw a panel, lines without a look in grey; returns where the others end: x, y, name, colour."""
    before, ends = priors(rows), []
    _scale(ax, rows, metric, "y")
    _scale(ax, rows, GAIN)
    start = before["value"].get(GAIN), before["value"].get(metric)
    shown = pd.notna(start[1]) and (ax.get_yscale() == "linear" or start[1] > 0)
    for name, line in lines_of(rows, metric):
        if name not in reward:
            continue
        both = reward[name].merge(line, on="budget", suffixes=("_reward", ""))
        if both.empty:
            continue
        x, y = (both[column].to_numpy() for column in ("value_reward", "value"))
        look = looks.get(name, {"color": FAINT, "zorder": 1})
        if both["updates"].iloc[0] > 0 and shown:
            ax.plot([start[0], x[0]], [start[1], y[0]], color=look["color"], linewidth=0.8, alpha=0.5, zorder=1)
        ax.plot(x, y, **look, markersize=3, linewidth=1.2 if name in looks else 0.8)
        if name in looks:
            ends.append((x[-1], y[-1], name, look["color"]))
    if shown:
        ax.plot(*start, "D", color=INK, markersize=6, zorder=5)
    _references(ax, metric, before.iloc[:0], floors(rows), "y")
    return ends


def plot_steps(rows: pd.DataFrame, path: Path, order: Sequence[str], title: str = "") -> None:
    """`path_kl` of every sampling step, from noise to sample; small multiples by family, the others in grey.

    rows: those of the table that have a value, with `path_kl_steps/NN` among their metrics.
    """
    steps_of = summary(rows)["value"].unstack("metric").filter(like="path_kl_steps/").sort_index(axis=1)
    lines = {name: values.to_numpy() for name, values in steps_of.reindex(order).dropna(how="all").iterrows()}
    families, palette = _families(list(lines)), sns.color_palette("colorblind")
    steps = np.arange(1, steps_of.shape[1] + 1)
    size, note = (3.3 * len(families) + 0.4, 3.9), "from noise (step 1) to the sample; means over seeds as in the table"
    with _figure(path, size, title, note) as figure:
        grid = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
        for ax, (kind, names) in zip(grid, families.items(), strict=True):
            for name in [name for name in lines if name not in names]:
                ax.plot(steps, lines[name], color=FAINT, linewidth=0.8, zorder=1)
            handles = []
            for i, name in enumerate(names):
                look = {"color": palette[i % 10], "marker": "osD^vPX*<>"[i % 10], "markersize": 3.5, "linewidth": 1.4}
                handles += ax.plot(steps, lines[name], label=name, **look)
            log = any((lines[name] > 0).any() for name in lines)  # nothing was learned in a run of zeros
            ax.set(title=kind, xlabel="sampling step", yscale="log" if log else "linear")
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            legend(ax, handles, names, fontsize=7, loc="best")
        grid[0].set_ylabel("path_kl of the step [nats]")


def plot_prompts(rows: pd.DataFrame, path: Path, order: Sequence[str], title: str = "", most: int = 40) -> None:
    """Heat map of the reward's gain over the prior on the same noise: rows of the table × prompts, held-out ones apart.

    rows: those of the table that have a value, with `reward_prompts/SPLIT/PROMPT` among their metrics. The first `most`
    prompts of a split are drawn. Colours are cut at the 98th percentile.
    """
    gains = summary(rows)["difference"].unstack("metric").filter(like="reward_prompts/")
    gains = gains.reindex(order).dropna(how="all")
    names = list(dict.fromkeys(rows.loc[rows["metric"].isin(gains.columns), "metric"]))
    splits = {split: [name for name in names if name.split("/")[1] == split][:most] for split in ("train", "heldout")}
    splits = {split: columns for split, columns in splits.items() if columns}
    widths = [len(columns) for columns in splits.values()]
    reach = float(np.nanpercentile(gains.abs().to_numpy(), 98)) or 1.0
    labels = [shortened(name) for name in gains.index]
    size = 0.36 * sum(widths) + 0.07 * max(map(len, labels)) + 2.2, 0.26 * len(gains) + 3.0
    with _figure(path, size, title, "paired difference to the prior, means over seeds as in the table") as figure:
        grid = figure.subplots(1, len(splits), sharey=True, squeeze=False, width_ratios=widths)[0]
        for ax, (split, columns) in zip(grid, splits.items(), strict=True):
            look = {"cmap": "vlag", "vmin": -reach, "vmax": reach, "cbar": ax is grid[-1], "linewidths": 0.5}
            look |= {"xticklabels": False, "yticklabels": False, "cbar_kws": {"label": "reward gain", "extend": "both"}}
            sns.heatmap(gains[columns], ax=ax, **look)
            ax.set_yticks(np.arange(len(labels)) + 0.5, labels, parse_math=False)
            prompts = [shortened(name.split("/", 2)[2], 32) for name in columns]
            ax.set_xticks(np.arange(len(columns)) + 0.5, prompts, rotation=60, ha="right", fontsize=8, parse_math=False)
            ax.set(xlabel="", ylabel="", title=f"{'held-out' if split == 'heldout' else 'training'} prompts")
            ax.tick_params(axis="y", rotation=0)


def plot_profiles(scores: Mapping[str, Mapping[str, np.ndarray]], path: Path, title: str = "") -> None:
    """Performance profiles: of every method the share of runs that reach a share of the best method's gain.

    scores: method → setting → normalised gains of its runs; settings count equally. Small multiples by family.
    """
    families = _families(list(scores))
    levels = np.linspace(-0.25, 1.25, 301)
    lines = {name: profile(tasks, levels) for name, tasks in scores.items()}
    palette = sns.color_palette("colorblind")
    size = 3.3 * len(families) + 0.4, 3.9
    with _figure(path, size, title, "gain as a share of the best method's, per setting; 0 is the prior") as figure:
        grid = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
        for ax, (kind, names) in zip(grid, families.items(), strict=True):
            for name in [name for name in lines if name not in names]:
                ax.step(levels, lines[name], color=FAINT, linewidth=0.8, zorder=1)
            handles = []
            for i, name in enumerate(names):
                handles += ax.step(levels, lines[name], color=palette[i % 10], linewidth=1.5)
            ax.set(title=kind, ylim=(-0.03, 1.03))
            counts = [f"{shortened(name)} (n = {sum(map(len, scores[name].values()))})" for name in names]
            legend(ax, handles, counts, fontsize=7, loc="upper right")
        grid[0].set_ylabel("share of runs")


def plot_sheet(shots: Mapping[str, Sequence[tuple[str, Path]]], path: Path, title: str = "", most: int = 8) -> None:
    """Samples of the table's rows below one another, the prior on top; a column is one prompt and one noise.

    shots: column → (row, image file), rows in order and the same in every column. The first `most` columns are drawn.
    """
    columns = dict(list(shots.items())[:most])
    names = [name for name, _ in next(iter(columns.values()))]
    with _figure(path, (1.15 * len(columns) + 2.2, 1.15 * len(names) + 1.0), title) as figure:
        grid = figure.subplots(len(names), len(columns), squeeze=False)
        for axes, (prompt, column) in zip(grid.T, columns.items(), strict=True):
            axes[0].set_title(textwrap.fill(prompt, 16, max_lines=3, placeholder=" …"), fontsize=8, parse_math=False)
            for ax, (_, file) in zip(axes, column, strict=True):
                ax.imshow(_picture(file), interpolation="nearest")
                ax.set(xticks=[], yticks=[])
        for ax, name in zip(grid[:, 0], names, strict=True):
            ax.set_ylabel(wrapped(name, 26), rotation=0, ha="right", va="center", fontsize=8, parse_math=False)


def _picture(file: Path) -> np.ndarray:
    try:
        return np.asarray(Image.open(file))
    except OSError as error:
        raise BenchError(f"{file} is no whole image ({error}): remove it, and the figures go without it.") from None


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


def _references(ax: Axes, metric: str, before: pd.DataFrame, least: pd.DataFrame, axis: str) -> None:
    """The prior's value dashed, the floor's dotted."""
    draw = ax.axvline if axis == "x" else ax.axhline
    for lines, style in ((before, "--"), (least, ":")):
        value = lines["value"].get(metric)
        if value is not None and np.isfinite(value) and (getattr(ax, f"get_{axis}scale")() == "linear" or value > 0):
            draw(value, color=PRIOR, linestyle=style, linewidth=1.2, zorder=0.5)


def _label_ends(ax: Axes, ends: Sequence[tuple[float, float, str, tuple[float, ...]]], inches: float) -> None:
    """Names right of the axes in the order of the lines' ends, apart from one another, joined to them by thin lines."""
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())  # final, before places are read off
    points = ax.transAxes.inverted().transform(ax.transData.transform([end[:2] for end in ends]))
    order = np.argsort(points[:, 1], kind="stable")
    gap = 9 / (72 * inches)  # of 7 pt text, in heights of the axes
    places = points[order, 1].clip(0, 1)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    over = max(0.0, places[-1] - 1)
    for i in reversed(range(len(places))):  # and down again from the top
        places[i] = min(places[i], 1 - (len(places) - 1 - i) * gap) if over else places[i]
    for i, place in zip(order, places, strict=True):
        x, y, name, color = ends[i]
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6}
        ax.annotate(
            shortened(name), (x, y), (1.03, place), textcoords="axes fraction", fontsize=7, color=color, va="center",
            arrowprops=arrow, parse_math=False,
        )  # fmt: skip


def scale_of(rows: pd.DataFrame, metric: str) -> tuple[bool, tuple[float, float] | None]:
    """Whether a metric's axis is logarithmic, and its ends if it is cut.

    Logarithmic where the values are positive and span more than two decades. Cut to values within `OFF` quartile ranges
    of how runs end, or of all evaluations, where a diverged run would squeeze all others into a line.
    """
    drawn = rows[(rows["metric"] == metric) & (rows["updates"] > 0) & rows["value"].notna()]
    drawn = drawn if len(drawn) else rows[rows["metric"] == metric]  # nothing was trained
    log = bool(drawn["value"].min() > 0 and math.log10(drawn["value"].max() / drawn["value"].min()) > 2)
    values = np.log10(drawn["value"]) if log else drawn["value"]
    last = drawn["updates"] == drawn.groupby(["row", "seed"])["updates"].transform("max")
    reaches = []
    for group in (values[last], values):  # runs may end close together and far from their start
        first, third = group.quantile([0.25, 0.75])
        reaches.append((first - OFF * (third - first), third + OFF * (third - first)))
    low, high = min(reaches)[0], max(high for _, high in reaches)
    shown = values[values.between(low, high)]
    ends = shown.min(), shown.max()
    if high <= low or ends[1] - ends[0] >= SQUEEZED * (values.max() - values.min()):
        return log, None
    low, high = (end + sign * 0.05 * (ends[1] - ends[0]) for end, sign in zip(ends, (-1, 1), strict=True))
    return log, (10**low, 10**high) if log else (low, high)


def _scale(ax: Axes, rows: pd.DataFrame, metric: str, axis: str = "x") -> None:
    """Give an axis its metric's scale."""
    log, ends = scale_of(rows, metric)
    if log:
        ax.set(**{f"{axis}scale": "log"})
    if ends:
        ax.set(**{f"{axis}lim": ends})
