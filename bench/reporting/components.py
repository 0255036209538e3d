"""Pictures of models whose components are known: samples sorted by component, so that shares are seen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle

SHOWN = 16  # samples of a row
Row = tuple[np.ndarray, np.ndarray]  # images uint8 [n, H, W, 3] and their components, integers [n]


def plot_components(
    prompts: Mapping[str, Mapping[str, Row]], names: Sequence[str], path: Path, title: str = ""
) -> None:
    """One panel per prompt, with a row for each set of samples, written to `path` (PNG).

    prompts: heading → name of the set → its samples. names: of the components. Of each set, samples at even distances
    in the order of components are shown, over a bar of the component's colour: lengths of the bar are shares.
    """
    columns = min(2, len(prompts))
    rows, sets = -(-len(prompts) // columns), len(next(iter(prompts.values())))
    colours = sns.color_palette("Paired", len(names))
    with sns.axes_style("white"), sns.plotting_context("notebook"):
        size = 8.6 * columns, (0.62 * sets + 0.4) * rows + 1.1
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for ax in list(grid)[len(prompts) :]:
            ax.set_axis_off()
        for ax, (heading, panel) in zip(figure.axes, prompts.items(), strict=False):
            _panel(ax, panel, colours)
            ax.set_title(heading, fontsize=11, parse_math=False)
        patches: Any = [Patch(color=colour) for colour in colours]
        figure.legend(patches, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=10)
        figure.suptitle(title, fontsize=12, parse_math=False)
        figure.savefig(path, dpi=130)


def _panel(ax: Axes, panel: Mapping[str, Row], colours: Sequence[Any]) -> None:
    """Rows of samples under one another; a sample is one unit wide, its bar a sixth of a unit high."""
    for place, (images, components) in enumerate(panel.values()):
        order = components.argsort(kind="stable")
        chosen = order[((np.arange(SHOWN) + 0.5) * len(order) / SHOWN).astype(int)]
        for x, i in enumerate(chosen):
            bottom = -1.25 * place
            ax.imshow(images[i], extent=(x + 0.03, x + 0.97, bottom, bottom + 1), interpolation="nearest")
            bar = Rectangle((x, bottom - 0.17), 1, 0.12, color=colours[components[i]], linewidth=0)
            ax.add_patch(bar)
    ax.set(xlim=(0, SHOWN), ylim=(-1.25 * (len(panel) - 1) - 0.2, 1.02), aspect="equal", xticks=[])
    ax.set_yticks([0.5 - 1.25 * place for place in range(len(panel))], list(panel), fontsize=9)
    sns.despine(ax=ax, left=True, bottom=True)
