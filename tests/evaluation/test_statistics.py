"""Intervals hold as often as they say, ties are no wins, probabilities and profiles are what their names say."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from bench.reporting.selection import standings, summary
from bench.reporting.statistics import improvement, interquartile_mean, over_seeds, profile


def test_student_below_ten_seeds_is_scipy_s() -> None:
    values = np.random.default_rng(0).normal(size=5)
    (found,) = over_seeds([values])
    low, high = scipy.stats.t.interval(0.95, 4, values.mean(), scipy.stats.sem(values))
    assert found == pytest.approx([values.mean(), low, high])
    assert np.isnan(over_seeds([values[:1]])[0, 1:]).all()
    assert len(over_seeds([])) == 0


def test_bootstrap_of_the_interquartile_mean_is_scipy_s() -> None:
    values = np.random.default_rng(0).exponential(size=12)
    (found,) = over_seeds([values], robust=True)
    own = scipy.stats.bootstrap(
        (values,),
        lambda x, axis: scipy.stats.trim_mean(x, 0.25, axis=axis),
        n_resamples=9000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found[0] == interquartile_mean(values)
    assert found[1:] == pytest.approx([own.low, own.high], rel=0.06)


@pytest.mark.parametrize(("n", "robust"), [(3, False), (5, False), (10, True)])
def test_intervals_of_normal_values_hold_in_95_of_100(n: int, robust: bool) -> None:
    values = np.random.default_rng(0).normal(size=(2000, n))
    ends = over_seeds(list(values), robust)
    held = np.mean((ends[:, 1] <= 0) & (ends[:, 2] >= 0))
    assert held == pytest.approx(0.95, abs=0.03 if robust else 0.015)


def test_probability_of_improvement() -> None:
    x, y = np.array([1.0, 2, 3]), np.array([0.0, 1, 2])
    share, low, high = improvement([(x, y)])
    assert share == pytest.approx(scipy.stats.mannwhitneyu(x, y).statistic / 9)
    assert 0 < low < share < high < 1
    assert improvement([(x, y)] * 4)[1] > low  # more settings, a shorter interval
    certain, low, high = improvement([(x + 9, y)])
    assert (certain, high) == (1.0, 1.0)
    assert 0.3 < low < 0.8
    assert improvement([(y, x + 9)]) == pytest.approx((0.0, 0.0, 1 - low))


def test_profiles_count_tasks_equally() -> None:
    found = profile({"a": np.array([0.2, 0.8, 0.8]), "b": np.array([1.0])}, np.array([0.0, 0.5, 0.9]))
    assert found == pytest.approx([1.0, (2 / 3 + 1) / 2, 0.5])


def table(values: dict[str, list[float]], error: float = np.nan) -> pd.DataFrame:
    rows = [
        {"row": name, "method": name, "metric": "m", "seed": seed, "value": value, "prior": 0.0, "difference": value}
        for name, own in values.items()
        for seed, value in enumerate(own)
    ]
    fixed = {"direction": "higher", "support": "real", "prior_is_best": False, "degrees": 11.0}
    return pd.DataFrame(rows).assign(standard_error=error, **fixed)


@pytest.mark.parametrize(
    ("values", "error", "marks"),
    [
        # differences within seeds: the second's is 0.1 in every seed, though the seeds differ by far more
        ({"a": [1.0, 5.0, 9.0], "b": [0.9, 4.9, 8.91], "c": [2.0, 4.0, 8.0]}, np.nan, {"a": "best", "c": "tie"}),
        ({"a": [3.0], "b": [2.0], "c": [0.0]}, 0.5, {"a": "best", "b": "tie"}),
        ({"a": [3.0], "b": [2.0]}, np.nan, {}),  # no error is known, so nothing is won
        ({"a": [3.0, 4.0], "b": [9.0]}, np.nan, {}),
        # on fewer seeds a mean is of other noise
        ({"a": [1.0, 5.0, 9.0], "b": [9.0, 9.5], "c": [0.5, 4.5, 8.51]}, np.nan, {"a": "best", "b": "tie"}),
    ],
)
def test_ties_are_no_wins(values: dict[str, list[float]], error: float, marks: dict[str, str]) -> None:
    rows = table(values, error)
    found = standings(rows, summary(rows), ["m"])
    assert {name: one.mark for (name, _), one in found.items() if one.mark} == marks
