"""Samples of the table's rows below one another."""

from pathlib import Path

import numpy as np

from bench.reporting.figures.drawing import drawing
from bench.reporting.plots import wrapped
from bench.reporting.samples import Samples
from bench.reporting.table import number


def plot_sheet(samples: Samples, path: Path, title: str = "", most: int = 8) -> None:
    """The prior's images on top; a column is one prompt and one noise, beside a row is the mean reward of its images.

    The first sample of the first `most` prompts is drawn.
    """
    first = {prompt: i for i, (prompt, _) in reversed(list(enumerate(samples.columns)))}
    columns = dict(sorted(first.items(), key=lambda item: item[1])[:most])
    names = samples.rows
    with drawing(path, (1.15 * len(columns) + 2.2, 1.15 * len(names) + 1.0), title) as figure:
        grid = figure.subplots(len(names), len(columns), squeeze=False)
        for axes, (prompt, column) in zip(grid.T, columns.items(), strict=True):
            axes[0].set_title(wrapped(prompt, 16), fontsize=8, parse_math=False)
            for ax, image in zip(axes, samples.images[:, column], strict=True):
                ax.imshow(image, interpolation="nearest")
                ax.set(xticks=[], yticks=[])
        means = samples.rewards[:, list(columns.values())].mean(1)
        for ax, name, mean in zip(grid[:, 0], names, means, strict=True):
            name = wrapped(name, 26)
            label = name if np.isnan(mean) else f"{name}\nreward {number(round(mean, 3))}"
            ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8, parse_math=False)
