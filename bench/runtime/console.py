"""What is printed: text as it is, whole, and on a terminal of any encoding."""

import codecs
import io
import sys
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

# Our own marks for an encoding that lacks them; anything else is escaped, as in "\u4e2d"
MARKS = {"±": "+-", "−": "-", "–": "-", "…": "...", "×": "x", "·": ".", "★": "*", "≈": "~", "↑": "^", "↓": "v"}
MARKS |= {"→": "->", "≥": ">=", "≤": "<=", "²": "^2", "†": "#", "‡": "##", "β": "beta", "η": "eta", "∇": "nabla"}
# rich's boxes
MARKS |= dict.fromkeys("─━╸╺", "-") | dict.fromkeys("│┃", "|") | dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰┏┓┡┩┳╇", "+")


class TextConsole(Console):
    """A console that interprets nothing in a string: no markup and no `:emoji:`. Styles are given as `rich.text.Text`.

    A line of text is not cut at the terminal's width, so that a shell can copy a path from it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """See `Console.print`."""
        lines = all(isinstance(one, str | Text) for one in objects)
        super().print(*objects, **{"soft_wrap": lines} | options)

    def status(self, status: Any, **options: Any) -> Status:
        """See `Console.status`; its spinner would read a string as markup, and the usual one is not ASCII."""
        return super().status(Text(status), **{"spinner": "line"} | options)


def print_anything() -> None:
    """Have standard output and error write what their encoding lacks as marks or escapes, where they would fail."""
    codecs.register_error("bench", _substitute)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="bench")


def _substitute(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = "".join(MARKS.get(letter, letter) for letter in error.object[error.start : error.end])
    return text.encode("ascii", "backslashreplace").decode(), error.end
