"""Tensors that are computed once, by one of the runs that need them at the same time."""

import fcntl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest
import torch
from torch import Tensor

from bench.runtime import cache


def test_of_runs_at_the_same_time_one_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    second = threading.Event()
    calls = []

    def compute() -> dict[str, Tensor]:
        calls.append(threading.get_ident())
        assert second.wait(30)
        return {"x": torch.arange(3)}

    def lock(file: IO[str], kind: int, flock: Callable[[IO[str], int], None] = cache.fcntl.flock) -> None:
        if calls and not kind & fcntl.LOCK_NB:  # the other one waits here for the first
            second.set()
        flock(file, kind)

    monkeypatch.setattr(cache.fcntl, "flock", lock)
    path = tmp_path / "of" / "a key.checked"
    with ThreadPoolExecutor(2) as runs:
        first = runs.submit(cache.cached, path, compute)
        while not calls:
            pass
        found = [first, runs.submit(cache.cached, path, compute)]
        assert all(torch.equal(one.result(30)["x"], torch.arange(3)) for one in found)
    assert len(calls) == 1 and "waiting for another run" in caplog.text
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no lock is left


def test_where_nothing_can_be_locked_it_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: IO[str], kind: int) -> None:
        raise OSError("no locks on this file system")

    monkeypatch.setattr(cache.fcntl, "flock", refuse)
    assert cache.cached(tmp_path / "key.checked", lambda: {"x": torch.ones(2)})["x"].tolist() == [1, 1]
    blocked = tmp_path / "key.checked" / "below a file.checked"
    assert cache.cached(blocked, lambda: {"x": torch.ones(2)})["x"].tolist() == [1, 1]
    assert "cannot" in caplog.text
