"""Processes that share no file system, as those of several machines."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.reporting.rows import read_rows
from bench.runs.log import read_log
from bench.runtime import processes

ROOT = Path(__file__).parent.parent.parent
SETTINGS = (
    "evaluation.samples_per_prompt=8", "evaluation.metrics=[reward,path_kl]", "evaluation.at=[3]", "train.ema=0.5",
    "train.samples_per_prompt=8", "train.updates_per_round=1", "train.checkpoint_every=1", "sampler.steps=4",
    "train.micro_batch=4", "train.sample_batch=4",
)  # fmt: skip
RUN = ["run", "rtb", "--model", "ring", "--updates", "4", "--out", "run"]
RUN += [word for setting in SETTINGS for word in ("--set", setting)]


def start(rank: int, home: Path, port: int) -> subprocess.Popen:
    """One of two processes of a run, with a home of its own for its folder `run` and its cache."""
    home.mkdir(exist_ok=True)
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "XDG_CACHE_HOME": str(home / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "bench", *RUN], cwd=home, env={**os.environ, **own}, **pipes)


@pytest.mark.slow
def test_a_checkpoint_reaches_a_process_that_has_no_files(bench, tmp_path: Path, monkeypatch) -> None:
    """From the middle, with an evaluation to be made up for, the run ends where one in a single process ends."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    status, text = bench(*RUN)
    assert status == 0, text
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(tmp_path / "run", first / "run")
    *_, last = sorted((first / "run" / "checkpoints").iterdir())
    for path in (first / "run" / "rows.parquet", first / "run" / "rows-at-0000003.parquet", last):
        path.unlink()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    started = [start(rank, home, port) for rank, home in enumerate((first, second))]
    try:
        printed = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], printed
    (spoken, _), (silent, _) = printed
    assert "Resuming after update 3 of 4." in spoken
    assert not silent
    assert not (second / "run").exists()
    for name in ("rows.parquet", "rows-at-0000003.parquet"):
        rows = [read_rows(folder / name).set_index("metric") for folder in (tmp_path / "run", first / "run")]
        for column in ("value", "prior", "difference"):
            assert rows[1][column].to_dict() == pytest.approx(rows[0][column].to_dict(), rel=1e-3, nan_ok=True)
    logs = [read_log(folder)["loss"].to_list() for folder in (tmp_path / "run", first / "run")]
    assert len(logs[0]) == 4
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


def test_what_fails_in_the_main_process_fails_in_all(monkeypatch) -> None:
    """Another would wait for ever for one that has ended."""

    def received(found: list) -> None:
        found[:] = [None, BenchError("the folder has another run")]

    monkeypatch.setattr(processes, "is_main", lambda: False)
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "broadcast_object_list", received)
    with pytest.raises(BenchError, match="another run"):
        processes.from_main(lambda: 1)
