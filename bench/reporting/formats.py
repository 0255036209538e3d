"""A board as Markdown, CSV, LaTeX (booktabs), or in a terminal."""

import re
import textwrap
from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from bench.reporting.leaderboard import Board, Cell, Line, narrow
from bench.reporting.table import markdown_text, number

NARROW = 1e-4  # of the value: what the same samples differ by on other processors
TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: f"\\{c}" for c in "&%$#_{}"
}
TEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "`": r"\textasciigrave{}", "\n": " "}
TEX |= {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "≈": r"$\approx$", "–": "--", "β": r"$\beta$", "★": r"$\star$"}
TEX |= {"†": r"$\dagger$", "‡": r"$\ddagger$"}


def interval(value: float, low: float, high: float, sign: bool = False) -> tuple[str, str]:
    """The value and "[low, high]", "" without one.

    Each side to its own half's first digit, or second after a 1 or 2; the value to the shorter one's. A positive low
    end keeps a digit of its own, so that it is never shown as zero. One too narrow for four digits is left out.
    """
    below, above = value - low, high - value
    if pd.isna(below + above) or below + above <= NARROW * abs(value):
        return number(value, sign), ""
    if max(below, above) < 4 * min(below, above):  # not very skewed
        below = above = (below + above) / 2
    short = min(filter(None, (below, above)))
    least = min(below or short, low) if low > 0 else below or short
    sizes = (value, short), (low, least), (high, above or short)
    show = [_rounded(x + 0.0, size, sign) for x, size in sizes]
    return show[0], f"[{show[1]}, {show[2]}]"


def _rounded(value: float, size: float, sign: bool) -> str:
    """To the first digit of `size`, or second after a 1 or 2; with an exponent from a thousand million on."""
    plus = "+" if sign else ""
    if abs(value) >= 1e9:
        return f"{value:{plus}.2g}"
    digit, exponent = f"{size:.0e}".split("e")
    return f"{value:{plus},.{max(0, (int(digit) < 3) - int(exponent))}f}"


def parts(cell: Cell) -> tuple[str, str, str]:
    """Texts of a cell: value, its interval, and the paired difference with its own; "" for what it lacks."""
    if pd.isna(cell.value):
        return cell.text or "–", "", ""
    value, ends = interval(cell.value, cell.low, cell.high)
    difference = " ".join(interval(*cell[3:6], sign=True)).strip() if pd.notna(cell.difference) else ""
    return f"{value} ‡" if cell.from_prior else value, ends, difference


def _behind(cell: Cell) -> str:
    """What stands behind the value, on one line."""
    _, ends, difference = parts(cell)
    rest = [ends, difference and f"({difference})", f"({cell.text})" if cell.text and pd.notna(cell.value) else ""]
    return " ".join(filter(None, rest))


def markdown(board: Board) -> str:
    """A table, the best in bold, and its notes. Names, prompts and settings are escaped: they show as they are."""

    def text(cell: Cell) -> str:
        value = parts(cell)[0]
        marked = {"best": f"**{value}**", "tie": f"{value} ≈"}.get(cell.mark, value)
        return " ".join(filter(None, [marked, _behind(cell)]))

    names = [(board.of, *map(markdown_text, board.headings), "n"), ["---"] * (len(board.headings) + 2)]
    lines = [(markdown_text(line.name), *map(text, line.cells), line.runs) for line in board.lines]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [*names, *lines])
    said = "\n".join(f"- {markdown_text(sentence)}" for sentence in board.answers)
    return "\n\n".join(filter(None, [markdown_text(board.lead), table, said, *map(markdown_text, board.notes)])) + "\n"


