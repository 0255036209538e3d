"""Run folders: one owner, the contents that a run began with, and what a crash leaves."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from bench import registry
from bench.config import resolve
from bench.errors import BenchError
from bench.evaluation.evaluator import Evaluator
from bench.hub import RANDOM
from bench.models.random_weights import write
from bench.prompts import split
from bench.runs.contents import contents
from bench.runs.rows import run_folder, run_name
from bench.runtime.files import locked
from bench.sweeps.jobs import plan_sweep
from bench.sweeps.spec import Sweep

pytestmark = pytest.mark.usefixtures("undrawn")

PROMPTS = split("test", ["cat", "dog", "red bird", "fish", "bear", "apple"])
HOLD = (
    "import sys, time; from bench.runtime.files import locked\nwith locked(__import__('pathlib').Path(sys.argv[1])):\n"
)
HOLD += "    print('held', flush=True); time.sleep(60)"


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_a_live_run_is_not_touched_and_a_dead_owner_owns_nothing(tiny_run, tmp_path: Path, options) -> None:
    folder = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(AssertionError, match="another process is at work in"):
            tiny_run("prior", *options)
    finally:
        other.kill()
        other.wait()
    (folder / ".config.yaml.1.part").write_text("half")
    assert (tiny_run("prior", *options) / "rows.parquet").is_file()
    assert not list(folder.rglob("*.part"))


def test_changed_prompts_are_not_taken_for_the_runs_own(tiny_run, bench, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("cat\ndog\nred bird\nfish\nbear\napple\n")
    folder = tiny_run("draft_1", "--prompts", own)
    own.write_text("cat\ndog\nred bird\nfish\nbear\npear\n")
    status, text = bench("eval", folder)
    assert status == 2
    assert f"begun with other contents of prompts.name = {own}" in text
    with pytest.raises(AssertionError, match=r"begun with other contents of prompts\.name"):  # finished …
        tiny_run("draft_1", "--prompts", own)
    (folder / "rows.parquet").unlink()
    with pytest.raises(AssertionError, match=r"begun with other contents of prompts\.name"):  # … or not
        tiny_run("draft_1", "--prompts", own)


def test_changed_weights_are_not_taken_for_the_runs_own(tiny_run, bench, pipeline_folder: Path) -> None:
    folder = tiny_run("draft_1")
    config = pipeline_folder / "unet" / "config.json"
    before = config.read_text()
    try:
        config.write_text(before + "\n")
        with pytest.raises(AssertionError, match=r"begun with other contents of model\.name"):
            tiny_run("draft_1")
        status, text = bench("eval", folder)
        assert status == 2
        assert "model.name" in text
    finally:
        config.write_text(before)
    tiny_run("draft_1")


def test_weights_of_the_reward_are_part_of_a_runs_contents(tmp_path: Path, monkeypatch) -> None:
    """Another revision of the repository is found; before it is fetched nothing is known."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = resolve("prior", reward="hps", overrides={"model.name": "emoji"})
    before = contents(config, PROMPTS)
    write(registry.load("rewards", "hps").files, tmp_path, "tiny")
    whole = contents(config, PROMPTS)
    assert whole == contents(config, PROMPTS)
    assert whole.keys() - before.keys() == {"reward.name"}
    repository = tmp_path / "models--xswu--HPSv2"
    (repository / "snapshots" / RANDOM["tiny"]).rename(repository / "snapshots" / ("b" * 40))
    (repository / "refs" / "main").write_text("b" * 40)
    now = contents(config, PROMPTS)
    assert {key for key in whole if whole[key] != now[key]} == {"reward.name"}


@pytest.mark.parametrize("fault", ["flipped", "cut", "empty"])
def test_a_damaged_cache_is_drawn_anew(core, tmp_path: Path, caplog, fault: str) -> None:
    config = resolve("prior", reward="colorfulness", assignments=["evaluation.samples_per_prompt=2"])
    first = Evaluator(core, config, PROMPTS, tmp_path).prior_set("prior")
    (path,) = tmp_path.iterdir()
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes({"flipped": bytes(whole), "cut": bytes(whole[:-9]), "empty": b""}[fault])
    again = Evaluator(core, config, PROMPTS, tmp_path).prior_set("prior")
    assert torch.equal(first.images, again.images)
    assert "is damaged" in caplog.text


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_ends_no_run(tiny_run, tmp_path: Path, caplog) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert (tiny_run("prior") / "rows.parquet").is_file()
    assert "cannot keep" in caplog.text or "cannot read" in caplog.text


def test_an_owner_lets_go(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(BenchError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_run_that_an_earlier_version_began_is_found_by_its_settings(tmp_path: Path) -> None:
    """Its folder is named by another hash, for its configuration lacks a setting that came later."""
    config = resolve("rtb", suite="ring", assignments=["train.updates=3"])
    assert run_folder(tmp_path, config) == tmp_path / run_name(config)
    tree = yaml.safe_load(config.to_yaml())
    del tree["train"]["guidance"]
    for name, stored in (("rtb-seed0-00000000", ""), ("rtb-seed0-11111111", yaml.safe_dump(tree))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(stored)
    assert run_folder(tmp_path, config) == tmp_path / "rtb-seed0-11111111"
    spec = Sweep(suite="ring", methods=["rtb"], set={"train.updates": 3}, out=tmp_path)
    (job,) = plan_sweep(spec)
    assert job.folder == tmp_path / "rtb-seed0-11111111"
    for other in ("train.guidance=2", "train.updates=4", "seed=1"):
        another = resolve("rtb", suite="ring", assignments=["train.updates=3", other])
        assert run_folder(tmp_path, another) == tmp_path / run_name(another)
    (tmp_path / run_name(config)).mkdir()
    assert run_folder(tmp_path, config) == tmp_path / run_name(config)
