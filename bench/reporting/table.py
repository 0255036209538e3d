"""The table at the end of a run: it against its prior."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from bench.reporting.leaderboard import heading
from bench.reporting.statistics import student

Rows: TypeAlias = pd.DataFrame | Iterable[Mapping[str, Any]]

HEADINGS = ("metric", "prior", "finetuned", "difference ± s.e.", "n")


def number(value: float | None, sign: bool = False) -> str:
    """Four significant digits, without an exponent where one can be avoided; a dash for a missing value."""
    if value is None or pd.isna(value):
        return "–"
    value = value + 0.0  # no negative zero
    digits = f"{value:+.4g}" if sign else f"{value:.4g}"
    return digits if "e" not in digits or abs(value) < 1 else f"{value:+,.0f}" if sign else f"{value:,.0f}"


def with_error(value: float | None, error: float | None, sign: bool = False) -> str:
    """`value ± error`, the error with two significant digits and the value to the same decimal place."""
    if value is None or error is None or pd.isna(value) or pd.isna(error):
        return number(value, sign)
    if error <= 1e-12 * abs(value):
        return f"{number(value, sign)} ± 0"
    decimals = max(0, 1 - int(f"{error:e}".split("e")[1]))
    return f"{value:{'+' if sign else ''},.{decimals}f} ± {error:,.{decimals}f}"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The row's text under each of HEADINGS."""
    return (
        heading(row),
        number(row["prior"]),
        number(row["value"]) if row["prior"] is not None and pd.notna(row["prior"]) else _alone(row),
        with_error(row["difference"], row["standard_error"], sign=True),
        str(row["n"]),
    )


def _alone(row: Mapping[str, Any]) -> str:
    """A value that is compared with nothing, a floor for one, carries its error itself."""
    return with_error(row["value"], row["standard_error"])


def is_clear(row: Mapping[str, Any]) -> bool:
    """Whether the difference's interval by Student's t, for as many prompts or samples as there were, leaves out zero.

    Two standard errors would do so by chance in one of nine cases with four prompts.
    """
    difference, error, degrees = (row[name] for name in ("difference", "standard_error", "degrees"))
    if any(x is None or pd.isna(x) for x in (difference, error, degrees)) or degrees <= 0:
        return False
    return abs(difference) > student(degrees) * error


def markdown_text(text: str) -> str:
    """Markdown that shows a text as it is, on one line, in a cell too; an underscore inside a word needs no escape."""
    special = r"[\\`*<|~$#]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|&(?=#?\w+;)"
    at_start = r"^\s*[>+=-]|(?<=^\d)[.)]"
    return re.sub(f"{special}|{at_start}", lambda found: f"{found[0][:-1]}\\{found[0][-1]}", text.replace("\n", " "))


def _records(rows: Rows) -> list[Mapping[str, Any]]:
    return rows.to_dict("records") if isinstance(rows, pd.DataFrame) else list(rows)


def run_table(rows: Rows) -> Table:
    """The end of a run, for the terminal: a line per metric, notes below. The arrow says which direction is better."""
    table = Table(*HEADINGS, box=box.SIMPLE_HEAD, caption_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    notes = []
    for row in _records(rows):
        sign = {"higher": 1, "lower": -1, "none": 0}[row["direction"]]
        first, *rest = _cells(row)
        if len(first) > 28:  # what 80 columns leave
            first = first.replace("/", "/\n  ", 1)
        cells = [Text(cell) for cell in (first, *rest)]
        if sign and is_clear(row):
            cells[3].stylize("green" if sign * row["difference"] > 0 else "red")
        table.add_row(*cells)
        if row["note"]:
            notes.append(f"{row['metric']}: {row['note']}")
    table.caption = Text("\n".join(notes))
    return table


def run_markdown(rows: Rows) -> str:
    """The same as Markdown, without the notes."""
    lines = [(markdown_text(name), *numbers) for name, *numbers in map(_cells, _records(rows))]
    table = [HEADINGS, ["---"] * len(HEADINGS), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table) + "\n"
