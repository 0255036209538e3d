"""Every command prints what a user named, as it is and in any encoding."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cli.app import app, application

NAME = r"x[/y]z[red]%_$#&:smile:\🍎"
COMMANDS = sorted(one.name or one.callback.__name__ for one in application.registered_commands)
LITTLE = ("--set", "evaluation.samples_per_prompt=4", "--set", "evaluation.metrics=[reward]")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in a folder of such a name."""
    folder = tmp_path_factory.mktemp("output") / NAME / ("l" * 200)
    status, text = call("utf8", "run", "prior", "--model", "ring", *LITTLE, "--out", folder)
    assert status == 0, text
    assert str(folder) in text
    return folder


def call(encoding: str, *arguments: object) -> tuple[int, str]:
    """Call the command line with streams of an encoding: its status and what it printed."""
    before = sys.argv, sys.stdout, sys.stderr
    sys.argv, sys.stdout = ["bench", *map(str, arguments)], io.TextIOWrapper(io.BytesIO(), encoding)
    sys.stderr = sys.stdout
    try:
        app()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        stream = sys.stdout
        sys.argv, sys.stdout, sys.stderr = before
    stream.flush()
    return status, stream.buffer.getvalue().decode("utf8")  # Typer's `echo` writes UTF-8 where there is ASCII alone


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_in_ascii(command: str) -> None:
    status, text = call("ascii", command, "--help")
    assert status == 0
    assert text.isascii()
    assert "Usage:" in text


@pytest.mark.parametrize("encoding", ["ascii", "utf8"])
@pytest.mark.parametrize(
    ("status", "arguments"),
    [
        (0, ("eval", "RUN")),
        (0, ("run", "prior", "--model", "ring", *LITTLE, "--out", "RUN")),
        (0, ("run", "prior", "--model", "ring", *LITTLE, "--out", "RUN", "--dry-run")),
        (0, ("report", "RUN", "--out", "OUT")),
        (0, ("report", "RUN", "--format", "html", "--out", "OUT")),
        (0, ("ls",)),
        (0, ("verify", "RUN")),
        (2, ("report", "RUN", "--metrics", NAME)),
        (2, ("run", NAME)),
        (2, ("run", "prior", "--model", NAME)),
        (2, ("run", "prior", "--reward", NAME)),
        (2, ("run", "prior", "--suite", NAME)),
        (2, ("run", "prior", "--metric", NAME)),
        (2, ("run", "prior", "--prompts", f"{NAME}.txt")),
        (2, ("run", "prior", "--set", f"{NAME}=1")),
        (2, ("run", "prior", "--set", f"train.updates='{NAME}'")),
        (2, ("sample", f"RUN/{NAME}")),
        (2, ("eval", f"RUN/{NAME}")),
        (2, ("reproduce", "RUN", "--method", NAME)),
        (2, ("pack", NAME, "--out", "OUT/x.zip")),
        (2, ("merge", NAME, "OUT")),
        (2, ("sweep", NAME)),
        (2, ("convert", NAME, "--like", "sd15")),
        (2, ("selftest", NAME)),
        (2, ("serve", NAME)),
    ],
    ids=lambda one: " ".join(one[:3]).replace(NAME, "…") if isinstance(one, tuple) else "",
)
def test_names_are_printed_in_any_encoding(encoding: str, status: int, arguments: tuple, run: Path, tmp_path: Path):
    words = [str(one).replace("RUN", str(run)).replace("OUT", str(tmp_path / NAME)) for one in arguments]
    found, text = call(encoding, *words)
    assert found == status, text
    assert "Traceback" not in text
    apple = "🍎" if encoding == "utf8" else "\\U0001f34e"
    if status == 2 or "OUT" in arguments:  # a `repr` doubles the backslash
        shown = "".join(letter for letter in text if letter not in "│ \n|")  # Typer's boxes, and lines that were broken
        assert NAME.replace("🍎", apple) in shown or NAME.replace("\\", "\\\\").replace("🍎", apple) in shown


def test_a_real_terminal_of_ascii(run: Path, tmp_path: Path) -> None:
    """Without UTF-8 anywhere: files are UTF-8 all the same, and a path that is none is told in one sentence."""
    surroundings = os.environ | {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    command = [sys.executable, "-m", "bench", "report", ".", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=surroundings, cwd=run, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "β" in (tmp_path / "out" / "report.md").read_text(encoding="utf8")
    done = subprocess.run([*command[:3], "eval", "é"], env=surroundings, cwd=run, capture_output=True)
    assert done.returncode == 2
    assert b"no text in this locale" in done.stderr
