"""What is advised is within the budget and the bound, and what rows do not tell is not."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import scipy.stats
from example_rows import PUBLISHED, chosen, row
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_answers import trained

from bench.errors import BenchError
from bench.reporting.advise import Advice, Ask, advise, of_setting
from bench.reporting.budgets import within
from bench.reporting.rows import write_rows
from bench.reporting.selection import collect, settings

METHODS = [*trained("a", 5.0, 40.0, 0.4), *trained("bb", 3.0, 5.0, 0.5)]  # gain, KL, diversity; 100 reward calls


def advice(*rows: dict, **ask: object) -> Advice:
    (found,) = advise(pd.DataFrame([*rows]), Ask(**({"axis": "reward_calls"} | ask)))
    return found


def test_a_run_stops_at_the_budget_or_the_bound_whichever_is_first() -> None:
    """a has the larger gain, but a KL of 12 after 30 % of its run."""
    assert list(advice(*METHODS, budget=100).tries) == ["a"]
    bounded = advice(*METHODS, budget=100, most_kl=12)
    assert list(bounded.tries) == ["bb"]
    lines = {line.name: dict(zip(bounded.board.columns, line.cells, strict=True)) for line in bounded.board.lines}
    assert lines["a"]["path_kl"].value == pytest.approx(12)
    assert lines["a"]["reward calls"].value == pytest.approx(30, rel=0.01)
    assert lines["a"]["reward/train"].from_prior
    assert lines["bb"]["reward calls"].value == pytest.approx(100)
    assert "Stopped where path_kl reaches 12 nats, some runs or all: a." in bounded.board.notes
    assert bounded.board.answers[0].startswith("bb gains most reward, +3.0 ")
    half = advice(*METHODS, budget=60, most_kl=12)
    assert half.tries["bb"][1] == 60  # updates; there is one reward call each
    assert json.loads(half.tries["bb"][0]) == json.loads(chosen())


def test_failed_runs_are_counted_and_rows_without_a_reward_are_advised_by_nothing() -> None:
    failed = {"metric": "run", "value": None, "difference": None, "status": "failed", "seed": 7, "run": "x"}
    notes = advice(*METHODS, METHODS[0] | failed, budget=100).board.notes
    assert "Failed runs are left out: 1 of a." in notes
    assert advice(*(one for one in METHODS if one["metric"] == "path_kl"), budget=100).board.lines


def test_differences_to_the_first_are_paired_and_corrected_by_holms_method() -> None:
    rows = [*METHODS, *trained("ccc", 4.9, 9.0, 0.5)]
    ends = pd.DataFrame([one for one in rows if one["budget"] == 100 and one["metric"] == "reward/train"])
    gains = ends.pivot(index="seed", columns="method", values="difference")
    p = {name: scipy.stats.ttest_rel(gains[name], gains["a"]).pvalue for name in ("bb", "ccc")}
    least, most = sorted(p, key=p.__getitem__)
    expected = {least: 2 * p[least], most: max(2 * p[least], p[most])}
    board = advice(*rows, budget=100).board
    assert board.columns[:2] == ("reward/train", "p (Holm)")
    assert [line.name for line in board.lines if line.n] == ["a", "ccc", "bb"]
    found = {line.name: line.cells[:2] for line in board.lines if line.name in p}
    assert {name: float(cells[1].text) for name, cells in found.items()} == pytest.approx(expected, rel=0.05)
    assert all((cells[0].mark == "tie") == (expected[name] >= 0.05) for name, cells in found.items())


def test_where_the_target_is_known_the_distance_to_it_ranks() -> None:
    """a gains more, but ends farther from the target."""
    distance = {"metric": "tilt_sw2", "direction": "lower", "support": "positive", "prior": 2.0}
    rewards = [one for one in METHODS if one["metric"] == "reward/train"]
    far = {"a": 1.0, "bb": 0.5}
    known = [
        one | distance | {"value": far[one["method"]] * (1 + one["seed"] / 50), "difference": -1.0} for one in rewards
    ]
    board = advice(*METHODS, *known, budget=100).board
    assert board.columns[0] == "tilt_sw2"
    assert [line.name for line in board.lines if line.n] == ["bb", "a"]
    assert board.answers[0].startswith("bb comes closest to the target, tilt_sw2 0.5")


def test_a_budget_of_reward_gradients() -> None:
    """Spent at half of the run; what needs none goes on to its end."""
    rows = [one | {"reward_gradients": one["reward_calls"] if one["method"] == "a" else 0} for one in METHODS]
    found = advice(*rows, budget=50, axis="reward_gradients").board
    spent = {line.name: dict(zip(found.columns, line.cells, strict=True)) for line in found.lines}
    assert (spent["a"]["reward calls"].value, spent["bb"]["reward calls"].value) == pytest.approx((50, 100))


def test_seconds_are_those_of_the_hardware_that_is_named() -> None:
    assert "Seconds on: cpu." in advice(*METHODS, budget=1000, axis="train_seconds").board.notes


def test_what_is_not_separated_is_to_be_tried_too() -> None:
    assert list(advice(*METHODS, *trained("ccc", 4.99, 9.0, 0.5), budget=100).tries) == ["a", "ccc"]


def test_nothing_is_advised_far_from_an_evaluation() -> None:
    """Of the KL as of the budget; one of several rows, or all of them."""
    found = advice(*METHODS, budget=100, most_kl=4).board
    texts = {line.name: line.cells[0].text for line in found.lines}
    assert texts["a"] == "path_kl jumps between 0 and 22"
    assert not found.lead
    found = advice(*METHODS, budget=20)
    assert found.board.lead == "Nothing is known of training within 20 reward calls."
    assert {line.cells[0].text for line in found.board.lines} == {"not evaluated between 0 and 50 reward calls"}
    assert not found.tries


def test_a_budget_that_no_run_reaches_is_told_on_top() -> None:
    shorter = trained("ccc", 4.0, 5.0, 0.5, calls=30)
    found = advice(*METHODS, *shorter, budget=1000).board
    assert found.lead.startswith("No run here reaches 1,000 reward calls: the most is 100, of a. ")
    found = advice(*METHODS, *shorter, budget=100).board
    assert not found.lead
    assert "Ended before the budget, so what more would give is not known: ccc (at 30)." in found.notes


def test_methods_without_the_rewards_gradient() -> None:
    rows = METHODS + [one | {"reward_gradients": 0} for one in trained("ccc", 1.0, 5.0, 0.5)]
    assert [line.name for line in advice(*rows, budget=100, gradient=False).board.lines if line.n] == ["ccc"]
    assert advise(pd.DataFrame(METHODS), Ask(100, "nfe", gradient=False)) == []


def test_a_kl_that_nobody_measured_is_within_no_bound() -> None:
    rows = [one for one in METHODS if (one["method"], one["metric"]) != ("bb", "path_kl")]
    assert {line.name: line.cells[0].text for line in advice(*rows, budget=100, most_kl=15).board.lines}["bb"] == (
        "path_kl is not known"
    )


def test_selection_without_training_stands_beside_as_far_as_it_is_within_the_bounds() -> None:
    """Eight draws: a KL of log 8 − 7/8 = 1.2 nats, and eight reward calls for every finished sample."""
    options = chosen(method__n=8, sampler__steps=20, sampler__guidance=1.0)
    free = {"updates": 0, "budget": 0, "reward_calls": 0, "method": "best_of_n", "settings": options, "value": 39.0}
    rows = [*METHODS, *(row(seed=seed, **free | {"difference": 9.0}) for seed in range(5))]
    found = advice(*rows, budget=100, most_kl=10)
    assert list(found.tries) == ["bb", "best_of_n"]
    assert found.board.answers[-1] == (
        "Without training best_of_n gains +9 at a KL between samples of at most 1.2 nats, for 160 NFE and 8 reward "
        "calls per finished sample; 100 reward calls make 12 samples."
    )
    assert "best_of_n" not in {line.name for line in found.board.lines}
    for out in ({"budget": 100, "most_kl": 1.1}, {"budget": 150, "axis": "nfe"}):
        assert "best_of_n" not in advice(*rows, **out).tries


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    return collect([PUBLISHED / name for name in ("emoji", "emoji_flow")])[0]


@hypothesis_settings(max_examples=12, deadline=None, derandomize=True)
@given(st.sampled_from(["reward_calls", "nfe", "updates"]), st.floats(0.01, 3), st.none() | st.floats(0.5, 500))
def test_no_run_exceeds_what_was_asked_for(published, axis: str, share: float, most_kl: float | None) -> None:
    """Of published rows; what is left out has a reason, and none is in both."""
    for _, rows in settings(published):
        budget = share * rows[axis].max()
        chosen_rows, missing, _ = within(rows, axis, budget, most_kl)
        assert (chosen_rows[axis] <= budget * (1 + 1e-9)).all()
        kl = chosen_rows.loc[chosen_rows["metric"] == "path_kl", "value"].dropna()
        assert (kl <= (most_kl or float("inf")) * (1 + 1e-9)).all()
        assert set(chosen_rows["row"]) | set(missing) == set(rows["row"])
        assert not set(chosen_rows["row"]) & set(missing)


def test_a_prior_or_a_reward_that_has_no_rows_is_an_error() -> None:
    frame = pd.DataFrame(METHODS)
    assert len(of_setting(frame, "emoji", "emoji_clip")) == len(frame)
    with pytest.raises(BenchError, match=r"no rows have the prior 'emoj'; did you mean 'emoji'\? Known: emoji\."):
        of_setting(frame, "emoj", None)
    with pytest.raises(BenchError, match=r"no rows with the prior emoji have the reward 'hps'\. Known: emoji_clip\."):
        of_setting(frame, "emoji", "hps")


@pytest.mark.slow
def test_the_command_prints_commands_that_run(tmp_path: Path, bench: Callable[..., tuple[int, str]]) -> None:
    """Published rows and one's own in one ranking; the rate is that of the row, the updates those of the bound."""
    frame = collect([PUBLISHED / "emoji"])[0]
    own = frame[(frame["method"] == "adjoint_matching") & frame["metric"].isin(["reward/train", "path_kl"])]
    text = own["settings"].iloc[0].replace("adjoint_matching", "my_method")
    own = own.assign(method="my_method", settings=text, run="mine").drop(columns=["schema", "source"])
    write_rows(tmp_path / "rows.parquet", own.to_dict("records"))
    ask = ("--budget", 500, "--max-kl", 20, "--prior", "emoji", "--reward", "emoji_style")
    status, text = bench("advise", tmp_path, *ask)
    assert status == 0, text
    assert "adjoint_matching gains most reward" in text
    assert "not separated: my_method" in text
    assert "no command for my_method: unknown method" in text  # whose package is not here
    commands = [line for line in text.splitlines() if line.startswith("bench run ")]
    assert [line.split()[2] for line in commands] == ["adjoint_matching", "best_of_n"]
    assert "--updates 12 --set optimizer.lr=0.002" in commands[0]
    for line in commands:
        status, shown = bench(*shlex.split(line)[1:], "--dry-run")
        assert status == 0, shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--budget", 0), "--budget 0: a finite number above 0 is wanted."),
        (("--budget", 5, "--max-kl", "nan"), "--max-kl nan: a finite number above 0 is wanted."),
        (("--budget", 5, "nowhere"), "there is no file or folder nowhere"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(words, said, bench: Callable[..., tuple[int, str]]) -> None:
    status, text = bench("advise", *words)
    assert status == 2
    assert said in text
