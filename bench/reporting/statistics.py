"""Intervals over seeds, probabilities of improvement and performance profiles. Every interval is one of 95 %."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

CONFIDENCE = 0.95
MANY = 10  # seeds from which on tables print interquartile means
FEW = 5  # seeds; fewer cannot show how they scatter
RESAMPLES = 2000


class Scale(NamedTuple):
    """Where the intervals of a metric are symmetric.

    ends: of its values; forward: from them to the scale; slope: the derivative of that; back: from the scale.
    """

    ends: tuple[float, float]
    forward: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    back: Callable[[Any], Any]


SCALES = {  # by the metric's `support`
    "real": Scale((-np.inf, np.inf), np.positive, np.ones_like, np.positive),
    "positive": Scale((0.0, np.inf), np.log, lambda x: 1 / x, np.exp),
    "share": Scale((0.0, 1.0), scipy.special.logit, lambda x: 1 / (x * (1 - x)), scipy.special.expit),
}


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis: [..., n] → [...]."""
    return scipy.stats.trim_mean(values, 0.25, axis=-1)


def over_seeds(groups: Sequence[np.ndarray], robust: bool = False) -> np.ndarray:
    """Centre, low and high end of every group of values [n]: [G, 3]; the ends are NaN for a single value.

    The mean with Student's interval; if `robust`, the interquartile mean with a percentile bootstrap over seeds (the
    same draws for every group of one size, so that equal rows give equal tables).
    """
    ends = np.full((len(groups), 3), np.nan)
    sizes = np.array([len(values) for values in groups], dtype=int)
    for n in np.unique(sizes[sizes > 0]).tolist():
        places = np.flatnonzero(sizes == n).tolist()
        values = np.stack([groups[i] for i in places])
        ends[places, 0] = interquartile_mean(values) if robust else values.mean(1)
        if n == 1:
            continue
        if robust:
            # sorted places in sorted values are sorted draws, whose middle is a slice
            drawn = np.sort(np.random.default_rng(0).integers(n, size=(RESAMPLES, n)))[:, n // 4 : n - n // 4]
            tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
            for i, group in zip(places, np.sort(values), strict=True):
                ends[i, 1:] = np.quantile(group[drawn].mean(1), tails)
        else:
            reach = student(n - 1) * values.std(1, ddof=1) / n**0.5
            ends[places, 1:] = ends[places, :1] + np.stack([-reach, reach], 1)
    return ends


def on_scale(values: np.ndarray, support: str) -> np.ndarray | None:
    """Values [n] of a group on the scale of their support: [n], whose centre and spread give the group's interval.

    Positive values are their logarithms. Shares, and positive values with a zero among them, are expanded around their
    mean c, `g(c) + g'(c) (x − c)`, so that single values of exactly 0 or 1 do no harm. None where that is impossible:
    the mean is an end of the support, or too near to it for a number, or a value lies outside it.
    """
    (low, high), forward, slope, _ = SCALES[support]
    if support == "real" or not len(values):
        return values
    if support == "positive" and values.min() > 0:
        return np.log(values)
    mean = values.mean()
    if not low < mean < high or values.min() < low or values.max() > high:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        moved = forward(mean) + slope(mean) * (values - mean)
    return moved if np.isfinite(moved).all() else None


def intervals(groups: Sequence[np.ndarray], support: str, robust: bool = False) -> np.ndarray:
    """As `over_seeds`, on the scale of the support, so that no interval leaves it; [G, 3].

    Equal values, and those that have no place on the scale, are summarised as they are; so are all if `robust`, as a
    bootstrap never leaves the support.
    """
    moved = [None if robust or len(set(values)) < 2 else on_scale(values, support) for values in groups]
    ends = over_seeds([own if new is None else new for own, new in zip(groups, moved, strict=True)], robust)
    places = [i for i, new in enumerate(moved) if new is not None]
    ends[places] = SCALES[support].back(ends[places])
    return ends


def gaps(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], support: str, robust: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Centre and interval of x − y within seeds, for pairs of values [n] and [n] of the same seeds: [G, 3].

    Of positive values it is the difference of logarithms, unless one of them has none or `robust`; [G] tells whether it
    is. Differences of shares are plain: between logits near 1, three seeds find differences where there are none.
    """
    logs = support == "positive" and not robust
    scaled = np.array([logs and len(x) > 0 and min(x.min(), y.min()) > 0 for x, y in pairs], bool)
    moved = zip(scaled, pairs, strict=True)
    return over_seeds([np.log(x) - np.log(y) if log else x - y for log, (x, y) in moved], robust), scaled


def differences(pairs: Sequence[tuple[np.ndarray, np.ndarray]], support: str, robust: bool = False) -> np.ndarray:
    """The same in the metric's own unit, [G, 3]: what it adds to the centre of y, which never leaves the support."""
    low, high = SCALES[support].ends
    ends, scaled = gaps(pairs, support, robust)
    starts = intervals([y for _, y in pairs], support, robust)[:, 0]
    for i, (x, y) in enumerate(pairs):
        if scaled[i]:
            ends[i] = starts[i] * np.expm1(ends[i])
        elif len(x) and low <= min(x.min(), y.min()) and max(x.max(), y.max()) <= high:
            ends[i] = np.clip(ends[i], low - starts[i], high - starts[i])
    return ends


def around(value: np.ndarray, error: np.ndarray, degrees: np.ndarray, support: str) -> np.ndarray:
    """Interval of single values [n] with standard errors [n], on the scale of the support: low and high, [n, 2]."""
    (low, high), forward, slope, back = SCALES[support]
    inside, reach = (low < value) & (value < high), student(degrees) * error
    middle = np.where(inside, value, np.nan)
    ends = np.stack([back(forward(middle) + sign * slope(middle) * reach) for sign in (-1, 1)], 1)
    return np.where(inside[:, None], ends, value[:, None] + np.stack([-reach, reach], 1))


def student(degrees: float | np.ndarray, count: int = 1) -> float | np.ndarray:
    """Standard errors on either side of a mean that its interval reaches, by Student's t.

    count: of intervals that are to hold together (Bonferroni).
    """
    return scipy.stats.t.ppf((2 * count - 1 + CONFIDENCE) / (2 * count), degrees)


def paired_p(differences: np.ndarray) -> float:
    """p of Student's two-sided test that differences [n] have a mean of 0; NaN of fewer than two.

    Of equal ones it is 1 if they are 0, else 0.
    """
    if len(differences) < 2:
        return float("nan")
    if np.ptp(differences) == 0:
        return float(differences[0] == 0)
    return float(scipy.stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Values of p corrected for their number by Holm's method (1979), in the given order."""
    corrected, worst, count = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, place in enumerate(np.argsort(p_values).tolist()):
        worst = max(worst, min(1.0, (count - rank) * p_values[place]))
        corrected[place] = worst
    return corrected


def improvement(tasks: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """Probability that a run of X scores above one of Y, averaged over tasks, and its interval.

    tasks: values of X [n] and of Y [m] on each; a tie counts half (the Mann–Whitney statistic). The interval is
    Newcombe's (2006, method 5), which does not shrink to nothing where every x exceeds every y.
    """
    shares = [np.mean((x[:, None] > y) + 0.5 * (x[:, None] == y)) for x, y in tasks]
    share = float(np.mean(shares))
    z = scipy.stats.norm.ppf((1 + CONFIDENCE) / 2)

    def excess(p: float) -> float:
        scale = [
            (1 + ((len(x) + len(y)) / 2 - 1) * ((1 - p) / (2 - p) + p / (1 + p))) / x.size / y.size for x, y in tasks
        ]
        return (p - share) ** 2 - z**2 * p * (1 - p) * sum(scale) / len(tasks) ** 2

    low = scipy.optimize.brentq(excess, 0.0, share - 1e-9) if share > 0 else 0.0  # at 0 and 1 the share is a root too
    high = scipy.optimize.brentq(excess, share + 1e-9, 1.0) if share < 1 else 1.0
    return share, float(low), float(high)


def profile(tasks: Mapping[str, np.ndarray], levels: np.ndarray) -> np.ndarray:
    """Performance profile: the share of runs that score `levels` [L] or more, tasks counted equally; [L].

    tasks: normalised scores [n] on each.
    """
    return np.mean([(scores[:, None] >= levels).mean(0) for scores in tasks.values()], axis=0)
