"""A path that a user names may begin with `~`, wherever a shell leaves it to the program."""

import shutil
from pathlib import Path

import pytest

from bench.cli.app import application
from bench.cli.options import with_home
from bench.config import read, resolve
from bench.errors import BenchError
from bench.hub import hub_cache, project_cache
from bench.python import evaluate, load, report, run
from bench.sweeps.spec import read_sweep
from bench.sweeps.sweep import plan

DRY = ("run", "draft_1", "--dry-run")
ABSENT = {  # what is told of a path that is not there, or of one that would be written
    "run --out": (*DRY, "--model", "ring", "--out=~/absent"),
    "run --model": (*DRY, "--model=~/absent"),
    "run --prompts": (*DRY, "--prompts=~/absent.txt"),
    "run --set model": (*DRY, "--set", "model.name=~/absent"),
    "run --set prompts": (*DRY, "--set", "prompts.name=~/absent.txt"),
    "run --set reward": (*DRY, "--model", "emoji", "--reward", "emoji_clip", "--set", "reward.folder=~/absent"),
    "fetch": ("fetch", "--model=~/absent"),
    "profile": ("profile", "--model=~/absent"),
    "eval": ("eval", "~/absent"),
    "sweep": ("sweep", "~/absent.yaml"),
    "report": ("report", "~/absent"),
    "serve": ("serve", "~/absent"),
    "sample": ("sample", "~/absent"),
    "sample --prompts": ("sample", "runs", "--prompts=~/absent.txt"),
    "push": ("push", "~/absent", "me/it"),
    "convert": ("convert", "~/absent.safetensors", "--like", "emoji"),
    "selftest": ("selftest", "~/absent"),
    "reproduce": ("reproduce", "~/absent"),
    "verify": ("verify", "~/absent"),
    "pack": ("pack", "~/absent", "--out=out"),
    "merge": ("merge", "~/absent", "out"),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "me"


@pytest.mark.parametrize("place", ABSENT)
def test_the_command_line(bench, home: Path, place: str) -> None:
    _, text = bench(*ABSENT[place])
    assert f"{home}/absent" in "".join(text.split()), text
    assert "~" not in text


def test_every_path_of_every_command_is_taken_so() -> None:
    def command(one: Path, several: list[Path] | None, none: Path | None, text: str) -> tuple:
        return one, several, none, text

    found = with_home(command)(one=Path("~/a"), several=[Path("~/b"), Path("c")], none=None, text="~/d")
    assert found == (Path.home() / "a", [Path.home() / "b", Path("c")], None, "~/d")
    assert len(application.registered_commands) > 12
    for registered in application.registered_commands:
        assert registered.callback.__code__ is with_home(command).__code__, registered.callback


def test_the_pipeline_that_a_file_is_converted_like(bench, home: Path, pipeline_folder: Path) -> None:
    shutil.copytree(pipeline_folder, home / "like")
    shutil.copy(pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors", home / "one.safetensors")
    status, text = bench("convert", "~/one.safetensors", "--like=~/like")
    assert status == 2 and f"{home}/one.safetensors holds no" in "".join(text.split()).replace("holdsno", " holds no")


def test_a_sweep_and_a_stored_configuration(home: Path, pipeline_folder: Path) -> None:
    shutil.copytree(pipeline_folder, home / "a")
    (home / "b.txt").write_text("cat\ndog\nfish\n")
    spec = home / "spec.yaml"
    spec.write_text(
        "methods: [draft_1]\nreward: colorfulness\nmodel: ~/a\nout: ~/runs\ngrid: {prompts.name: [~/b.txt]}\n"
    )
    (job,) = plan(read_sweep(spec))
    assert job.folder.is_relative_to(home / "runs")
    assert (job.config.model.name, job.config.prompts.name) == (f"{home}/a", f"{home}/b.txt")
    whole = resolve("draft_1", overrides={"model.name": f"{home}/a"})
    (home / "config.yaml").write_text(whole.to_yaml().replace(f"{home}/a", "~/a"))
    assert read(home / "config.yaml").hash() == whole.hash()


def test_python_and_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (
        lambda: run("draft_1", model="~/absent"),
        lambda: run("draft_1", prompts=Path("~/absent.txt")),
        lambda: load("~/absent"),
        lambda: evaluate("~/absent"),
        lambda: report("~/absent"),
    ):
        with pytest.raises(BenchError, match=f"{home}/absent"):
            call()
    for name, place in (("HF_HUB_CACHE", hub_cache), ("XDG_CACHE_HOME", lambda: project_cache().parent)):
        monkeypatch.setenv(name, "~/cache")
        assert place() == home / "cache"
