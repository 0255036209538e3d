"""The least KL of a setting: drawn, cached, written where reports look, and right on the ring."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.config import resolve
from bench.evaluation.evaluator import Evaluator
from bench.models.analytic import RingModel
from bench.prompts import load_prompts
from bench.reporting.frontier import FILE, read
from bench.runs.build import build_core, evaluation_core
from bench.runs.frontier import trace_core
from bench.runtime.digests import source_of

pytestmark = pytest.mark.usefixtures("undrawn")


def exact(beta: float) -> tuple[float, float]:
    """Gain and KL of the ring's tilt by β under `−‖x − (3,0)‖²/6`, summed over a grid."""
    axis = torch.linspace(-5, 5, 601, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    prior = torch.softmax(RingModel(dtype=torch.float64).log_density(points), 0)
    rewards = -((points - torch.tensor([3.0, 0.0])) ** 2).sum(1) / 6
    target = torch.softmax(prior.log() + beta * rewards, 0)
    gain = float(target @ rewards - prior @ rewards)
    return gain, float(target @ (target.log() - prior.log()).nan_to_num())


def test_the_command_writes_what_reports_read(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    small = ("--set", "evaluation.samples_per_prompt=256", "--set", "evaluation.at=[]")
    small += (
        "--set",
        "sampler.final_alpha=null",
    )  # more noise in the finished sample would widen the exact prior's modes
    status, text = bench("run", "rtb", "--model", "ring", "--updates", 3, "--out", "runs/rtb", *small)
    assert status == 0, text
    assert read(Path("runs/rtb") / FILE)[0].samples == 8192  # a run on points has its own
    status, text = bench("frontier", "runs", "--samples", 10_000)
    assert status == 0, text
    (curve,) = read(Path("runs") / FILE)
    for beta in (0.1, 0.2, 0.5):  # further out the 20 steps of the sampler show
        gain, kl = exact(beta)
        least = curve.least(np.array([gain]))
        assert least["kl"][0] == pytest.approx(kl, rel=0.06)
        assert least["beta"][0] == pytest.approx(beta, rel=0.1)
    status, text = bench("report", "runs", "--format", "md")
    assert status == 0, text
    assert "| path_kl [nats] ↓ | efficiency ↓ |" in text
    assert "from 10,000 prior samples a prompt" in text
    for words in (("runs", "--model", "ring"), ("nowhere",), ("--model", "ring", "--samples", 5)):
        status, text = bench("frontier", *words)
        assert status == 2, words
        assert "Traceback" not in text


def test_more_samples_draw_only_what_is_missing(tmp_path: Path) -> None:
    config = resolve("prior", overrides={"model.name": "ring"})
    core = replace(evaluation_core(build_core(config), config), sample_batch=8)
    evaluator = Evaluator(core, config, load_prompts(config.prompts.name), tmp_path)
    few = evaluator.prior_rewards("", 16)
    before = core.meter.total()["network_forwards"]
    more = evaluator.prior_rewards("", 24)
    assert core.meter.total()["network_forwards"] - before == 8 * core.kernel.steps
    assert torch.equal(more[:16], few)
    assert torch.equal(evaluator.prior_rewards("", 24), more)


def test_another_reward_of_the_same_name_is_scored_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that was edited."""
    config = resolve("prior", overrides={"model.name": "ring"})
    evaluator = Evaluator(
        evaluation_core(build_core(config), config), config, load_prompts(config.prompts.name), tmp_path
    )
    evaluator.prior_rewards("", 8)
    reward = evaluator.rewards[config.reward.name]
    monkeypatch.setattr(type(reward), "__call__", lambda self, points, prompts: torch.full((len(points),), 7.0))
    assert not evaluator.prior_rewards("", 8).eq(7).any()  # not edited, as far as its file says
    monkeypatch.setattr("bench.evaluation.evaluator.source_of", lambda cls: "edited")
    assert evaluator.prior_rewards("", 8).eq(7).all()
    assert "def source_of" in source_of(type("New", (), {"__module__": source_of.__module__}))


def test_samples_without_a_score_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve("rtb", suite="ring")
    core = evaluation_core(build_core(config), config)
    scores = Evaluator.prior_rewards

    def some(self, *arguments):
        found = scores(self, *arguments)
        found[::10] = torch.nan
        return found

    monkeypatch.setattr(Evaluator, "prior_rewards", some)
    curve = trace_core(core, config, load_prompts(config.prompts.name, rule=config.prompts.split), 1000)
    assert curve.samples == 900
    assert np.isfinite(curve.least(np.array([0.5]))["kl"][0])
