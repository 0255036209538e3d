"""Pictures of one run: learning curves, and samples beside the prior's."""

import itertools
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

PRIOR, FINETUNED = "#6b7280", "#c2410c"
# of a legend: below the panel and its label, where it hides nothing
BELOW: dict[str, Any] = {
    "frameon": False, "fontsize": "small", "loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 2,
}  # fmt: skip


def shortened(text: str, most: int = 60) -> str:
    """A text of at most so many letters; a longer one ends in an ellipsis."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def legend(ax: Axes, handles: Sequence[Artist], names: Sequence[str], **options: Any) -> None:
    """A legend that reads no `$…$` as mathematics, and has names that begin with an underscore too."""
    for text in ax.legend(handles, list(map(shortened, names)), **options).get_texts():
        text.set_parse_math(False)


def wrapped(text: str, width: float) -> str:
    """A text in lines of about `width` letters, four at most."""
    return textwrap.fill(text, round(width), max_lines=4, placeholder=" …")


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """A letter that the font lacks, an emoji for one, is a box in PNG and itself in SVG."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure, whatever letters its texts have."""
    with without_glyph_warnings():
        figure.savefig(path, **options)


def plot_curves(log: pd.DataFrame, path: Path, title: str = "", evaluations: pd.DataFrame | None = None) -> None:
    """Reward, losses, gradient norms and time per update, one panel each, written to `path` (PNG).

    log: a row per update; columns `update`, and any of `reward_over_prior` (where not known, `reward`), `loss`,
        `gradient_norm/<network>`, and `seconds/<phase>` [s], the time's parts, with `round`.
        Of a log that lost them all nothing is drawn.
    evaluations: a row each, `updates`, `prior`, `difference` and `standard_error` of the reward on training prompts.
    Points are single updates; the line is their centred mean over a twentieth of the run, so it does not lag.
    """
    panels = []
    if {"reward_over_prior", "reward"} & set(log):
        panels.append(_plot_reward)
    if "loss" in log:
        panels.append(_plot_loss)
    if any(name.startswith("gradient_norm/") for name in log):
        panels.append(_plot_norms)
    if any(name.startswith("seconds/") for name in log):
        panels.append(_plot_phases)
    if not panels:
        return
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook"):
        first, last = log["update"].min(), log["update"].max()
        margin = max(0.7, 0.015 * (last - first))
        figure = Figure(figsize=(5.8 * columns, 3.7 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for ax, plot in itertools.zip_longest(grid, panels):
            if plot is None:
                ax.set_axis_off()
                continue
            plot(ax, log, evaluations)
            ax.set(xlabel="update", xlim=(first - margin, last + margin))
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        figure.suptitle(wrapped(title, 46 * columns), fontsize=13, parse_math=False)
        save(figure, path, dpi=120)


def _plot_reward(ax: Axes, log: pd.DataFrame, evaluations: pd.DataFrame | None) -> None:
    paired = "reward_over_prior" in log
    name = "reward_over_prior" if paired else "reward"
    _points(ax, log, name, FINETUNED, "a round's samples")
    if evaluations is not None and len(evaluations):
        values = evaluations["difference"] if paired else evaluations["prior"] + evaluations["difference"]
        ax.errorbar(
            evaluations["updates"], values, evaluations["standard_error"], label="evaluation ± s.e.",
            fmt="D", markersize=7, color="black", markerfacecolor="white", capsize=3, zorder=4,
        )  # fmt: skip
    if paired:
        ax.axhline(0, color=PRIOR, linestyle="--", linewidth=1.2, label="the prior")
        ax.set_ylabel("reward − the prior's mean reward\non the same prompts (evaluation)")
    else:
        ax.set_ylabel("mean reward (the prior's is not\nknown on all of these prompts)")
    ax.set_title("Reward in training")
    ax.legend(**BELOW)


def _plot_loss(ax: Axes, log: pd.DataFrame, evaluations: pd.DataFrame | None) -> None:
    _points(ax, log, "loss", PRIOR)
    if log["loss"].min() > 0 and log["loss"].max() > 50 * log["loss"].min():
        ax.set_yscale("log")
    ax.set(ylabel="mean loss", title="Loss")


def _plot_norms(ax: Axes, log: pd.DataFrame, evaluations: pd.DataFrame | None) -> None:
    names = [name for name in log if name.startswith("gradient_norm/")]
    colors = sns.color_palette("deep", len(names))
    dots = [_points(ax, log, name, color) for name, color in zip(names, colors, strict=True)]
    if (log[names] > 0).all(axis=None):
        ax.set_yscale("log")
    ax.set(ylabel="norm before clipping", title="Gradient norms")
    networks = [name.removeprefix("gradient_norm/") for name in names]
    legend(ax, dots, networks, **BELOW)


def _points(ax: Axes, log: pd.DataFrame, name: str, color: Any, label: str | None = None) -> Artist:
    few = len(log) <= 60
    dots = ax.scatter(
        log["update"], log[name], s=30 if few else 12, alpha=0.8 if few else 0.45, color=color, label=label
    )
    middle = log[name].rolling(max(1, len(log) // 20), center=True).mean()
    ax.plot(log["update"], middle, color=color, linewidth=1.5, alpha=0.8)
    return dots


def _plot_phases(ax: Axes, log: pd.DataFrame, evaluations: pd.DataFrame | None) -> None:
    phases = [name for name in log if name.startswith("seconds/")]
    phases = sorted(phases, key=lambda name: -log[name].mean())
    # whole rounds, as some phases come once in a round; a bar may hold several
    rounds = log["round"].rank(method="dense") if "round" in log else log["update"].rank()
    bars = log.groupby((rounds - 1) // -(-int(rounds.max()) // 60))
    seconds, updates = bars[phases].mean(), bars["update"]
    left, width = updates.min() - 0.5, updates.max() - updates.min() + 1
    bottom = np.zeros(len(seconds))
    for name, color in zip(phases, sns.color_palette("deep", len(phases)), strict=True):
        label = f"{name.removeprefix('seconds/')} ({log[name].mean():.2g} s)"
        ax.bar(left, seconds[name], width, bottom, align="edge", color=color, linewidth=0, label=label)
        bottom += seconds[name].to_numpy()
    ax.set(ylabel="seconds", title="Time per update, by phase (mean)")
    ax.set_ylim(0, 1.5 * max(1e-9, np.quantile(bottom, 0.9)))  # one slow update must not flatten all others
    ax.legend(**BELOW)


def plot_samples(
    prior: np.ndarray,
    finetuned: np.ndarray,
    prompts: Sequence[str],
    path: Path,
    title: str,
    prior_rewards: np.ndarray,
    finetuned_rewards: np.ndarray,
) -> None:
    """Samples of both models from the same prompts and noise, written to `path` (PNG): prior above, finetuned below.

    prior, finetuned: uint8 [P, n, H, W, 3]; rewards: [P, N] of all samples of the prompts, n of which are shown, NaN
    for none; their mean and, of several, standard deviation stand beside the strips.
    """
    count, n, height, width = prior.shape[:4]
    columns = max(1, min(count, round((1.3 * 2 * count / n) ** 0.5)))  # a page a little wider than high
    inches = max(1.9, (0.95 if height <= 128 else 1.7) * n)
    scale = -(-512 // height)  # pixels stay squares: enlarged before anything is resampled
    rows = -(-count // columns)
    known = [line[~np.isnan(line)] for line in (*prior_rewards, *finetuned_rewards)]  # a sample may have no score
    spreads, values = [line.std(ddof=1) for line in known if len(line) > 1], np.concatenate(known)
    spread = np.median(spreads) if spreads else values.std() if len(values) else 0  # one sample shows no spread
    digits = int(np.clip(1 - np.floor(np.log10(spread or 1)), 0, 6))  # one format in the whole picture
    with sns.axes_style("white"), sns.plotting_context("notebook"):
        size = columns * (inches + 1.2), rows * (2 * inches / n * height / width + 0.5) + 0.5
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        title = "\n".join(wrapped(line, 8 * size[0]) for line in title.splitlines())
        figure.suptitle(title, fontsize=13, parse_math=False)
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for i, ax in enumerate(grid):
            if i >= count:
                ax.set_axis_off()
                continue
            strips = [_strip(images[i], scale) for images in (prior, finetuned)]
            gap = np.full((strips[0].shape[0] // 24, *strips[0].shape[1:]), 255, np.uint8)
            ax.imshow(np.concatenate([strips[0], gap, strips[1]]))
            labels = [
                f"{name}\n{f'{r.mean():.{digits}f}' if len(r) else 'no score'}"
                + (f" ± {r.std(ddof=1):.{digits}f}" if len(r) > 1 else "")
                for name, r in {"prior": known[i], "finetuned": known[count + i]}.items()
            ]
            heading = textwrap.fill(prompts[i], round(10 * inches), max_lines=3, placeholder=" …")
            ax.set_title(heading, fontsize=11, parse_math=False)
            ax.set_xticks([])
            ax.set_yticks([height * scale * 0.5, height * scale * 1.5 + len(gap)], labels, fontsize=9)
            for label, color in zip(ax.get_yticklabels(), (PRIOR, FINETUNED), strict=True):
                label.set_color(color)
            sns.despine(ax=ax, left=True, bottom=True)
        save(figure, path, dpi=150)


def _strip(images: np.ndarray, scale: int) -> np.ndarray:
    """Images uint8 [n, H, W, 3] side by side with white gaps, each pixel `scale` pixels wide and high."""
    large = images.repeat(scale, 1).repeat(scale, 2)
    gap = np.full((large.shape[1], large.shape[1] // 24, 3), 255, np.uint8)
    return np.concatenate([piece for image in large for piece in (image, gap)][:-1], axis=1)
