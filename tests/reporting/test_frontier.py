"""The least KL at every gain: closed forms, exact sums, errors that hold, and what is refused."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from bench.reporting import frontier
from bench.reporting.frontier import EVERY, FILE, Frontier, FrontierError, best, best_kl, find, soft, tilt, trace


def normal(prompts: int, samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(prompts, samples))


def test_gaussian_rewards_cost_half_the_square_of_the_gain() -> None:
    """KL = gain² / 2σ², whatever the means; the errors are those that repetitions show."""
    rewards = 3 * normal(6, 4096) + np.array([[0.0], [50.0], [-9.0], [1.0], [2.0], [3.0]])
    curve = trace({"train": rewards}, {}).curve(EVERY)
    assert curve["kl"].is_monotonic_increasing
    assert curve["kl"].iloc[0] == curve["gain"].iloc[0] == 0
    assert curve["effective"].min() >= frontier.ENOUGH
    assert curve["effective"].iloc[-1] < 1.1 * frontier.ENOUGH  # it ends for want of samples
    np.testing.assert_allclose(curve["kl"][1:], curve["gain"][1:] ** 2 / 18, rtol=0.06)
    points = [tilt(normal(2, 512, seed), 0.8) for seed in range(300)]
    scores = [(point["kl"] - point["gain"] ** 2 / 2) / point["kl_error"] for point in points]
    assert 0.85 < np.std(scores) < 1.15
    assert abs(np.mean(scores)) < 0.3


def test_a_finite_prior_gives_exact_sums() -> None:
    values, shares, beta = np.array([-1.0, 0.5, 2.0]), np.array([0.5, 0.3, 0.2]), 0.7
    rewards = np.repeat(values, (10 * shares).astype(int))[None]
    target = shares * np.exp(beta * values)
    target /= target.sum()
    point = tilt(rewards, beta)
    assert point["gain"] == pytest.approx(target @ values - shares @ values)
    assert point["kl"] == pytest.approx(target @ np.log(target / shares))


@given(st.lists(st.floats(0.2, 4.0), min_size=2, max_size=2), st.floats(-0.9, 0.9))
@limits(max_examples=20, deadline=None)
def test_one_tilt_for_all_prompts_is_the_best_division(spreads: list[float], share: float) -> None:
    """Gaussian prompts: any other division of the same mean gain among them has more KL."""
    variances = np.array(spreads) ** 2
    gains = 0.5 * variances  # of the common tilt
    moved = gains + share * gains.min() * np.array([1, -1])
    rewards = np.sqrt(variances)[:, None] * normal(1, 40_000, seed=3)
    point = tilt(rewards, 0.5)
    assert (moved**2 / 2 / variances).mean() >= point["kl"] - 4 * point["kl_error"]


def test_the_best_of_n_is_the_mean_over_subsets_and_no_further_than_its_bound() -> None:
    rewards = np.sort(normal(2, 7))
    for n in (1, 2, 3, 7):
        exact = np.mean([[max(chosen) for chosen in itertools.combinations(own, n)] for own in rewards])
        assert best(rewards, n)["gain"] == pytest.approx(exact - rewards.mean())
        places = (np.arange(100_000) + 0.5) / 100_000
        ratio = n * places ** (n - 1)
        assert (ratio * np.log(ratio)).mean() == pytest.approx(best_kl(n), abs=1e-4)
    points = [best(np.sort(normal(2, 256, seed)), 8) for seed in range(300)]
    assert np.std([point["gain"] for point in points]) == pytest.approx(points[0]["gain_error"], rel=0.2)
    assert np.mean([point["gain"] for point in points]) == pytest.approx(1.4236, abs=0.02)  # of eight standard normals


def test_the_soft_best_lies_between_the_prior_and_the_best() -> None:
    rewards, n = np.sort(normal(2, 400)), 4
    points = [soft(rewards, n, beta) for beta in (1e-6, 0.5, 2.0, 1e3)]
    gains, kls = ([point[key] for point in points] for key in ("gain", "kl"))
    assert gains == sorted(gains)
    assert kls == sorted(kls)
    assert gains[0] == pytest.approx(0, abs=1e-5)
    assert gains[-1] == pytest.approx(best(rewards, n)["gain"], rel=0.05)
    assert kls[-1] <= best_kl(n)
    rng = np.random.default_rng(1)  # drawn and chosen as the method does
    own = rewards[0][rng.integers(400, size=(100_000, n))]
    chosen = (2.0 * own + rng.gumbel(size=own.shape)).argmax(1)
    drawn = own[np.arange(len(own)), chosen].mean() - rewards[0].mean()
    assert soft(rewards[:1], n, 2.0)["gain"] == pytest.approx(drawn, abs=0.02)


def test_a_curve_ends_where_it_is_no_longer_known() -> None:
    bounded = trace({"train": -np.abs(normal(1, 2000))}, {}).curve(EVERY)
    assert (bounded["kl_error"] <= frontier.CERTAIN * bounded["kl"])[1:].all()
    assert bounded["gain"].iloc[-1] < 0.8  # the most there can be
    assert len(trace({"train": np.ones((3, 200))}, {}).curve(EVERY)) == 1
    known = trace({"train": normal(3, 600)}, {})
    most = known.curve(EVERY)["gain"].max()
    assert known.least(np.array([-0.1, 0.0, most * 1.001, np.nan]))["kl"].isna().all()
    least = known.least(np.array([most / 2]))
    assert least["kl"][0] == pytest.approx(most**2 / 8, rel=0.2)
    assert 0 < least["error"][0] < 0.1


def test_splits_have_curves_and_all_prompts_one_together() -> None:
    own = trace({"train": normal(2, 400), "test": 3 * normal(2, 400)}, {})
    ends = {split: own.curve(split)["gain"].iloc[-1] for split in ("train", "test", EVERY)}
    assert ends["train"] < ends[EVERY] < ends["test"]
    assert np.isnan(own.soft_kl(3, 1.0))  # no curve of three
    assert 0 < own.soft_kl(4, 1.0) < best_kl(4)


SETTINGS = {"reward.name": "quadratic", "reward.beta": 0.5, "model.name": "ring", "sampler.steps": 20, "method.n": 8}


def rows(folder: Path, **changes: object) -> pd.DataFrame:
    text = json.dumps({**SETTINGS, **{key.replace("__", "."): value for key, value in changes.items()}})
    return pd.DataFrame({"settings": [text], "source": [str(folder / "run" / "rows.parquet")]})


def traced(samples: int = 200, **changes: object) -> Frontier:
    own = frontier.setting({**SETTINGS, **{key.replace("__", "."): value for key, value in changes.items()}})
    return trace({"train": normal(2, samples)}, own)


def test_a_report_finds_the_curve_of_its_setting(tmp_path: Path) -> None:
    frontier.write(tmp_path / FILE, [traced()])
    frontier.write(tmp_path / FILE, [traced(reward__width=3.0)])  # keeps the other
    frontier.write(tmp_path / "run" / FILE, [traced(400)])
    found = find(rows(tmp_path, reward__beta=9.0, method__n=3, optimizer__lr=1.0))
    assert found is not None
    assert found.samples == 400  # the one with the most
    pd.testing.assert_frame_equal(found.curve(EVERY), traced(400).curve(EVERY), rtol=1e-4, check_dtype=False)
    assert find(rows(tmp_path, reward__width=3.0)).samples == 200
    assert find(rows(tmp_path, evaluation__sampler__steps=10)) is None  # what is evaluated has another sampler
    assert find(rows(tmp_path, evaluation__sampler__steps=20)).samples == 400
    assert find(rows(tmp_path, evaluation__train_prompts=3)) is None
    assert find(rows(tmp_path / "elsewhere")) is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"setting": {}, "samples": 3, "points": {"kl": [1]}}]'])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text, encoding="utf8")
    if text == "{}":
        assert frontier.read(tmp_path / FILE) == []
        return
    with pytest.raises(FrontierError, match="delete it, and make it again with bench frontier"):
        find(rows(tmp_path))
