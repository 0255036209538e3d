"""The least KL at every gain: envelopes of methods, and their ratios to one of them."""

from pathlib import Path

from bench.reporting.budgets import KL
from bench.reporting.envelopes import Group, curves, ratios, reference
from bench.reporting.figures.drawing import drawing, legend, settle
from bench.reporting.figures.looks import looks
from bench.reporting.frontier import EVERY

NOTE = "bands: left 95 % over seeds at each gain, where all seeds reach it; right 95 % for the whole curve"
LEAST = "; black: the least KL of all distributions"


def plot_envelopes(group: Group, path: Path) -> None:
    """Left the envelope of every method, its mean log KL over seeds; right its ratio to the `reference`, paired."""
    styles, best = looks(list(group.points)), reference(group)
    with drawing(
        path, (11.0, 4.2), f"{group.heading}: envelopes", NOTE + LEAST * (group.frontier is not None)
    ) as figure:
        left, right = figure.subplots(1, 2)
        for ax, lines in ((left, curves(group)), (right, ratios(group))):
            for name, line in lines.items():
                color = styles[name].color
                ax.plot(line["gain"], line["value"], color=color, linewidth=1.6)
                ax.fill_between(line["gain"], line["low"], line["high"], color=color, alpha=0.18, linewidth=0)
        if group.frontier is not None:
            least = group.frontier.curve(EVERY).iloc[1:]  # the first is no gain, at no KL
            left.plot(least["gain"], least["kl"], color="black", linewidth=1.2)
        right.axhline(1.0, color=styles[best].color, linewidth=1.0)
        left.set(yscale="log", xlabel=f"gain of {group.gained}", ylabel=f"{KL} [nats]")
        right.set(yscale="log", xlabel=f"gain of {group.gained}", ylabel=f"{KL} over that of {best}")
        legend(right, list(group.points), styles, right=True)
        settle(figure)
