"""Intervals over seeds, probabilities of improvement and performance profiles. Every interval is one of 95 %."""

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.optimize
import scipy.stats

CONFIDENCE = 0.95
MANY = 10  # seeds from which on tables print interquartile means
RESAMPLES = 2000


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


def student(degrees: float | np.ndarray) -> float | np.ndarray:
    """Standard errors on either side of a mean that its interval reaches, by Student's t."""
    return scipy.stats.t.ppf((1 + CONFIDENCE) / 2, degrees)


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
