"""How long a run will take, said before and while it runs."""

import re
import time
from pathlib import Path

import pytest

from bench.config import resolve
from bench.runs.duration import Pace, seconds_left, seconds_of_one, sweep_time, time_text
from bench.settings import RunConfig

SMALL = ("train.updates=4", "evaluation.samples_per_prompt=64", "evaluation.metrics=[reward]", "evaluation.at=[2]")


def ring(method: str = "rtb", *assignments: str) -> RunConfig:
    return resolve(method, overrides={"model.name": "ring"}, assignments=[*SMALL, *assignments])


def test_what_is_left_is_counted_in_updates_and_evaluations() -> None:
    pace, config = Pace(update=3.0, sample=0.5), ring()
    assert seconds_left(config, pace, samples=10) == (12, 17.5)  # two evaluations, and three sets of the prior
    assert seconds_left(config, pace, samples=10, done=2) == (6, 5)
    assert seconds_left(config, pace, samples=10, done=4) == (0, 0)
    assert seconds_left(ring("best_of_n"), Pace(0.0, 0.5), samples=10) == (0, 12.5)  # a baseline ends with its only one
    assert time_text(59, 3541) == "about 1 h 00 min (training 59 s, evaluation 59 min)"


def test_the_pace_of_a_run_is_read_from_its_log() -> None:
    """A tenth of a second a row: a ring's sample of the evaluation is 20 steps of the policy and of the prior."""
    record = {"update": 2, "network_forwards": 90, "network_backwards": 10, "seconds/evaluation": 100.0}
    record |= {"seconds/rollout": 6.0, "seconds/losses": 3.0, "seconds/backward": 1.0, "seconds/checkpoint": 50.0}
    pace = Pace.of(ring(), record)
    assert (pace.update, pace.sample) == (5, pytest.approx(4))


def test_trying_a_piece_leaves_nothing(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pace = Pace.measured(ring())
    assert pace.update > 0 and pace.sample > 0
    assert Pace.measured(ring("best_of_n")).update == 0
    assert not list(tmp_path.iterdir())


def test_a_method_that_samples_with_a_network_of_its_own_is_tried() -> None:
    pace = Pace.measured(ring("value_matching"))
    assert pace.update > 0 and pace.sample > 0


def test_a_dry_run_and_a_sweep_say_the_time(bench, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Pace, "measured", lambda config: tried.append(config) or Pace(60.0, 0.0))
    tried: list[RunConfig] = []
    sets = [word for setting in SMALL for word in ("--set", setting)]
    status, text = bench("run", "rtb", "--model", "ring", "--dry-run", *sets)
    assert status == 0, text
    assert "time: about 4 min (training 4 min, evaluation 0 s)" in text
    tried.clear()
    runs = [ring("rtb", "seed=1"), ring("rtb", "optimizer.lr=0.1"), ring("draft_1"), ring("rtb", "train.updates=8")]
    assert sweep_time(runs, at_once=2) == "about 20 min of runs, 10 min with 2 at once; 0.33 thread-hours"
    assert len(tried) == 3
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "suite: ring\nmethods: [prior, rtb]\nseeds: 2\nset: {train.updates: 30}\nworkers: 2\n"
        "tune: {grid: {optimizer.lr: [0.1, 0.2, 0.3]}, seed: 9, smallest: tilt_sw2}\n"
    )
    _, text = bench("sweep", spec, "--dry-run")
    # three of them trials
    assert "Time: 7 runs to do: about 3 h 30 min of runs, 1 h 45 min with 2 at once; 3.5 thread-hours." in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "updates"),
    [
        (["rtb", "--model", "ring"], 400),
        (["draft_1", "--model", "ring"], 400),
        (["nabla_gfn", "--reward", "colorfulness"], 6),
    ],
)
def test_the_time_is_right_within_a_factor_of_two(bench, monkeypatch, tmp_path: Path, arguments, updates) -> None:
    """On a machine whose load stays the same; the libraries are loaded already. Generous: three."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def seconds(text: str, before: str) -> float:
        (amount,) = re.findall(rf"^{before}about (\d+) (s|min)", text, re.M)
        return int(amount[0]) * (60 if amount[1] == "min" else 1)

    options = [*arguments, "--updates", str(updates)]
    expected = seconds(bench("run", *options, "--dry-run")[1], "time: ")
    start = time.monotonic()
    status, text = bench("run", *options, "--out", tmp_path / "run")
    taken = time.monotonic() - start
    assert status == 0, text
    assert taken / 3 < expected < 3 * taken
    assert seconds(text, "Left: ") < 3 * taken


def test_what_pieces_of_every_size_need_is_not_multiplied(monkeypatch) -> None:
    """Half a second for anything, and a thousandth for each unit."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work(units: int) -> None:
        clock[0] += 0.5 + units / 1000

    assert seconds_of_one(work, first=4, most=100_000) == pytest.approx(0.001, rel=0.5)
    assert seconds_of_one(work, first=4, most=10) == pytest.approx(0.051)  # all there are
    assert seconds_of_one(lambda units: work(20_000 * units), first=1, most=10) == pytest.approx(20.5)  # tried once