def latex(board: Board) -> str:
    """A `table` with booktabs' rules; ties are underlined.

    What TeX would interpret is escaped. Other letters stay Unicode: a script or an emoji that pdfLaTeX does not know
    needs LuaLaTeX or XeLaTeX and a font that has it.
    """

    def text(cell: Cell) -> str:
        value = latex_text(parts(cell)[0])
        marked = {"best": rf"\textbf{{{value}}}", "tie": rf"\underline{{{value}}}"}.get(cell.mark, value)
        return " ".join(filter(None, [marked, latex_text(_behind(cell))]))

    def row(first: str, *texts: str) -> str:
        first = f"{{}}{first}" if first.startswith(("[", "*")) else first  # else an option of the line break before it
        return " & ".join([first, *texts]) + r" \\"

    body = [row(latex_text(line.name), *map(text, line.cells), latex_text(line.runs)) for line in board.lines]
    first = sum(line.name in ("prior", "sampling floor") for line in board.lines[:2])
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{latex_text(' '.join(filter(None, [f'{board.title}.', board.lead, *board.notes])))}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(board.headings) + 1)}}}",
            r"\toprule",
            row(board.of, *map(latex_text, board.headings), "n"),
            r"\midrule",
            *body[:first],
            *([r"\midrule"] if first else []),
            *body[first:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def latex_text(text: str) -> str:
    """LaTeX that shows a text as it is, but for letters of our own that become symbols."""
    pairs = r"([-',])(?=\1)"  # which would become one sign
    return re.sub(
        f"{pairs}|.", lambda found: f"{found[1]}{{}}" if found[1] else TEX.get(found[0], found[0]), text, flags=re.S
    )


def to_csv(boards: Sequence[Board]) -> str:
    """A line for every cell of every table; numbers have nine digits, which are the same on every processor."""
    rows = [
        (board.title, line.name, metric, *cell, line.n)
        for board in boards
        for line in board.lines
        for metric, cell in zip(board.columns, line.cells, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["table", "row", "metric", *Cell._fields, "n"])
    numbers = list(Cell._fields[:9])
    return table.astype(dict.fromkeys(numbers, float)).to_csv(index=False, lineterminator="\n", float_format="%.9g")


def terminal(board: Board, width: int, wide: bool = False) -> Group:
    """A table no wider than `width`, intervals below the values; names and numbers stay whole.

    Where not all columns fit it has those that matter first, at most `leaderboard.NARROW`, and a line names the others.
    wide: all columns, in tables one below the other.
    """
    every = list(range(len(board.columns)))
    blocks, titles, columns = _blocks(board, width, every, broken=False)
    notes = list(board.notes)
    broken = len(blocks) > 1 and not wide
    if broken:
        blocks, titles, columns = _blocks(board, width, narrow(board.columns), broken)
        blocks = blocks[:1]
        if rest := [board.headings[i] for i in every if i not in blocks[0]]:
            notes.insert(0, f"More columns with --wide: {', '.join(rest)}.")
    tables = []
    for block in blocks:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(board.of, width=_names(board))
        for i in block:
            table.add_column(Text(titles[i]), justify="right", overflow="fold")
        table.add_column("n", justify="right")
        for place, line in enumerate(board.lines):
            style = "dim" if line.name in ("prior", "sampling floor") else ""
            table.add_row(Text(line.name), *(columns[i][place] for i in block), _runs(line, broken), style=style)
        tables.append(table)
    lead = [Text(board.lead, style="bold")] if board.lead else []
    said = [Text(f"• {sentence}") for sentence in board.answers]
    below = [Text(note, style="dim") for note in notes]
    return Group(Text(board.title, style="bold"), *lead, *tables, *said, *below, Text())


def _names(board: Board) -> int:
    """Letters of the first column: names are broken between words alone."""
    names = [line.name for line in board.lines] or [board.of]
    return max(*(len(word) for name in names for word in name.split()), min(20, max(map(len, names))))


def _blocks(
    board: Board, width: int, places: Sequence[int], broken: bool
) -> tuple[list[list[int]], dict[int, str], dict[int, list[Text]]]:
    """Columns in groups that fit `width`, their headings and cells; broken: on more lines, where words end."""
    titles = {i: _folded(board.headings[i]) for i in places}
    if broken:
        titles = {i: _wrapped(board.headings[i].replace("/", "/ ")) for i in places}
    columns = {i: [_stacked(line.cells[i], broken) for line in board.lines] for i in places}
    runs = [part for line in board.lines for part in _runs(line, broken).split("\n")]
    room = width - _names(board) - max(map(len, runs), default=1) - 5  # with rich's margins
    blocks: list[list[int]] = [[]]
    left = room
    for i, cells in columns.items():
        texts = (*map(str, cells), titles[i])
        need = 2 + max(len(line) for text in texts for line in text.split("\n"))
        if need > left and blocks[-1]:
            blocks.append([])
            left = room
        blocks[-1].append(i)
        left -= need
    return blocks, titles, columns


def _folded(title: str) -> str:
    """A heading on several lines, its parts and unit below one another."""
    return title.replace("/", "/\n").replace(" [", "\n[").replace("reward ", "reward\n").replace("g time", "g\ntime")


def _runs(line: Line, broken: bool) -> str:
    return _wrapped(line.runs) if broken else line.runs


def _wrapped(text: str) -> str:
    """A text on lines of nine letters or of one word."""
    return textwrap.fill(text, 9, break_long_words=False, break_on_hyphens=False)


def _stacked(cell: Cell, broken: bool) -> Text:
    """A value with its mark and below it the paired difference; broken: its own interval, on two lines."""
    value, ends, difference = parts(cell)
    if broken and pd.isna(cell.value):
        value = _wrapped(value)
    text = Text(
        value + {"best": " ★", "tie": " ≈"}.get(cell.mark, ""), style="bold green" if cell.mark == "best" else ""
    )
    below = (ends or difference).replace(" ", "\n") if broken else difference or ends
    for line in filter(None, [below, cell.text if pd.notna(cell.value) else ""]):
        text.append(f"\n{line}", style="not bold dim")
    return text


def show(boards: Sequence[Board], console: Console, wide: bool = False) -> None:
    """Print boards to a terminal; wide: with all columns, see `terminal`."""
    for board in boards:
        console.print(terminal(board, console.width, wide))
