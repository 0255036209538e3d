"""Samples of two-dimensional models over the exact target's density."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.reporting.plots import save, wrapped

DOTS = "#1e3a5f"


def plot_points(
    panels: Mapping[str, np.ndarray], density: np.ndarray, extent: np.ndarray, path: Path, title: str = ""
) -> None:
    """One panel per entry, written to `path` (PNG): samples [N, 2] as dots over the target's density as contours.

    density: [G, G], row y, on the grid of `extent` (xmin, xmax, ymin, ymax), the limits of every panel.
    """
    shown = 1500
    columns = min(len(panels), 6)
    rows = -(-len(panels) // columns)
    size = 3.0 if rows == 1 else 2.3
    axis_x, axis_y = (np.linspace(extent[i], extent[i + 1], density.shape[1 - i // 2]) for i in (0, 2))
    mass = np.sort(density.ravel())[::-1]
    # contours around the densest 98, 90, 70, 40 and 15 per cent of the mass
    places = np.searchsorted(mass.cumsum() / mass.sum(), (0.98, 0.9, 0.7, 0.4, 0.15))
    levels = np.unique(mass[places])
    with sns.axes_style("white"), sns.plotting_context("notebook"):
        figure = Figure(
            figsize=(size * columns, (size + 0.45) * rows + 0.7),
            layout=ConstrainedLayoutEngine(compress=True, h_pad=0.08),
        )
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for ax in list(grid)[len(panels) :]:
            ax.set_axis_off()
        for ax, (name, points) in zip(figure.axes, panels.items(), strict=False):
            ax.contourf(axis_x, axis_y, density, levels=[*levels, mass[0] * 1.01], cmap="Oranges", alpha=0.75)
            ax.scatter(points[:shown, 0], points[:shown, 1], s=2, color=DOTS, alpha=0.35, linewidths=0, rasterized=True)
            ax.set(xlim=extent[:2], ylim=extent[2:], aspect="equal", xticks=[], yticks=[])
            heading = "\n".join(wrapped(line, 13 * size) for line in name.splitlines())
            ax.set_title(heading, fontsize=10, parse_math=False)
        dots: Any = Line2D([], [], linestyle="", marker="o", markersize=4, color=DOTS)
        shades: Any = tuple(Patch(color=color) for color in sns.color_palette("Oranges", 3))
        count = min(shown, max(map(len, panels.values())))
        figure.legend(
            [dots, shades], [f"samples ({count:,} shown)", "density of the exact target"], loc="outside lower center",
            ncols=2, frameon=False, fontsize=9, handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        )  # fmt: skip
        if title:
            figure.suptitle(wrapped(title, 12 * size * columns), fontsize=11, parse_math=False)
        save(figure, path, dpi=130)
