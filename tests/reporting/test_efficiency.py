"""Efficiency: KL over the least KL at the same gain, where both are known."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bench.reporting.efficiency import BEYOND, EFFICIENCY, NO_GAIN, with_efficiency
from bench.reporting.frontier import EVERY, Frontier, best_kl, trace
from bench.reporting.leaderboard import leaderboard
from bench.reporting.summary import summary

SPREAD = 2.0


@pytest.fixture(scope="module")
def known() -> Frontier:
    """Of Gaussian rewards of deviation 2, six prompts: gain² / 8."""
    return trace({"train": SPREAD * np.random.default_rng(0).normal(size=(6, 4000))}, {})


def measured(name: str, seed: int, kl: float | None, **gains: float) -> list[dict[str, Any]]:
    """The rows of a run; gains: split → gain. Training prompts are twice as many as others."""
    one = {
        "row": name, "method": name, "seed": seed, "status": "ok", "prior": 0.0, "degrees": 9.0, "n": 60, "unit": "",
        "direction": "higher", "support": "real", "prior_is_best": False, "note": "", "metric_version": 1, "beta": 1.0,
        "settings": json.dumps({"method.n": 8, "sampler.steps": 20, "sampler.guidance": 1.0}), "run": f"{name}{seed}",
        "updates": 5, "budget": 5, "reward_calls": 1, "reward_gradients": 0, "nfe": 9, "train_seconds": 1.0,
        "network_forwards": 9, "network_backwards": 0, "wall_seconds": 1.0,
    }  # fmt: skip
    rows = [
        one | {"metric": f"reward/{split}", "value": x, "difference": x, "standard_error": 0.02, "n": n}
        for (split, x), n in zip(gains.items(), (60, 30), strict=False)
    ]
    kind = {"direction": "lower", "support": "positive", "prior_is_best": True, "standard_error": 0.01}
    status = "refused" if kl is None else "ok"
    return [*rows, one | kind | {"metric": "path_kl", "value": kl, "difference": kl, "status": status}]


def test_it_is_the_ratio_at_the_gain_on_all_prompts(known: Frontier) -> None:
    rows = pd.DataFrame(measured("a", 0, 0.6, train=1.2, test=0.6) + measured("b", 0, 0.125, train=1.0))
    found, texts = with_efficiency(rows, known)
    assert texts == {}
    values = found[found["metric"] == EFFICIENCY].set_index("row")
    assert values["value"]["a"] == pytest.approx(0.6 / (1.0**2 / 8), rel=0.03)  # (2 · 1.2 + 0.6) / 3 gained
    assert values["value"]["b"] == pytest.approx(1.0, rel=0.03)
    relative = values["standard_error"]["b"] / values["value"]["b"]  # KL 8 %, gain 2 % and its square 4 %
    assert relative == pytest.approx(np.hypot(0.08, 0.04), rel=0.05)


def test_the_curves_own_error_is_in_the_interval(known: Frontier) -> None:
    runs = [row for seed in range(4) for row in measured("a", seed, 0.25 + 0.001 * seed, train=1.0)]
    found, _ = with_efficiency(pd.DataFrame(runs), known)
    own = summary(found).loc[("a", EFFICIENCY)]
    error = known.least(np.array([1.0]))["error"][0]
    assert np.log(own["value_high"] / own["value"]) == pytest.approx(1.96 * error, rel=0.15)
    assert np.log(own["value"] / own["value_low"]) == pytest.approx(1.96 * error, rel=0.15)


def test_what_is_not_known_is_said(known: Frontier) -> None:
    far = known.curve(EVERY)["gain"].max() + 1
    runs = [row for seed in range(3) for row in measured("far", seed, 9.0, train=far if seed else far - 1.5)]
    runs += [row for seed in range(3) for row in measured("worse", seed, 0.5, train=seed - 1.0)]
    runs += [row for seed in range(3) for row in measured("well", seed, 0.5, train=1.0)]
    frame = pd.DataFrame(runs + measured("unknown", 0, None, train=1.0))
    board = leaderboard(frame, frontier=known)
    place = board.columns.index(EFFICIENCY)
    assert board.columns[place - 1] == "path_kl"
    cells = {line.name: line.cells[place] for line in board.lines}
    assert (cells["far"].text, cells["worse"].text) == (BEYOND, NO_GAIN)
    assert cells["well"].value == pytest.approx(4.0, rel=0.03)
    assert np.isnan(cells["unknown"].value)
    assert any(note.startswith("efficiency: path_kl over the least KL") for note in board.notes)
    assert EFFICIENCY not in leaderboard(frame).columns  # without a curve


def test_selections_have_a_bound_in_the_place_of_a_path_kl(known: Frontier) -> None:
    runs = pd.DataFrame(measured("well", 0, 0.5, train=1.0))
    free = [row for name in ("best_of_n", "soft_best_of_n") for row in measured(name, 0, None, train=2.0)]
    board = leaderboard(pd.concat([runs, pd.DataFrame(free).assign(updates=0, budget=0)]), frontier=known)
    at = {name: board.columns.index(name) for name in ("path_kl", EFFICIENCY)}
    cells = {line.name: line.cells for line in board.lines}
    assert cells["best_of_n"][at["path_kl"]].text == f"≤ {best_kl(8):.3g}"
    bound = float(cells["best_of_n"][at[EFFICIENCY]].text.removeprefix("≤ "))
    assert bound == pytest.approx(best_kl(8) / (2.0**2 / 8), rel=0.05)
    soft = float(cells["soft_best_of_n"][at["path_kl"]].text.removeprefix("≤ "))
    assert soft == pytest.approx(known.soft_kl(8, 1.0), rel=0.01)
    assert soft < best_kl(8)
