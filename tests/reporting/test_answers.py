"""The sentences below a table say what its numbers say."""

import re
from typing import Any

import pandas as pd
import pytest
from example_rows import PUBLISHED, row

from bench.reporting.answers import answers
from bench.reporting.formats import latex, markdown
from bench.reporting.leaderboard import Board, leaderboard
from bench.reporting.report import Question, sections
from bench.reporting.selection import collect, settings

NOISE = (-0.1, 0.0, 0.1, -0.05, 0.05)  # of the seeds: their gains differ by so much, and a little by method


def trained(method: str, gain: float, kl: float, diversity: float, calls: int = 100, seeds: int = 5) -> list[dict]:
    """Runs with two evaluations, half the gain at half the cost; every cost is in proportion to `calls`."""
    rows = []
    for seed, noise in zip(range(seeds), NOISE, strict=False):
        for share in (0.5, 1.0):
            cost = {"updates": int(100 * share), "budget": int(100 * share), "reward_calls": int(calls * share)}
            cost |= {"network_forwards": int(10 * calls * share), "network_backwards": 0, "seed": seed}
            own = {"method": method, "run": f"{method}{seed}", **cost}
            up = share * gain * (1 + noise * (1 + 0.1 * len(method)))
            rows.append(row(value=30 + up, difference=up, **own))
            bound = {"support": "positive", "prior_is_best": True}
            there = {"metric": "path_kl", "unit": "nats", "direction": "lower", "prior": 0.0}
            rows.append(row(value=share * kl * (1 + noise), difference=share * kl, **own, **there, **bound))
            less = {"metric": "diversity/space", "prior": 0.5 + noise / 50}
            value = diversity + noise / 50 * (1 + 0.1 * len(method))
            rows.append(row(value=value, difference=value - less["prior"], **own, **less, **bound))
    return rows


def table(*methods: list[dict[str, Any]], **options: Any) -> Board:
    ((_, rows),) = settings(pd.DataFrame([one for rows in methods for one in rows]))
    return leaderboard(rows, **options)


def test_a_winner_its_tie_and_the_others() -> None:
    methods = trained("a", 5.0, 40.0, 0.40), trained("bb", 4.99, 10.0, 0.45), trained("ccc", 3.0, 2.0, 0.5)
    assert answers(table(*methods)) == (
        "a gains most reward, +5.0 [+4.5, +5.5], at a KL of 40 nats; not separated: bb (+5.0, KL 10.0); 1 other gains "
        "significantly less.",
        "Diversity is highest with ccc (0.500, gain +3.0); significantly lower: a (0.4000, gain +5.0), bb (0.4500, "
        "gain +5.0); the prior has 0.5000.",
    )


def test_at_an_equal_gain() -> None:
    """The KL, the diversity and the costs there; who never gets there; who does not differ."""
    methods = trained("a", 5.0, 40.0, 0.4), trained("bb", 5.0, 10.0, 0.5), trained("ccc", 5.0, 10.01, 0.5, 400)
    board = table(*methods, trained("dddd", 1.0, 5.0, 0.5, 10), axis="reward/train", limit=4.0)
    assert answers(board, board, 4.0) == (
        "At a gain of +4 the KL is lowest with bb, 8.01 [7.85, 8.17] nats; not separated: ccc (8.02); significantly "
        "higher: a (32.0).",
        "At a gain of +4 diversity is highest with bb (0.5000); not separated: ccc (0.500); significantly lower: a "
        "(0.4000); the prior has 0.5000.",
        "A gain of +4 is reached first in NFE by a (802), not separated from bb (803); in reward calls by a (80), not "
        "separated from bb (80); never by dddd.",
    )


def test_nobody_reaches_the_gain() -> None:
    board = table(trained("a", 5.0, 40.0, 0.4), trained("bb", 4.0, 1.0, 0.4), axis="reward/train", limit=9.0)
    assert answers(board, board, 9.0) == ("No run here reaches a reward gain of +9: the most is +5.55, of a.",)


