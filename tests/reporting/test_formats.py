"""Tables of a terminal keep names and numbers whole, and show what matters first."""

import re
from io import StringIO

import pandas as pd
import pytest
from example_rows import PUBLISHED, chosen, row
from rich.console import Console

from bench.reporting.formats import parts, terminal
from bench.reporting.leaderboard import Board, leaderboard, narrow
from bench.reporting.report import Question, sections
from bench.reporting.selection import collect, settings

SETS = ["emoji", "emoji_mixture", "preference_200", "ring_flow", "verdict_emoji_flow"]  # of every kind


def printed(board: Board, width: int, wide: bool = False) -> list[str]:
    console = Console(width=width, record=True, file=StringIO())
    console.print(terminal(board, width, wide), highlight=False)
    return console.export_text().splitlines()


@pytest.fixture(scope="module")
def boards() -> dict[str, Board]:
    return {name: sections(collect([PUBLISHED / name])[0], Question())[0].boards[0] for name in SETS}


@pytest.mark.parametrize("name", SETS)
def test_a_table_of_80_columns_breaks_neither_names_nor_numbers(boards: dict[str, Board], name: str) -> None:
    board = boards[name]
    lines = printed(board, 80)
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    (rule,) = [i for i, line in enumerate(lines) if "───" in line]  # one table
    titles, cells = "\n".join(lines[:rule]), lines[rule + 1 :]
    shown = [board.columns[i] for i in narrow(board.columns) if board.columns[i].split("/")[0] in titles]
    assert shown == [board.columns[i] for i in narrow(board.columns)][: len(shown)]
    assert len(shown) == (4 if "ring" in name else 5)  # longer names and numbers there
    words = {word for line in cells for word in line.split()}
    for line in board.lines:
        assert set(line.name.split()) <= words
        for metric, cell in zip(board.columns, line.cells, strict=True):
            if metric in shown:
                value, ends, _ = parts(cell)
                assert {*value.split(), *ends.split()} <= words
    (more,) = re.findall(r"(?s)More columns with --wide: (.*?)\.\s*\n(?=[A-Z])", "\n".join(lines))
    rest = [title for title, metric in zip(board.headings, board.columns, strict=True) if metric not in shown]
    assert " ".join(more.split()) == ", ".join(rest)


def test_wide_has_every_column(boards: dict[str, Board]) -> None:
    board = boards["emoji"]
    for lines in (printed(board, 80, wide=True), printed(board, 260)):
        text = "\n".join(lines)
        assert all(title.split("/")[-1].split(" [")[0] in text for title in board.headings)
        assert "--wide" not in text
    assert max(map(len, printed(board, 80, wide=True))) <= 80


def test_long_names_are_broken_between_words_alone() -> None:
    rows = [row(seed=i, settings=chosen(optimizer__lr=rate)) for i, rate in enumerate((0.001, 0.002))]
    ((_, found),) = settings(pd.DataFrame(rows))
    names = " ".join(line[:20].strip() for line in printed(leaderboard(found), 60))
    assert "draft (optimizer.lr = 0.001)" in " ".join(names.split())
