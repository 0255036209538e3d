"""What all figures share: size, title and note, and names that neither overlap nor cross one another."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from scipy.optimize import linear_sum_assignment

from bench.reporting import plots
from bench.reporting.figures.looks import Look
from bench.reporting.plots import save, shortened, wrapped
from bench.reporting.table import number

INK, FAINT = "#111827", "#d1d5db"
NAME = 7  # pt, of names in a panel


@contextmanager
def drawing(path: Path, size: tuple[float, float], title: str, note: str = "") -> Iterator[Figure]:
    """A figure that is written to `path` and beside it as SVG, with the same bytes every time."""
    style = {"svg.hashsalt": "nabla-bench", "svg.fonttype": "none"}
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.8), matplotlib.rc_context(style):
        title = wrapped(title, 12 * size[0])
        more = 0.2 * max(0, title.count("\n") - 1)  # inches that a long title takes
        figure = Figure(figsize=(size[0], size[1] + more), dpi=130, layout="constrained")
        figure.suptitle(title, fontsize=11, parse_math=False)
        if note:
            figure.supxlabel(wrapped(note, 15 * size[0]), fontsize=8, parse_math=False)
        yield figure
        settle(figure)
        save(figure, path)
        save(figure, path.with_suffix(".svg"), metadata={"Date": None})


def settle(figure: Figure) -> None:
    """Lay out a figure for good, once, so that positions can be read off; what is drawn later moves nothing."""
    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        with plots.without_glyph_warnings():
            figure.draw_without_rendering()
        figure.set_layout_engine("none")


def shape(count: int, most: int = 3) -> tuple[int, int]:
    """Lines and columns, at most so many, for panels of one size."""
    lines = -(-count // most)
    return lines, -(-count // lines)


def panels(figure: Figure, names: Sequence[str]) -> dict[str, Axes]:
    """Name → its panel under its title, all with one vertical scale."""
    grid = list(figure.subplots(*shape(len(names)), sharey=True, squeeze=False).flat)
    axes = dict(zip(names, grid, strict=False))
    for name, ax in axes.items():
        ax.set_title(name, parse_math=False)
    for ax in grid[len(names) :]:
        ax.set_axis_off()
    return axes


def legend(ax: Axes, names: Sequence[str], looks: Mapping[str, Look], right: bool = False) -> None:
    """Names with their looks, right of a panel or else below it: never over what is drawn."""
    handles = [Line2D([], [], **looks[name]._asdict(), markersize=4) for name in names]
    place = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2, "columnspacing": 1.0}
    plots.legend(ax, handles, names, frameon=False, fontsize=8 if right else 7, **(place if right else below))


def end_names(ax: Axes, ends: Mapping[str, tuple[float, float, str]]) -> list[Annotation]:
    """Names right of a panel, joined to the ends of lines by thin ones; `spread` puts them in place.

    ends: name → x, y, colour.
    """
    look: dict[str, Any] = {"fontsize": NAME, "va": "center", "textcoords": "axes fraction", "parse_math": False}
    return [
        ax.annotate(
            shortened(name), (x, y), (1.04, 0.5), color=_dark(color), **look,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0},
        )
        for name, (x, y, color) in ends.items()
    ]  # fmt: skip


def spread(ax: Axes, names: Sequence[Annotation]) -> None:
    """Put names into places of their own beside a panel that is laid out.

    Of all ways to do so the one of the least total length, which has no crossing: two lines that cross are longer than
    the two that join their ends the other way round.
    """
    if not names:
        return
    box = ax.bbox
    ends = ax.transData.transform([name.xy for name in names])
    room = 1.3 * NAME * ax.figure.dpi / 72
    places = np.linspace(box.y0, box.y1, max(len(names), int(box.height // room)))
    left = box.x0 + names[0].xyann[0] * box.width
    lengths = np.hypot(ends[:, :1] - left, ends[:, 1:] - places)
    for i, place in zip(*linear_sum_assignment(lengths), strict=True):
        names[i].xyann = (names[i].xyann[0], (places[place] - box.y0) / box.height)


def leaves(ax: Axes, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether a line ends off the scale of a panel."""
    last = _shares(ax, x, y)[-1]
    return bool(np.any((last < 0) | (last > 1)))


def name_leaving(
    ax: Axes,
    lines: Mapping[str, tuple[np.ndarray, np.ndarray, str]],
    avoid: tuple[float, float] = (np.nan, np.nan),
) -> None:
    """Name those of the lines that end off the scale at the edge they leave by, with the value, in a laid-out panel.

    lines: name → x, y, colour. avoid: a place that is left free.
    """
    x, y = ax.transData.transform(avoid)
    taken = [Bbox.from_bounds(x - NAME, y - NAME, 2 * NAME, 2 * NAME)] if np.isfinite([x, y]).all() else []
    for name, (x, y, color) in lines.items():
        if not leaves(ax, x, y):
            continue
        shares = _shares(ax, x, y)
        place, last = _exit(shares), shares[-1]
        axis = int(abs(last[0] - 0.5) < abs(last[1] - 0.5))  # the one whose scale it leaves
        arrow = ("◂▸", "▾▴")[axis][int(last[axis] > 0.5)]
        label = f"{shortened(name)} {arrow} {number((x, y)[axis][-1])}"
        text = ax.text(
            place[0], place[1], label, color=_dark(color), transform=ax.transAxes,
            fontsize=NAME, ha=_side(place[0], "left", "right"), va=_side(place[1], "bottom", "top"), parse_math=False,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}, zorder=6,
        )  # fmt: skip
        taken.append(_clear(text, ax, taken))


def _shares(ax: Axes, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A line in shares of a panel [n, 2]; far below it what a logarithmic axis cannot show."""
    ax.autoscale_view()  # otherwise put off until it is drawn
    pixels = ax.transData.transform(np.column_stack([x, y]).astype(float))
    return np.nan_to_num(ax.transAxes.inverted().transform(pixels), nan=-1e9).clip(-1e9, 1e9)


def _dark(color: str) -> tuple[float, ...]:
    """A colour for text, which is thinner than a line."""
    return tuple(0.6 * part for part in matplotlib.colors.to_rgb(color))


def _side(share: float, low: str, high: str) -> str:
    return low if share < 0.15 else high if share > 0.85 else "center"


def _exit(points: np.ndarray) -> np.ndarray:
    """Where a line [n, 2] that ends outside the unit square leaves it for good, a point of its edge."""
    inside = np.flatnonzero(np.all((points >= 0) & (points <= 1), axis=1))
    if not len(inside):
        return points[-1].clip(0, 1)
    start, step = points[inside[-1]], points[inside[-1] + 1] - points[inside[-1]]
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(step > 0, (1 - start) / step, np.where(step < 0, -start / step, np.inf))
    return (start + shares.min() * step).clip(0, 1)


def _clear(text: Text, ax: Axes, taken: Sequence[Bbox]) -> Bbox:
    """Move a text up or down, away from what is taken, inside its panel; returns the place that it takes."""
    x, y = text.get_position()
    height = text.get_window_extent().height / ax.bbox.height
    for step in sorted(range(-20, 21), key=abs):
        text.set_position((x, y + step * height))
        own = text.get_window_extent()
        within = ax.bbox.y0 <= own.y0 and own.y1 <= ax.bbox.y1
        if within and not any(own.overlaps(other) for other in taken):
            return own
    text.set_position((x, y))
    return text.get_window_extent()