def test_bounds_of_a_cost_are_told_if_they_may_be_less() -> None:
    """b passes the gain long before its first evaluation, c between two of which the first is dearer than all of a."""
    methods = trained("a", 1.2, 40.0, 0.4), trained("bb", 50.0, 10.0, 0.5), trained("ccc", 50.0, 10.0, 0.5, 10_000)
    for one in methods[2]:
        if one["budget"] == 50 and one["metric"] == "reward/train":
            one |= {"value": 30.1, "difference": 0.1}
    board = table(*methods, axis="reward/train", limit=1.0)
    (*_, first) = answers(board, board, 1.0)
    assert re.match(
        r"A gain of \+1 is reached first in NFE by a \(8\d\d\), unless by bb \(< 500\); in reward calls by a \(8\d\), "
        r"unless by bb \(< 50\)\.$",
        first,
    ), first


def test_one_method_and_one_seed() -> None:
    (most, diversity) = answers(table(trained("a", 5.0, 40.0, 0.4)))
    assert re.match(r"a gains \+5\.\d+ \[.*\], at a KL of 40 nats\.$", most), most
    assert diversity.startswith("Diversity is highest with a (0.4")
    (most, _) = answers(table(trained("a", 5.0, 40.0, 0.4, seeds=1), trained("bb", 1.0, 40.0, 0.4, seeds=1)))
    assert most.endswith("1 other gains significantly less. This is from one seed and says nothing about others.")
    (most, _) = answers(table(trained("a", 5.0, 40.0, 0.4, seeds=3)))
    assert most.endswith(" This rests on 3 seeds.")


def test_what_is_not_tested_is_not_called_separated() -> None:
    methods = trained("a", 5.0, 40.0, 0.4, seeds=1), trained("bb", 4.0, 40.0, 0.4, seeds=1)
    for one in (*methods[0], *methods[1]):
        one |= {"standard_error": float("nan"), "degrees": float("nan")}
    (most, _) = answers(table(*methods))
    assert re.match(r"a gains most reward, .*; not tested: bb \(\+3\.52, KL 36\)\. This is from one seed", most), most


def test_what_is_better_in_fewer_seeds_is_not_called_worse() -> None:
    """The best is one of the rows with the most seeds."""
    methods = trained("a", 5.0, 40.0, 0.40), trained("bb", 9.0, 2.0, 0.49, calls=10, seeds=3)
    most, diversity = answers(table(*methods))
    assert most.startswith("a gains most reward, +5.0")
    assert "; significantly more, but of fewer seeds: bb (+9, KL 2.0)." in most
    assert "less" not in most
    assert "significantly higher, but of fewer seeds: bb" in diversity
    board = table(*methods, axis="reward/train", limit=4.0)
    kl, _, first = answers(board, board, 4.0)
    assert re.search(r"lowest with a, .*; significantly lower, but of fewer seeds: bb", kl), kl
    assert re.search(r"in NFE by a \(\d+\) \(earlier, but of fewer seeds: bb \(\d+\)\)", first), first


def test_nobody_gains() -> None:
    (most, *_) = answers(table(trained("a", -1.0, 40.0, 0.4), trained("bb", -9.0, 40.0, 0.4)))
    assert re.match(r"No method gains reward: the best is a with -1\.\d+ \[.*\]\.$", most), most


def test_without_the_columns_there_are_no_sentences() -> None:
    assert answers(table(trained("a", 5.0, 40.0, 0.4), metrics=["path_kl"])) == ()


