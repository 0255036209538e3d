"""What is printed: text as it is and whole, in any encoding."""

import io
import sys

import pytest
from rich.table import Table
from rich.text import Text

from bench.errors import disk_error
from bench.runs.progress import training_progress
from bench.runtime.console import TextConsole, print_anything

TEXT = r"x[/y]z [red]r[/red] [link=a]b[/link] :smile: \[bold] 🍎 β ± 1"


def printed(*objects: object, encoding: str = "utf8") -> str:
    """What a console of 40 columns writes to a stream of an encoding, which `print_anything` has prepared."""
    out, sys.stdout = sys.stdout, io.TextIOWrapper(io.BytesIO(), encoding)
    try:
        print_anything()
        console = TextConsole(width=40)
        for one in objects:
            console.print(one)
        sys.stdout.flush()
        return sys.stdout.buffer.getvalue().decode(encoding)
    finally:
        sys.stdout = out


def test_strings_are_printed_as_they_are_and_on_one_line() -> None:
    long = f"{TEXT} " * 9
    assert printed(TEXT, long, Text(TEXT)) == f"{TEXT}\n{long}\n{TEXT}\n"


def test_tables_states_and_bars_show_strings_as_they_are() -> None:
    table = Table(TEXT, title=TEXT, caption=TEXT)
    table.add_row(TEXT)
    assert printed(table).replace("\n", "").count("[/y]z") == 4
    console = TextConsole(file=io.StringIO(), force_terminal=True, width=200)
    with console.status(TEXT):
        pass
    with training_progress(console) as progress:
        progress.add_task(TEXT, total=1, reward=0.0, left="")
    assert console.file.getvalue().count("[red]r[/red]") >= 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf8"])
def test_what_an_encoding_lacks_is_a_mark_or_an_escape(encoding: str) -> None:
    assert (
        printed("β ± – 🍎 \udcff", encoding=encoding)
        == {
            "ascii": "beta +- - \\U0001f34e \\udcff\n",
            "latin-1": "beta ± - \\U0001f34e \\udcff\n",
            "utf8": "β ± – 🍎 \\udcff\n",
        }[encoding]
    )
    table = Table("a")
    table.add_row("b")
    box = printed(table, encoding="ascii")
    assert "+" in box and "\\u" not in box


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "a"), ["a", "Permission denied", "right"]),
        (FileNotFoundError(2, "No such file or directory", "a"), ["there is no a", "written"]),
        (IsADirectoryError(21, "Is a directory", "a"), ["a", "file is needed"]),
        (NotADirectoryError(20, "Not a directory"), ["place", "folder is needed"]),
        (OSError(28, "No space left on device", "a"), ["a", "No space left", "same command goes on"]),
    ],
)
def test_a_disk_error_names_the_file_and_the_way_out(error: OSError, words: list[str]) -> None:
    said = disk_error(error, "place")
    assert all(word in said for word in words)
