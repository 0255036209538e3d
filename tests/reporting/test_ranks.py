"""Mean ranks over settings and their critical distance."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from example_rows import chosen, row

from bench.reporting.ranks import ranks
from bench.reporting.report import Question, compared, ranked_over, text, write_report


@pytest.mark.parametrize(
    ("methods", "quantile"), [(3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (8, 3.031), (10, 3.164)]
)
def test_the_critical_distance_is_that_of_demsar(methods: int, quantile: float) -> None:
    """Table 5 (a) of Demšar (2006), for 14 settings; of four methods it is 1.25."""
    scores = pd.DataFrame(np.random.default_rng(0).random((methods, 14)))
    expected = quantile * (methods * (methods + 1) / (6 * 14)) ** 0.5
    assert ranks(scores).distance == pytest.approx(expected, rel=3e-4)
    assert methods != 4 or ranks(scores).distance == pytest.approx(1.25, abs=0.005)


def test_ranks_share_ties_and_friedmans_test_is_that_of_its_formula() -> None:
    scores = pd.DataFrame([[3, 3, 9, 4], [2, 3, 8, 5], [1, 1, 7, 3]], index=["a", "b", "c"], columns=list("wxyz"))
    found = ranks(scores)
    assert found.table.loc["a"].tolist() == [1, 1.5, 1, 2]
    assert found.means.to_dict() == {"a": 1.375, "b": 1.625, "c": 3.0}
    untied = scores.drop(columns="x")
    means = ranks(untied).means
    square = 12 * 3 / (3 * 4) * ((means - 2) ** 2).sum()
    assert ranks(untied).p == pytest.approx(scipy.stats.chi2.sf(square, 2))


def test_groups_are_the_largest_sets_within_the_distance() -> None:
    scores = pd.DataFrame(np.arange(30.0).reshape(5, 6)[::-1] @ np.ones((6, 8)), index=list("abcde"))
    found = ranks(scores)._replace(distance=2.5)  # mean ranks 1 to 5
    assert found.groups() == [["a", "b", "c"], ["b", "c", "d"], ["c", "d", "e"]]
    assert found._replace(distance=0.5).groups() == []


def test_a_report_over_settings_ranks_what_is_in_all_of_them(tmp_path: Path) -> None:
    """Gains order methods where no target is known; what a setting lacks is said."""
    places = {"ddpo": "abc", "draft": "abc", "nft": "abc", "refl": "bc"}
    gains = {"ddpo": 1.0, "draft": 8.0, "nft": 2.0, "refl": 9.0}
    rows = pd.DataFrame(
        row(run=name + reward, method=name, difference=gains[name], settings=chosen(reward__name=reward), reward=reward)
        for name, own in places.items()
        for reward in own
    ).assign(source=str(tmp_path / "rows.parquet"))
    found = compared(rows, Question())
    ordered = found.ranked
    assert ordered
    assert ordered[0].means.to_dict() == {"draft": 1.0, "nft": 2.0, "ddpo": 3.0}
    board = found.boards[-1]
    assert [line.name for line in board.lines] == ["draft", "nft", "ddpo"]
    assert "Not ranked, as they are not in all settings: refl (in 2 of 3)." in board.notes
    assert "draft has the least mean rank, 1; not separated from it: nft." in board.answers
    assert ordered[0].distance == pytest.approx(2.343 * (12 / 18) ** 0.5, rel=1e-3)  # just under the two between them
    assert "### Mean ranks over all settings" in text(found, [])
    assert "![mean ranks](ranks.png)" in write_report(tmp_path, rows, [], Question()).read_text()
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
    assert ranked_over(found.sections[:1]) is None
