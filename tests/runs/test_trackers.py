"""Trackers: any that accelerate knows."""

import json
import sqlite3
import time
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from bench.config import resolve
from bench.runs.log import UpdateLog
from bench.runs.trackers import open_trackers
from bench.runtime import processes


class Notebook(GeneralTracker):
    """Keeps what it is given."""

    name = "notebook"
    requires_logging_directory = True
    opened: list["Notebook"] = []

    def __init__(self, run_name: str, logging_dir: str):
        super().__init__()
        self.run_name, self.logging_dir, self.records, self.finished = run_name, logging_dir, [], False
        self.opened.append(self)

    @property
    def tracker(self) -> list:
        return self.records

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict) -> None:
        self.settings = values

    def log(self, values: dict, step: int) -> None:
        self.records.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_any_tracker_that_accelerate_knows_gets_every_update(bench, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    settings = ["model.name=ring", "evaluation.at=[]", "train.prompts_per_round=2", "sampler.steps=3"]
    status, text = bench(
        "run", "ddpo", "--suite", "ring", "--updates", 2, "--out", tmp_path / "run", "--track", "notebook",
        "--track", "tensorboard", *(word for one in settings for word in ("--set", one)),
    )  # fmt: skip
    assert status == 0, text
    (notebook,) = Notebook.opened
    assert (notebook.run_name, notebook.logging_dir) == ("nabla-bench", str(tmp_path / "run"))
    assert notebook.settings["train.updates"] == 2
    assert [step for step, _ in notebook.records] == [1, 2]
    assert "loss" in notebook.records[0][1]
    assert notebook.finished


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_in_a_sentence(bench, monkeypatch) -> None:
    status, text = bench("run", "ddpo", "--track", "wandbb")
    assert status == 2
    assert "unknown tracker 'wandbb'; did you mean 'wandb'?" in text
    assert "mlflow" in text
    assert "pip install 'nabla-bench[track]'" in text
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    for name, package in (("wandb", "'nabla-bench[track]'"), ("mlflow", "mlflow")):
        status, text = bench("run", "ddpo", "--track", name)
        assert status == 2
        assert f"tracker '{name}' needs its package: pip install {package}" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_every_update_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at import
    monkeypatch.delenv("WANDB_MODE", raising=False)
    pytest.importorskip(name)
    processes.state()
    config = resolve("draft_1", overrides={"model.name": "ring"})
    with UpdateLog(tmp_path, 0, open_trackers([name], tmp_path, config)) as log:
        for update in (1, 2):
            log.write({"update": update, "reward": update / 2})
    if name == "wandb":
        (file,) = tmp_path.glob("wandb/offline-run-*/run-draft_1-seed0-*.wandb")
        end = time.monotonic() + 60
        while b"reward" not in file.read_bytes():  # its service writes a little later
            assert time.monotonic() < end
            time.sleep(0.2)
    else:
        with sqlite3.connect(tmp_path / "trackio" / "nabla-bench.db") as base:
            entries = [json.loads(text) for (text,) in base.execute("select metrics from metrics order by step")]
        assert [entry["reward"] for entry in entries] == [0.5, 1.0]
