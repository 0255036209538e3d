"""The least KL at every gain: envelopes of methods, and their ratios to one of them."""

from pathlib import Path

import numpy as np

from bench.reporting.budgets import KL
from bench.reporting.envelopes import FLOOR, GAINS, Group, comparisons, least_kl, reference
from bench.reporting.figures.drawing import drawing, legend, settle
from bench.reporting.figures.looks import looks
from bench.reporting.statistics import over_seeds

NOTE = "bands: left 95 % over seeds at each gain, where all seeds reach it; right 95 % for the whole curve"


def plot_envelopes(group: Group, path: Path) -> None:
    """Left the envelope of every method, its mean log KL over seeds; right its ratio to the `reference`, paired."""
    styles, best = looks(list(group.points)), reference(group)
    with drawing(path, (11.0, 4.2), f"{group.heading}: envelopes", NOTE) as figure:
        left, right = figure.subplots(1, 2)
        for name, seeds in group.points.items():
            top = min(points[:, 0].max() for points in seeds.values())
            if top <= 0:
                continue
            gains = np.linspace(FLOOR * top, top, GAINS)
            logs = np.log(np.stack([least_kl(points, gains) for points in seeds.values()]))
            centre, low, high = np.exp(over_seeds(list(logs.T))).T
            left.plot(gains, centre, color=styles[name].color, linewidth=1.6)
            left.fill_between(gains, low, high, color=styles[name].color, alpha=0.18, linewidth=0)
        for name, one in comparisons(group).items():
            if one:
                color = styles[name].color
                right.plot(one.gains, np.exp(one.ratio), color=color, linewidth=1.6)
                right.fill_between(one.gains, np.exp(one.low), np.exp(one.high), color=color, alpha=0.18, linewidth=0)
        right.axhline(1.0, color=styles[best].color, linewidth=1.0)
        left.set(yscale="log", xlabel=f"gain of {group.reward}", ylabel=f"{KL} [nats]")
        right.set(yscale="log", xlabel=f"gain of {group.reward}", ylabel=f"{KL} over that of {best}")
        legend(right, list(group.points), styles, right=True)
        settle(figure)
