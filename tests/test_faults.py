"""Every kind of fault of `tests/faults.py`, a few trials each; `python -m tests.faults` tries them all."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ring", "emoji"])
def test_a_run_survives_every_fault(model: str) -> None:
    """In a process of its own, for it forks."""
    command = [sys.executable, "-m", "tests.faults", model, "8"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|") >= 24
