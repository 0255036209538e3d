"""A heat map of the reward's gain by prompt."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns

from bench.reporting.figures.drawing import drawing
from bench.reporting.plots import shortened
from bench.reporting.summary import summary


def plot_prompts(rows: pd.DataFrame, path: Path, order: Sequence[str], title: str = "", most: int = 40) -> None:
    """Heat map of the reward's gain over the prior on the same noise: rows of the table × prompts, part by part.

    rows: those of the table that have a value, with `reward_prompts/SPLIT/PROMPT` among their metrics. The first `most`
    prompts of a split are drawn. Colours are cut at the 98th percentile.
    """
    gains = summary(rows)["difference"].unstack("metric").filter(like="reward_prompts/")
    gains = gains.reindex(order).dropna(how="all")
    names = list(dict.fromkeys(rows.loc[rows["metric"].isin(gains.columns), "metric"]))
    parts = dict.fromkeys(name.split("/")[1] for name in names)
    splits = {split: [name for name in names if name.split("/")[1] == split][:most] for split in parts}
    widths = [len(columns) for columns in splits.values()]
    reach = float(np.nanpercentile(gains.abs().to_numpy(), 98)) or 1.0
    labels = [shortened(name) for name in gains.index]
    size = 0.36 * sum(widths) + 0.07 * max(map(len, labels)) + 2.2, 0.26 * len(gains) + 3.0
    with drawing(path, size, title, "paired difference to the prior, means over seeds as in the table") as figure:
        grid = figure.subplots(1, len(splits), sharey=True, squeeze=False, width_ratios=widths)[0]
        for ax, (split, columns) in zip(grid, splits.items(), strict=True):
            look = {"cmap": "vlag", "vmin": -reach, "vmax": reach, "cbar": ax is grid[-1], "linewidths": 0.5}
            look |= {"xticklabels": False, "yticklabels": False, "cbar_kws": {"label": "reward gain", "extend": "both"}}
            sns.heatmap(gains[columns], ax=ax, **look)
            ax.set_yticks(np.arange(len(labels)) + 0.5, labels, parse_math=False)
            prompts = [shortened(name.split("/", 2)[2], 32) for name in columns]
            ax.set_xticks(np.arange(len(columns)) + 0.5, prompts, rotation=60, ha="right", fontsize=8, parse_math=False)
            ax.set(xlabel="", ylabel="", title=f"{'training' if split == 'train' else split} prompts")
            ax.tick_params(axis="y", rotation=0)
