"""Intervals hold as often as they say, ties are no wins, probabilities and profiles are what their names say."""

import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.reporting.coverage import KINDS, Law, differ, held
from bench.reporting.standings import Standing, standings
from bench.reporting.statistics import (
    MANY,
    SCALES,
    around,
    differences,
    gaps,
    improvement,
    interquartile_mean,
    intervals,
    over_seeds,
    profile,
)
from bench.reporting.summary import learners, spreads, summary


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


VALUES = {
    "real": st.floats(-1e3, 1e3),
    "positive": st.floats(1e-9, 1e9) | st.just(0.0),
    "share": st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
}


@pytest.mark.parametrize("support", SCALES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_interval_leaves_the_values_that_a_metric_can_take(support: str, data: st.DataObject) -> None:
    low, high = SCALES[support].ends
    x, y = (np.array(data.draw(st.lists(VALUES[support], min_size=4, max_size=4))) for _ in range(2))
    with np.errstate(over="ignore"):  # an end of a thousand orders of magnitude is infinite
        ((centre, *ends),) = intervals([x], support)
        ((gap, *gap_ends),) = differences([(x, y)], support)
        before = intervals([y], support)[0, 0]
        single = around(x[:1], np.array([0.5]), np.array([3.0]), support)[0] if low < x[0] < high else []
    assert ends[0] - 1e-9 <= centre <= ends[1] + 1e-9
    assert all(low <= end <= high for end in (*ends, *single))
    assert gap_ends[0] - 1e-6 <= gap <= gap_ends[1] + 1e-6
    assert all(low - 1e-6 * before <= before + end <= high + 1e-6 for end in gap_ends)


def test_intervals_on_the_scale_are_those_of_logarithms_and_logits() -> None:
    x = np.array([1.0, 2.0, 8.0])
    assert intervals([x], "positive") == pytest.approx(np.exp(over_seeds([np.log(x)])))
    y = np.array([2.0, 3.0, 5.0])
    assert gaps([(x, y)], "positive")[0] == pytest.approx(over_seeds([np.log(x / y)]))
    assert differences([(x, y)], "positive")[0, 0] == pytest.approx(16 ** (1 / 3) - 30 ** (1 / 3))
    share = np.array([0.9, 0.95, 1.0])
    ((centre, low, high),) = intervals([share], "share")
    reach = scipy.stats.t.ppf(0.975, 2) * 0.05 / 3**0.5 / (0.95 * 0.05)
    assert (centre, low, high) == pytest.approx(
        (0.95, *scipy.special.expit(scipy.special.logit(0.95) + np.array([-reach, reach])))
    )
    plain = over_seeds([np.array([-1.0, 2.0, 3.0])])
    assert intervals([np.array([-1.0, 2.0, 3.0])], "positive") == pytest.approx(plain)  # declared wrongly: as if real
    assert intervals([np.ones(3)], "share").tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("normal", 0.02), ("lognormal, σ = 1, positive", 0.02), ("beta(20, 2), share", 0.03)]
)
def test_intervals_hold_on_the_scale_of_the_metric(kind: str, tolerance: float) -> None:
    """At 3, 5 and 10 seeds, and those that ignore the scale of lognormal values do not."""
    draw, support = KINDS[kind]
    rng = np.random.default_rng(0)
    law = Law(draw, support, draw(rng, (200_000,)))
    for n in (3, 5, 10):
        assert held(law, n, rng, 2000) == pytest.approx(0.95, abs=tolerance + 0.02 * (n >= MANY))
        assert differ(law, n, rng, 2000) < 0.09
    if support == "positive":
        assert held(law, 5, rng, 2000, plain=True) < 0.87


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


def standings_of(rows: pd.DataFrame) -> dict[tuple[str, str], Standing]:
    cells = summary(rows)
    return standings(rows, cells, ["m"], spreads(rows, cells))


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
    found = standings_of(rows)
    assert {name: one.mark for (name, _), one in found.items() if one.mark} == marks


def test_a_tie_is_tested_on_the_scale_of_the_metric() -> None:
    """17 [-21, 56] by Student's t of plain values is no tie with 0.008: every seed is a hundredfold."""
    rows = table({"a": [0.006, 0.008, 0.011], "b": [3.0, 13.0, 35.0]}).assign(direction="lower")
    plain = standings_of(rows)
    assert plain["b", "m"].mark == "tie"
    rows = rows.assign(support="positive")
    found = standings_of(rows)
    assert [found[name, "m"].mark for name in "ab"] == ["best", ""]
    assert found["b", "m"].gap == pytest.approx(np.log(3 * 13 * 35 / 0.006 / 0.008 / 0.011) / 3)
    low = summary(rows).loc[("b", "m"), "value_low"]
    assert 0 < low < 3


def with_gains(values: dict[str, list[float]], gains: dict[str, float], **changes: object) -> pd.DataFrame:
    """A metric at which the prior, at 10, is best, and the training reward's gains."""
    rows = table(values).assign(prior=10.0, prior_is_best=True, **changes)
    rows["difference"] = rows["value"] - 10
    reward = rows.assign(metric="reward/train", prior_is_best=False, direction="higher", prior=0.0)
    reward["difference"] = reward["value"] = reward["row"].map(gains) + 0.01 * reward["seed"]
    return pd.concat([rows, reward])


def test_doing_nothing_wins_nothing() -> None:
    """The lazy row keeps the prior best and has no mark; of those that learned, the one that lost least has."""
    values = {"lazy": [10.0, 10.1, 9.9], "good": [9.1, 9.0, 8.9], "wild": [3.0, 3.1, 2.9]}
    rows = with_gains(values, {"lazy": 0.1, "good": 4.0, "wild": 5.0})
    found = standings_of(rows)
    assert learners(rows, summary(rows)) == (["good", "wild"], pytest.approx(2.505))
    assert {name: one.mark for (name, _), one in found.items()} == {"good": "best", "wild": ""}
    rows = with_gains(values, dict.fromkeys(values, -1.0))
    assert standings_of(rows) == {}


@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_values_beyond_the_priors_are_equal_to_it(direction: str) -> None:
    sign = 1 if direction == "higher" else -1
    offsets = {"black": [5.0, 5.1, 4.9], "same": [0.1, 0.0, 0.2], "near": [-0.2, 0.1, -0.1], "far": [-4.0, -4.1, -3.9]}
    values = {name: [10 + sign * x for x in own] for name, own in offsets.items()}
    rows = with_gains(values, dict.fromkeys(values, 1.0), direction=direction)
    found = standings_of(rows)
    marks = {"black": "best", "same": "best", "near": "tie", "far": ""}
    assert {name: one.mark for (name, _), one in found.items()} == marks
    printed = summary(rows).loc[("near", "m"), ["difference", "difference_low", "difference_high"]]
    assert list(found["near", "m"][1:]) == pytest.approx(list(printed))
