"""Critical-difference diagram: mean ranks over settings, and which methods are not separated."""

from pathlib import Path

from bench.reporting.figures.drawing import INK, drawing
from bench.reporting.figures.looks import looks
from bench.reporting.plots import shortened
from bench.reporting.ranks import Ranks


def plot_ranks(found: Ranks, path: Path, title: str = "") -> None:
    """A dot for a method's mean rank, the best on top; a bar right of the panel joins what is not separated."""
    means, groups = found.means, found.groups()
    styles = looks([str(name) for name in means.index])
    place = {name: -i for i, name in enumerate(means.index)}
    size = 6.5 + 0.12 * len(groups), 1.8 + 0.24 * len(means)
    note = "bars right join methods that Nemenyi's test (95 %) does not separate; top: its critical distance"
    with drawing(path, size, title, note) as figure:
        ax = figure.subplots()
        for name, mean in means.items():
            look = styles[str(name)]
            ax.plot(mean, place[name], look.marker, color=look.color, markersize=6)
        ax.set_yticks(list(place.values()), [shortened(str(name)) for name in place], parse_math=False)
        ax.set(xlabel=f"mean rank over {found.table.shape[1]} settings", ylim=(0.8 - len(means), 2.2))
        left = means.min()
        ax.errorbar(left + found.distance / 2, 1.2, xerr=found.distance / 2, color=INK, capsize=4, linewidth=1.5)
        ax.text(left, 1.4, f"critical distance {found.distance:.3g}", fontsize=8, va="bottom")
        across = ax.get_yaxis_transform()
        for i, group in enumerate(groups):
            ends = place[group[0]] + 0.3, place[group[-1]] - 0.3
            ax.plot([1.03 + 0.03 * i] * 2, ends, color=INK, linewidth=3, transform=across, clip_on=False)
