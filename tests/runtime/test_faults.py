"""Every kind of fault of `faults.py`, a few trials each; `python -m tests.runtime.faults` tries them all."""

import subprocess
import sys

import pytest
from scaffold import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ring", "emoji"])
def test_a_run_survives_every_fault(model: str) -> None:
    """In a process of its own, for it forks."""
    command = [sys.executable, "-m", "tests.runtime.faults", model, "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|") >= 24
