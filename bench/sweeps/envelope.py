"""Which configurations of a method reach a gain at the least KL to the prior: the lower envelope of its trials.

A trial is a configuration, and each of its evaluations a point (gain, KL). The envelope at a gain g is the least KL of
all points that gain g or more; it has a corner at every point that no other one beats in both. Points with less than
`FLOOR` of the largest gain are left out: near the prior all configurations agree.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from bench.reporting.budgets import KL
from bench.reporting.envelopes import FLOOR, least_kl
from bench.reporting.statistics import student

TINY = 1e-12  # nats


class Point(NamedTuple):
    """An evaluation of a configuration: which one, its gain and its KL in nats, with the halves of their intervals."""

    configuration: int
    gain: float
    gain_interval: float
    kl: float
    kl_interval: float

    def clearly_beats(self, other: "Point") -> bool:
        """Gains as much at no more KL, and more or at less by more than both intervals, added in squares."""
        more = self.gain - other.gain > math.hypot(self.gain_interval, other.gain_interval)
        less = other.kl - self.kl > math.hypot(self.kl_interval, other.kl_interval)
        return self.gain >= other.gain and self.kl <= other.kl and (more or less)


def evaluations(rows: pd.DataFrame, metric: str) -> list[dict[str, float]]:
    """A trial's evaluations in order: `updates`, the `gain` of the metric over the prior, `kl`, and their intervals.

    An evaluation without one of these values is left out.
    """
    found = []
    for updates, own in rows.groupby("budget"):
        by_metric = own.set_index("metric")
        if {metric, KL} <= set(by_metric.index):
            gain, kl = by_metric.loc[metric], by_metric.loc[KL]
            reach = [one["standard_error"] * student(one["degrees"]) for one in (gain, kl)]
            values = [gain["difference"], reach[0], kl["value"], reach[1]]
            if not any(map(math.isnan, values)):
                names = ("gain", "gain_interval", "kl", "kl_interval")
                found.append({"updates": int(updates), **dict(zip(names, map(float, values), strict=True))})
    return found


def choose(trials: Sequence[Sequence[Mapping[str, float]]], most: int) -> tuple[list[int], list[float], list[int]]:
    """The configurations that make the envelope, at most so many; trials: `evaluations` of each configuration.

    One after the other is taken that lowers the envelope of those taken the most: the range of gains that it reaches,
    then the mean logarithm of its KL over that range, as the envelope of all trials has it. Returns their places, the
    one that holds the largest range of gains first, these ranges as shares, and the places of all others that have a
    point which no point of those taken clearly beats. Where nothing gains, the one that loses least is taken.
    """
    points = [
        Point(i, one["gain"], one["gain_interval"], one["kl"], one["kl_interval"])
        for i, trial in enumerate(trials)
        for one in trial
    ]
    top = max(point.gain for point in points)
    if top <= 0:
        return [max(points, key=lambda point: point.gain).configuration], [1.0], []
    points = [point for point in points if point.gain >= FLOOR * top]
    gains = np.array([corner.gain for corner in _corners(points)])
    widths = np.diff(gains, prepend=FLOOR * top) + 1e-9 * top  # a single corner counts too
    # what was measured alone: as points of runs of their own, nothing lies between them
    places = np.array([[point.gain, point.kl, number] for number, point in enumerate(points)])
    owners = np.array([point.configuration for point in points])
    least = np.array([least_kl(places[owners == i], gains) for i in range(len(trials))])  # [configurations, corners]

    def cost(several: list[int]) -> tuple[float, float]:
        kl = least[several].min(0)
        reached = np.isfinite(kl)
        return float(widths[~reached].sum()), float((widths * np.log(np.where(reached, kl, 1) + TINY)).sum())

    taken: list[int] = []
    while len(taken) < most and (not taken or (least[taken].min(0) > least.min(0)).any()):
        taken.append(min(set(range(len(trials))) - set(taken), key=lambda i: (*cost([*taken, i]), i)))
    holder = np.array(taken)[least[taken].argmin(0)]
    shares = {i: float(widths[holder == i].sum() / widths.sum()) for i in taken}
    taken.sort(key=lambda i: -shares[i])
    own = [point for point in points if point.configuration in taken]
    open_points = [point for point in points if not any(one.clearly_beats(point) for one in own)]
    tied = sorted({point.configuration for point in open_points} - set(taken))
    return taken, [shares[i] for i in taken], tied


def _corners(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats, from the smallest gain on."""
    corners: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.gain, point.kl)):
        if not corners or point.kl < corners[-1].kl:
            corners.append(point)
    return corners[::-1]
