"""A signal ends a run with a checkpoint, and the run goes on from it to the bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scaffold import small_method, trainer_of

from bench.evaluation.evaluator import Evaluator
from bench.runtime.stopping import STOP, Interrupted, signals_stop
from bench.training import checkpoint

pytestmark = pytest.mark.usefixtures("undrawn")


def start(folder: Path, updates: int, *settings: str) -> subprocess.Popen:
    sets = (
        "train.updates_per_round=3",
        "train.checkpoint_every=100000",
        "evaluation.samples_per_prompt=64",
        *settings,
    )
    command = [sys.executable, "-m", "bench", "run", "--method", "rtb", "--model", "ring", "--out", str(folder)]
    command += ["--updates", str(updates), *(word for one in sets for word in ("--set", one))]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder.parent / "cache")}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )


def until(folder: Path, lines: int) -> None:
    log, end = folder / "log.jsonl", time.monotonic() + 90
    while not (log.is_file() and log.read_text().count("\n") >= lines):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_update_with_a_checkpoint(tmp_path: Path, number: int, status: int) -> None:
    run = start(tmp_path / "run", 100_000)
    try:
        until(tmp_path / "run", 4)
        run.send_signal(number)
        _, text = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == status, text
    assert "The same command resumes from the last checkpoint." in text
    assert "Traceback" not in text
    done = (tmp_path / "run" / "log.jsonl").read_text().count("\n")
    assert checkpoint.load(tmp_path / "run" / "checkpoints")["update"] == done


@pytest.mark.parametrize("name", ["ddpo", "draft_1", "nabla_gfn_published"])
def test_a_run_stopped_within_a_round_ends_where_it_would_have(name: str, core, model, tmp_path: Path) -> None:
    start_of = {key: p.detach().clone() for key, p in model.adapters().items()}

    def restart(folder: str):
        for key, p in model.adapters().items():
            p.data.copy_(start_of[key])
            p.grad = None
        return trainer_of(core, small_method(name), tmp_path / folder)

    straight = restart("straight")
    straight.run(lambda record: None)
    expected = straight.state_dict()["parameters"]
    stopped = restart("stopped")

    def signalled(record: dict) -> None:
        if record["update"] == 3:  # the first of two in its round
            STOP(signal.SIGTERM, None)

    with pytest.raises(Interrupted):
        stopped.run(signalled)
    STOP.number = None
    resumed = restart("stopped")
    assert resumed.resume()
    assert (resumed.update, resumed.part) == (3, 1)
    resumed.run(lambda record: None)
    for key, group in resumed.state_dict()["parameters"].items():
        for ours, theirs in zip(group, expected[key], strict=True):
            assert torch.equal(ours, theirs), key


def test_an_evaluation_that_was_interrupted_is_done_when_the_run_goes_on(tiny_run, monkeypatch) -> None:
    options = (
        "--set",
        "evaluation.at=[1]",
        "--set",
        "train.checkpoint_every=100",
        "--set",
        "evaluation.metrics=[reward]",
    )
    straight = load_file(tiny_run("draft_1", *options, updates=3, folder="straight") / "adapter" / LORA)
    whole = Evaluator.evaluate

    def interrupted(*_: object, **__: object) -> None:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(Evaluator, "evaluate", interrupted)
    with pytest.raises(AssertionError, match="resumes from the last checkpoint"):
        tiny_run("draft_1", *options, updates=3)
    monkeypatch.setattr(Evaluator, "evaluate", whole)
    folder = tiny_run("draft_1", *options, updates=3)
    assert (folder / "rows-at-0000001.parquet").is_file()
    resumed = load_file(folder / "adapter" / LORA)
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


LORA = "pytorch_lora_weights.safetensors"


def test_a_signal_within_a_finaliser_is_not_lost():
    """What is raised there is swallowed."""

    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(1000))  # where the handler runs

    with pytest.raises(Interrupted, match="SIGTERM"), signals_stop():
        Finalised()
        time.sleep(5)


def test_an_error_that_a_library_makes_of_a_signal_is_the_signal():
    with pytest.raises(Interrupted, match="SIGTERM"), signals_stop():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(1000))
        except BaseException as error:
            raise OSError("Unable to load weights") from error
    with pytest.raises(OSError, match="no signal"), signals_stop():
        raise OSError("no signal")
