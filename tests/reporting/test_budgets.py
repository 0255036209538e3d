"""Comparing at equal cost and at an equal gain."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from example_rows import board, budgets, chosen, row

from bench.reporting.budgets import at
from bench.reporting.formats import markdown
from bench.reporting.leaderboard import leaderboard
from bench.reporting.rows import write_rows
from bench.reporting.selection import settings


def test_limits_have_the_names_of_columns(tmp_path: Path, bench: Callable[..., tuple[int, str]]) -> None:
    """NFE has one; what was written with its former name still runs."""
    for name, rows in budgets().groupby("run"):
        (tmp_path / str(name)).mkdir()
        write_rows(tmp_path / str(name) / "rows.parquet", rows.to_dict("records"))
    for option in ("--at-nfe", "--at-network-rows"):
        status, text = bench("report", tmp_path, option, 12_000, "--format", "md")
        assert status == 0, text
        assert ", at 12,000 NFE\n" in text
        assert "| cheap | **2** [-5, 8] (+1) | 12,000 | 2000 | 100 |" in text
    assert "network" not in bench("report", "--help")[1]


@pytest.mark.parametrize(
    ("axis", "limit", "expected", "near"),
    [
        (None, 0, {"cheap": 4.0, "dear": 4.0, "best_of_n": 9.0}, ""),
        ("updates", 20, {"cheap": 2.0, "dear": 2.0, "best_of_n": 9.0}, ""),
        ("updates", 30, {"cheap": 3.0, "dear": 3.0, "best_of_n": 9.0}, ""),
        ("reward_calls", 400, {"cheap": 4.0, "dear": 2.0, "best_of_n": 9.0}, ""),
        ("reward_calls", 100, {"cheap": 1.0, "dear": 0.5, "best_of_n": 9.0}, ""),  # half way from the prior
        ("reward_calls", 850, {"dear": 4.0, "best_of_n": 9.0}, "dear"),  # it ends at 800, and cheap at 400
        ("nfe", 12_000, {"cheap": 1.0, "dear": 1.0, "best_of_n": 9.0}, ""),
        ("train_seconds", 60, {"cheap": 0.5, "dear": 0.5, "best_of_n": 9.0}, ""),
        ("reward/train", 3.0, {"cheap": 3.0, "dear": 3.0}, ""),
    ],
)
def test_comparison_at_equal_cost(axis: str | None, limit: float, expected: dict[str, float], near: str) -> None:
    ((_, rows),) = settings(budgets())
    found, missing, told = at(rows, axis, limit)
    means = found[found["metric"] == "reward/train"].groupby("method")["difference"].mean().to_dict()
    assert means == pytest.approx(expected)
    assert {name: one.why for name, one in missing.items()} == ({"cheap": "ends at 400"} if near else {})
    from_prior = ["‡ Interpolated between the prior and a run's first evaluation."] * (limit in (100, 60))
    assert told == from_prior + [f"Up to 10% short of this cost, and read off at their end: {near}."] * bool(near)
    if axis in ("updates", "reward_calls") and not near:
        assert set(found.loc[found["updates"] > 0, axis]) == {limit}


def test_at_an_equal_gain_all_else_is_interpolated_within_a_run() -> None:
    """Half way between two evaluations lie half of their diversity, cost and error; the floor stays."""
    frame = budgets()
    frame = pd.concat([frame, *(frame.assign(metric=name, value=v, prior=p) for name, v, p in (
        ("path_kl", frame["updates"] / 4.0, 0.0), ("fid_prior/space/floor", 65.0, np.nan)
    ))])  # fmt: skip
    ((_, rows),) = settings(frame)
    found, _, _ = at(rows, "reward/train", 3.0)
    assert set(found["updates"]) == {30.0}
    own = found[found["method"] == "dear"].groupby("metric")["value"].first()
    assert own["path_kl"] == pytest.approx(30 / 4)
    assert own["fid_prior/space/floor"] == 65.0
    assert set(found.loc[found["method"] == "dear", "reward_calls"]) == {600.0}
    shown = leaderboard(rows, axis="reward/train", limit=3.0)
    costs = ("updates", "NFE", "backward NFE", "reward calls", "reward gradients", "training time")
    assert shown.columns == ("path_kl", *costs)
    marks = {line.name: line.cells[4].mark for line in shown.lines if line.n}
    assert marks == {"cheap": "best", "dear": ""}  # 300 reward calls against 600


def test_a_gain_that_is_not_reached_is_told() -> None:
    frame = budgets()
    frame.loc[(frame["method"] == "dear") & (frame["seed"] == 1), ["value", "difference"]] = 0.5
    ((_, rows),) = settings(frame)
    _, missing, told = at(rows, "reward/train", 2.0)
    assert not missing
    assert told == ["Not reached by all seeds, and values are of those that did: dear (1 of 2)."]
    _, missing, _ = at(rows, "reward/train", 9.0)
    assert {name: one.why for name, one in missing.items()} == dict.fromkeys(("cheap", "dear"), "never, at most +4")
    shown = leaderboard(rows, axis="reward/train", limit=9.0)
    assert [(line.name, line.cells[0].text, line.n) for line in shown.lines] == [
        ("cheap", "never, at most +4", "0"),
        ("dear", "never, at most +4", "0"),
    ]
    assert shown.lead == "No run here reaches a reward gain of +9: the most is +4, of cheap."


def test_a_table_at_a_cost_has_no_values_of_runs_that_end_before_it_and_says_so_on_top() -> None:
    """Of some rows, of all; a row of which one run ends earlier is none of those that got there."""
    ((_, rows),) = settings(budgets())
    some = leaderboard(rows, axis="reward_calls", limit=700)
    assert some.lead == "1 of 2 trained rows have no values here, as runs of theirs end before 700 reward calls."
    found = {line.name: line.cells[0] for line in some.lines}
    assert (found["cheap"].text, found["dear"].value) == ("ends at 400", 4.0)
    none = leaderboard(rows, axis="nfe", limit=1e6, title="T")
    assert none.lead == "No run here reaches 1,000,000 NFE: the most is 48,000, of cheap."
    assert [line.name for line in none.lines if pd.notna(line.cells[0].value) and line.n] == ["best_of_n"]
    assert markdown(none).startswith(none.lead)
    assert leaderboard(rows, axis="reward_calls", limit=400).lead == ""
    frame = budgets()
    ((_, rows),) = settings(frame[(frame["seed"] == 0) | (frame["budget"] < 40) | (frame["method"] == "cheap")])
    shown = leaderboard(rows, axis="reward_calls", limit=700)
    assert {line.name: line.cells[0].text for line in shown.lines}["dear"] == "1 of 2 runs end before"
    assert shown.lead == "2 of 2 trained rows have no values here, as runs of theirs end before 700 reward calls."


def test_best_of_n_is_charged_per_finished_sample() -> None:
    """Eight draws of 20 guided steps, in whatever sampler the evaluation has."""
    options = {"method__n": 8, "sampler__steps": 10, "sampler__guidance": 3.0, "evaluation__sampler__steps": 20}
    free = {"updates": 0, "budget": 0, "reward_calls": 0, "method": "best_of_n", "settings": chosen(**options)}
    shown = board(row(), row(**free))
    cells = dict(zip(shown.columns, next(line for line in shown.lines if line.name == "best_of_n").cells, strict=True))
    assert (cells["NFE"].text, cells["reward calls"].text) == ("320 per sample", "8 per sample")
    assert np.isnan(cells["NFE"].value)
    assert any("320 NFE and 8 reward calls; of a trained model it takes 40 NFE" in note for note in shown.notes)
    unguided = chosen(**options | {"sampler__guidance": 1.0, "evaluation__sampler__steps": None})
    shown = board(row(), row(**free | {"settings": unguided}))
    assert "| 80 per sample | 2000 | 8 per sample |" in markdown(shown)


def test_nothing_is_interpolated_far_from_an_evaluation() -> None:
    """The first evaluation has five times the gain: its cost is a bound, and nobody's cost is marked as least."""
    frame = budgets()
    early = (frame["method"] == "cheap") & (frame["budget"] == 10)
    frame.loc[early, "difference"] = 2.5  # asked for 0.5
    frame.loc[early & (frame["seed"] == 0), "difference"] = 0.9  # one seed near enough does not speak for the row
    ((_, rows),) = settings(frame)
    found, missing, told = at(rows, "reward/train", 0.5)
    assert set(found["method"]) == {"dear"}
    assert set(found["from_prior"]) == {True}
    assert missing["cheap"].why == "passed before its first evaluation"
    assert missing["cheap"].costs == {
        "updates": "< 10", "reward calls": "< 100", "NFE": "< 12,000", "training time": "< 120",
        "reward gradients": "< 960", "backward NFE": "< 2,000",
    }  # fmt: skip
    assert any(note.startswith("< and –") for note in told) and any(note.startswith("‡") for note in told)
    lines = markdown(leaderboard(rows, axis="reward/train", limit=0.5)).splitlines()
    assert lines[3].startswith("| dear | 5 ‡ | 6000 ‡ | 1000 ‡ | 100 ‡ | 480 ‡ | 60 ‡ | 2 † |")
    assert lines[4] == "| cheap | passed before its first evaluation | < 12,000 | < 2,000 | < 100 | < 960 | < 120 | 2 |"
    frame.loc[(frame["method"] == "dear") & (frame["budget"] == 40), "difference"] = 40.0  # from 2, and asked for 9
    frame = frame[(frame["method"] == "dear")]
    ((_, rows),) = settings(frame)
    _, missing, _ = at(rows, "reward/train", 9.0)
    assert missing["dear"].costs["updates"] == "20 – 40"
    _, missing, _ = at(rows, "reward_calls", 60.0)
    assert missing["dear"].why == "not evaluated between 0 and 200"
