"""Pictures of one run: learning curves, and samples beside the prior's."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PRIOR, FINETUNED = "#6b7280", "#c2410c"


def plot_curves(log: pd.DataFrame, path: Path, title: str = "") -> None:
    """Reward, loss and time per update, one panel each, written to `path` (PNG).

    log: a row per update; columns `update`, and any of `reward`, `loss` and `seconds/<phase>` [s], the time's parts.
    Points are single updates, lines an exponential moving average over a twentieth of the run (5 updates at least).
    """
    phases = [name for name in log.columns if name.startswith("seconds/")]
    curves = [(name, color) for name, color in (("reward", FINETUNED), ("loss", PRIOR)) if name in log]
    panels = len(curves) + bool(phases)
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook"):
        figure = Figure(figsize=(4.6 * panels, 3.8), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        for ax, (name, color) in zip(axes, curves, strict=False):
            smooth = log[name].ewm(span=max(5, len(log) / 20)).mean()
            ax.scatter(log["update"], log[name], s=12, alpha=0.3, color=color, linewidths=0, label="one update")
            ax.plot(log["update"], smooth, color=color, linewidth=2, label="moving average")
            ax.set(xlabel="update", ylabel=f"mean {name}")
            ax.set_title("Reward in training" if name == "reward" else "Loss")
            ax.legend(frameon=True, fontsize="small")
        if phases:
            _plot_phases(axes[-1], log, phases)
        for ax in axes:
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.suptitle(title, parse_math=False)
        figure.savefig(path, dpi=120)


def _plot_phases(ax: matplotlib.axes.Axes, log: pd.DataFrame, phases: Sequence[str]) -> None:
    phases = sorted(phases, key=lambda name: -log[name].mean())
    labels = [f"{name.removeprefix('seconds/')} ({log[name].mean():.2g} s)" for name in phases]
    colors = sns.color_palette("deep", len(phases))
    # smoothed, for some phases come once in several updates
    smooth = log[phases].rolling(max(6, len(log) // 20), min_periods=1, center=True).mean()
    ax.stackplot(log["update"], smooth.T, labels=labels, colors=colors, linewidth=0)
    ax.set(xlabel="update", ylabel="seconds, moving average", title="Time per update, by phase")
    # room for the legend, and one slow update must not flatten all others
    ax.set_ylim(0, (1.4 + 0.14 * len(phases)) * smooth.sum(axis=1).quantile(0.9))
    ax.legend(frameon=True, fontsize="small", loc="upper right", title="phase (mean)", title_fontsize="small")


def plot_samples(
    prior: np.ndarray,
    finetuned: np.ndarray,
    prompts: Sequence[str],
    path: Path,
    title: str = "",
    prior_rewards: np.ndarray | None = None,
    finetuned_rewards: np.ndarray | None = None,
) -> None:
    """Samples of both models from the same prompts and noise, written to `path` (PNG): prior above, finetuned below.

    prior, finetuned: uint8 [P, n, H, W, 3]; rewards: [P, n], whose means over n stand beside the strips.
    """
    count, n, height, width = prior.shape[:4]
    columns = max(1, min(count, round((1.3 * 2 * count / n) ** 0.5)))  # a page a little wider than high
    inches = max(1.9, (0.95 if height <= 128 else 1.7) * n)
    scale = -(-512 // height)  # pixels stay squares: enlarged before anything is resampled
    rows = -(-count // columns)
    with sns.axes_style("white"), sns.plotting_context("notebook"):
        size = columns * (inches + 1.2), rows * (2 * inches / n * height / width + 0.5) + 0.5
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        figure.suptitle(textwrap.fill(title, round(7 * size[0])), fontweight="bold", fontsize=14, parse_math=False)
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for i, ax in enumerate(grid):
            if i >= count:
                ax.set_axis_off()
                continue
            strips = [_strip(images[i], scale) for images in (prior, finetuned)]
            gap = np.full((strips[0].shape[0] // 24, *strips[0].shape[1:]), 255, np.uint8)
            ax.imshow(np.concatenate([strips[0], gap, strips[1]]))
            labels = ["prior", "finetuned"]
            if prior_rewards is not None and finetuned_rewards is not None:
                means = prior_rewards[i].mean(), finetuned_rewards[i].mean()
                labels = [f"{label}\nreward {mean:.3g}" for label, mean in zip(labels, means, strict=True)]
            heading = textwrap.fill(prompts[i], round(10 * inches), max_lines=3, placeholder=" …")
            ax.set_title(heading, fontsize=11, parse_math=False)
            ax.set_xticks([])
            ax.set_yticks([height * scale * 0.5, height * scale * 1.5 + len(gap)], labels, fontsize=9)
            for label, color in zip(ax.get_yticklabels(), (PRIOR, FINETUNED), strict=True):
                label.set_color(color)
            sns.despine(ax=ax, left=True, bottom=True)
        figure.savefig(path, dpi=150)


def _strip(images: np.ndarray, scale: int) -> np.ndarray:
    """Images uint8 [n, H, W, 3] side by side with white gaps, each pixel `scale` pixels wide and high."""
    large = images.repeat(scale, 1).repeat(scale, 2)
    gap = np.full((large.shape[1], large.shape[1] // 24, 3), 255, np.uint8)
    return np.concatenate([piece for image in large for piece in (image, gap)][:-1], axis=1)