def test_test_prompts_are_the_headline_and_an_equal_gain_is_on_both() -> None:
    """`a` gains more on training prompts, `bb` on test prompts, by which a table is sorted and its sentences speak."""
    rows = trained("a", 5.0, 40.0, 0.4) + trained("bb", 4.0, 10.0, 0.5)
    for share, split in ((0.2, "test"), (0.1, "validation")):
        for one in [one for one in rows if one["metric"] == "reward/train"]:
            gain = one["difference"] * (share if one["method"] == "a" else 2 * share)
            rows.append(one | {"metric": f"reward/{split}", "value": 20 + gain, "prior": 20.0, "difference": gain})
    frame = pd.DataFrame(rows).assign(source="x/rows.parquet")
    main, *equal = sections(frame, Question(), with_gains=True)[0].boards
    assert main.columns[:2] == ("reward/test", "reward/train")
    assert "reward/validation" not in main.columns
    assert [line.name for line in main.lines if line.n] == ["bb", "a"]
    assert main.answers[0].startswith("bb gains most reward, +1.6")
    splits = [re.search(r"at a reward gain of \+(\S+) on (\w+) prompts$", board.title) for board in equal]
    assert [found and found[2] for found in splits] == ["test", "test", "training", "training"]
    assert main.answers[2] == equal[1].answers[2]
    assert f"A gain of +{splits[1][1]} on test prompts is reached first in NFE by bb" in main.answers[2]
    assert "reward/test" not in equal[0].columns and "reward/train" in equal[0].columns
    assert "reward/test" in equal[2].columns and "reward/train" not in equal[2].columns
    asked = sections(frame, Question(axis="gain", limits=(0.5,)))[0].boards
    assert [board.title.partition(", at ")[2] for board in asked] == [
        "a reward gain of +0.5 on test prompts", "a reward gain of +0.5 on training prompts"
    ]  # fmt: skip
    (alone,) = sections(frame[frame["metric"] != "reward/test"], Question())[0].boards
    assert alone.columns[:2] == ("reward/train", "reward/validation")


def test_a_report_has_them_below_its_tables_and_latex_has_none() -> None:
    """Without a table at an equal gain the third sentence says how to get it; with one, the second speaks of it."""
    frame = pd.DataFrame(trained("a", 5.0, 40.0, 0.4) + trained("bb", 4.0, 10.0, 0.5)).assign(source="x/rows.parquet")
    (alone,) = sections(frame, Question())[0].boards
    main, half, whole = sections(frame, Question(), with_gains=True)[0].boards
    assert "gain +" in alone.answers[1]
    gain = re.search(r"--at-reward-gain (\S+) has the table", alone.answers[2])
    assert gain and f"at a reward gain of +{gain[1]}" in whole.title
    assert main.answers[0] == alone.answers[0]
    assert main.answers[1:] == whole.answers[1:]
    assert half.answers[2].startswith(f"A gain of +{half.title.rpartition('+')[2]} is reached first")
    asked = sections(frame, Question(axis="gain", limits=(float(gain[1]),)))[0].boards[0]
    assert asked.answers == whole.answers
    for board in (alone, main, half, whole):
        assert all(f"\n- {sentence}\n" in markdown(board) for sentence in board.answers)
        assert not any(sentence in latex(board) for sentence in board.answers)


@pytest.mark.parametrize("name", ["ring", "emoji_flow"])
def test_every_number_of_a_sentence_is_in_the_tables(name: str) -> None:
    """Of published rows, at gains too, in the digits of the tables."""
    (section,) = sections(collect([PUBLISHED / name])[0], Question(), with_gains=True)
    text = " ".join(markdown(board).split("\n- ")[0] for board in section.boards)
    for board in section.boards:
        assert len(board.answers) >= 2
        for sentence in board.answers:
            sentence = re.sub(
                r"and \d+ more|\d+ others? gains?|rests on \d+ seeds|[Aa](t a)? gain of \S+", "", sentence
            )
            numbers = re.findall(r"(?<![\w.])[+-]?\d[\d,]*\.?\d*(?![\w])", re.sub(r"\w+_\w+", "", sentence))
            missing = [number for number in numbers if number.rstrip(",.") not in text]
            assert not missing, sentence


def test_right_shares_on_shrunken_modes_are_no_success() -> None:
    ((_, rows),) = settings(collect([PUBLISHED / "ring_flow_little_noise"])[0])
    board = leaderboard(rows)
    marks = {line.name: dict(zip(board.columns, line.cells, strict=True)) for line in board.lines}
    trained = {name: cells for name, cells in marks.items() if name not in ("prior", "sampling floor")}
    assert min(trained, key=lambda name: trained[name]["tilt_tv"].value) == "dag_kl"
    assert not trained["dag_kl"]["tilt_sw2"].mark and not trained["dag_kl"]["tilt_tv"].mark
    marked = {name for name, cells in trained.items() if cells["tilt_tv"].mark}
    assert marked and marked <= {name for name, cells in trained.items() if cells["tilt_sw2"].mark}
    (first, *_) = answers(board)
    assert first.startswith("tilt_matching comes closest to the target, tilt_sw2 0.2")
    assert "not separated: rtb_softmax" in first and "as many draws of it have 0.099" in first
