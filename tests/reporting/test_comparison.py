"""`bench compare`: two configurations in paired seeds."""

from pathlib import Path

import pandas as pd
import pytest
import scipy.stats

from bench.errors import BenchError
from bench.reporting.comparison import compare, one_configuration
from bench.reporting.formats import markdown
from bench.reporting.selection import collect


@pytest.fixture(scope="module")
def ring() -> pd.DataFrame:
    return collect([Path("ring_little_noise")])[0]


def side(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    return one_configuration(frame, name, "ring")


def test_differences_are_paired_by_seed_and_corrected(ring) -> None:
    first, second = side(ring, "rtb"), side(ring, "adjoint_matching")
    board = compare(first, second, ("rtb", "am")).board
    ends = [rows[(rows["metric"] == "path_kl") & (rows["budget"] == 400)] for rows in (first, second)]
    values = [rows.set_index("seed")["value"].sort_index() for rows in ends]
    test = scipy.stats.ttest_rel(*values)
    low, high = test.confidence_interval()
    line = next(line for line in board.lines if line.name.startswith("path_kl"))
    text = line.cells[2].text
    assert text.startswith(f"{(values[0] - values[1]).mean():+.2f}")
    assert f"[{low:+.2f}, {high:+.2f}]" in text
    assert line.n == "10"
    # as many as the note says are tested, and the smallest p is against all of them
    assert f"over the {4 * 4 - 1} differences" in markdown(board)  # four metrics, four points, a gain held equal


def test_sides_swap_sign(ring) -> None:
    first, second = side(ring, "rtb"), side(ring, "dpok")
    one, other = (compare(*pair, ("x", "y")).board for pair in ((first, second), (second, first)))
    for a, b in zip(one.lines, other.lines, strict=True):
        texts = a.cells[2].text, b.cells[2].text
        assert a.cells[0] == b.cells[1]
        assert "+0" in texts[0] or texts[0][0] + texts[1][0] in ("+-", "-+")


def test_failed_runs_are_counted(ring) -> None:
    second = side(ring, "dpok")
    broken = {"metric": "run", "value": float("nan"), "status": "failed", "seed": 10, "run": "x"}
    second = pd.concat([second, second.iloc[:1].assign(**broken)])
    board = compare(side(ring, "rtb"), second, ("x", "y")).board
    assert "B: failed runs are left out, 1." in board.notes


def test_what_cannot_be_compared_is_said(ring) -> None:
    with pytest.raises(BenchError, match="did you mean 'rtb'"):
        side(ring, "rbt")
    with pytest.raises(BenchError, match="holds 37 configurations"):
        one_configuration(ring, None, "ring")
    flow = one_configuration(collect([Path("ring_flow")])[0], "rtb", "ring_flow")
    with pytest.raises(BenchError, match=r'A has model.name = "ring".*B has model.name = "ring_flow"'):
        compare(side(ring, "rtb"), flow, ("x", "y"))
    halves = [side(ring[ring["seed"].isin(seeds)], "rtb") for seeds in ((0, 1), (2, 3))]
    with pytest.raises(BenchError, match=r"A has seeds \[0, 1\] and B \[2, 3\]"):
        compare(*halves, ("x", "y"))


def test_baseline_is_compared_at_its_only_point_and_a_gain_passed_early_says_so(ring) -> None:
    best = compare(side(ring, "rtb"), side(ring, "best_of_n"), ("x", "y")).board
    assert best.headings == ("A", "B", "A − B at the end")
    emoji = collect([Path("emoji")])[0]
    notes = " ".join(compare(side(emoji, "nabla_gfn"), side(emoji, "refl"), ("x", "y")).board.notes)
    assert "B passed before its first evaluation" in notes
