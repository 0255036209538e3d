"""Tuning in stages: rates × strength, the envelope of gain and KL, more samples for ties, wider grids, the seeds."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from reporting.example_rows import row
from rich.console import Console

from bench import registry
from bench.diagnose.nfe import rows_of_update
from bench.errors import BenchError
from bench.method import TILT, Strength
from bench.options import leaves
from bench.registry import Plugin
from bench.reporting.envelopes import FLOOR
from bench.reporting.rows import read_rows, write_rows
from bench.sweeps.choosing import configurations
from bench.sweeps.envelope import choose, evaluations
from bench.sweeps.jobs import plan_sweep, plan_trials
from bench.sweeps.spec import Sweep, read_sweep
from bench.sweeps.sweep import plan, trial_budget, tune
from bench.sweeps.tune import Tune, extended

RATES = [1e-3, 4e-3]
RULE: dict[str, Any] = {"grid": {"optimizer.lr": RATES}, "strength": True, "seed": 9, "envelope": "reward/train"}


def spec(folder: Path, **changes: Any) -> Sweep:
    rule = RULE | changes.pop("tune", {})
    own = {"suite": "ring", "methods": ["draft", "adjoint_matching"], "seeds": 2, "out": folder / "out"} | changes
    return Sweep(**own, tune=rule)


# --- the trials -----------------------------------------------------------------------------------------------------


def test_every_method_is_tried_at_every_rate_with_its_own_strength(tmp_path: Path) -> None:
    trials = plan_trials(spec(tmp_path))
    tried = {key.split()[0]: [values for _, values in jobs] for key, jobs in trials.items()}
    assert {name: len(values) for name, values in tried.items()} == {"draft": 8, "adjoint_matching": 8}
    assert {values["method.kl"] for values in tried["draft"]} == {0.0, 0.25, 1.0, 4.0}
    assert {values["reward.beta"] for values in tried["adjoint_matching"]} == {0.125, 0.25, 0.5, 1.0}  # the ring's: 0.5
    assert all({v["optimizer.lr"] for v in values} == set(RATES) for values in tried.values())
    configs = [job.config for jobs in trials.values() for job, _ in jobs]
    assert {config.seed for config in configs} == {9}
    assert all(config.evaluated_at() != [config.train.updates] for config in configs)  # early stopping is in it
    single = plan_trials(spec(tmp_path, tune={"envelope": None, "largest": "reward/train"}))
    assert all(job.config.evaluated_at() == [400] for jobs in single.values() for job, _ in jobs)


class Plain(registry.load("methods", "draft")):
    """A plugin that nothing but early stopping keeps near the prior."""

    strength = None


class Tilted(Plain):
    """One that declares a strength."""

    strength = Strength("optimizer.weight_decay", (0.0, 0.1, 0.2, 0.4))


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.plugins("methods"), "plain", Plugin(f"{__name__}:Plain", "mine"))
    monkeypatch.setitem(registry.plugins("methods"), "tilted", Plugin(f"{__name__}:Tilted", "mine"))


@pytest.mark.usefixtures("plugins")
def test_a_plugins_strength_is_tuned_and_one_without_gets_as_many_trials(tmp_path: Path) -> None:
    several = spec(tmp_path, methods=["plain", "tilted"])
    for widenings in ([], [{"strength": ["largest"]}, {"optimizer.lr": ["smallest"]}]):
        trials = plan_trials(several, widenings)
        assert len({len(jobs) for jobs in trials.values()}) == 1
    (plain, tilted) = plan_trials(several).values()
    rates = [values["optimizer.lr"] for _, values in plain]
    assert (rates[0], rates[-1], len(set(rates))) == (*RATES, 8)
    assert {values["optimizer.weight_decay"] for _, values in tilted} == {0.0, 0.1, 0.2, 0.4}


def test_an_equal_budget_gives_every_method_its_updates(tmp_path: Path) -> None:
    budget = 250_000
    few = {"grid": {"optimizer.lr": RATES[:1]}}
    equal = spec(tmp_path, nfe=budget, methods=["draft", "draft_kl", "adjoint_matching", "ddpo"], tune=few)
    jobs = [job for jobs in plan_trials(equal).values() for job, _ in jobs]
    assert len({job.config.train.updates for job in jobs}) > 3
    for job in jobs:
        spent = rows_of_update(job.config) * job.config.train.updates
        assert budget * 0.97 < spent <= budget
    text = trial_budget(equal)
    assert "4 × 4 trials, each of" in text
    assert "makes them equal" not in text
    assert "makes them equal" in trial_budget(spec(tmp_path, methods=["draft", "ddpo"], tune=few))


def test_an_equal_budget_gives_all_seeds_as_many_updates(tmp_path: Path) -> None:
    """Also of a method whose choice of steps, and so the NFE of an update, depends on the seed."""
    own = {"suite": "emoji_flow", "methods": ["nabla_gfn"], "reward": "emoji_style"}
    jobs = plan_sweep(Sweep(**own, seeds=8, nfe=30_000, out=tmp_path))
    assert len(jobs) == 8
    assert len({job.config.train.updates for job in jobs}) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tune": {"grid": {"method.kl": [1.0]}}}, "give values of optimizer.lr"),
        ({"tune": {"at_most": {"path_kl": 1}}}, "an envelope has all gains"),
        ({"tune": {"largest": "path_kl"}}, "name one metric, under smallest:, under largest: or under envelope:"),
        ({"set": {"method.kl": 1.0}, "methods": ["draft"]}, "draft: method.kl is tuned as its strength, and given too"),
        ({"tune": {"grid": {"optimizer.lr": RATES, "reward.beta": [1.0]}}}, "reward.beta is tuned as its strength"),
        ({"tune": {"set": {"evaluation.metrics": ["reward"]}}}, "'path_kl' is not measured"),
        ({"nfe": 1000, "set": {"train.updates": 5}}, "train.updates under set: nfe gives it"),
    ],
)
def test_what_contradicts_the_stages_is_told(changes: dict, words: str, tmp_path: Path) -> None:
    tree = {"suite": "ring", "methods": ["draft", "adjoint_matching"], "out": str(tmp_path / "out")} | changes
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree | {"tune": RULE | changes.get("tune", {})}))
    with pytest.raises(BenchError) as caught:
        plan(read_sweep(path))
    assert words in str(caught.value)


# --- the envelope ---------------------------------------------------------------------------------------------------


def points(*pairs: tuple[float, float], error: float = 0.0) -> list[dict[str, float]]:
    return [{"gain": g, "kl": kl, "gain_interval": error, "kl_interval": error} for g, kl in pairs]


def test_the_envelope_takes_what_reaches_a_gain_at_the_least_kl() -> None:
    near, far, worse = points((1, 1), (2, 8)), points((2, 6), (4, 9)), points((1, 2), (3, 10))
    taken, shares, ties = choose([worse, near, far], 3)
    assert (taken, ties) == ([2, 1], [])
    assert shares == pytest.approx([3 / 3.6, 0.6 / 3.6])  # of the gains from a tenth of the largest on
    assert choose([worse, near, far], 1)[0] == [2]  # it reaches more
    assert choose([worse, points((-1, 3))], 2)[0] == [0]
    assert choose([points((-2, 3)), points((-1, 9))], 2) == ([1], [1.0], [])


def test_what_is_not_clearly_beaten_is_a_tie() -> None:
    one, other = points((2, 1), (4, 3), error=0.2), points((1.9, 1.1), (4, 3.1), error=0.2)
    assert choose([one, other], 2)[2] == [1]
    exact = [[point | {"gain_interval": 0.01, "kl_interval": 0.01} for point in trial] for trial in (one, other)]
    assert choose(exact, 2)[2] == []


TRIAL = st.lists(st.tuples(st.floats(-1, 5), st.floats(0, 50)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(TRIAL, min_size=1, max_size=5))
def test_all_configurations_of_the_envelope_together_are_the_envelope(trials: list[list[tuple[float, float]]]) -> None:
    whole = [points(*trial) for trial in trials]
    taken, shares, ties = choose(whole, len(whole))
    assert len(set(taken)) == len(taken)
    assert not set(taken) & set(ties)
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    top = max(g for trial in trials for g, _ in trial)

    def least(places: list[int], gain: float) -> float:
        return min((kl for i in places for g, kl in trials[i] if g >= gain), default=math.inf)

    if top > 0:
        for gain in np.linspace(FLOOR * top, top, 7):
            assert least(taken, gain) == least(list(range(len(trials))), gain)


def test_evaluations_are_read_with_their_intervals() -> None:
    def at(updates: int, gain: float, kl: float | None) -> list[dict[str, Any]]:
        same = {"budget": updates, "degrees": 1e9}
        return [row(difference=gain, **same), row(metric="path_kl", value=kl, standard_error=0.5, **same)]

    (found,) = evaluations(pd.DataFrame([*at(10, 1.5, 3.0), *at(20, 2.0, None)]), "reward/train")
    assert found == pytest.approx(
        {"updates": 10, "gain": 1.5, "gain_interval": 1.96 * 0.125, "kl": 3.0, "kl_interval": 0.98}, rel=1e-3
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=4, unique=True),
    st.booleans(),
    st.sampled_from(["smallest", "largest"]),
)
def test_a_wider_grid_goes_on_in_the_same_ratio(values: list[float], zero: bool, side: str) -> None:
    values = sorted(values)
    wide = extended([0.0] * zero + values, side)
    assert wide == sorted(wide)
    assert len(wide) == len(values) + zero + 1
    positive = [value for value in wide if value]
    new, end, inner = (
        (positive[0], values[0], values[1]) if side == "smallest" else (positive[-1], values[-1], values[-2])
    )
    assert new / end == pytest.approx(end / inner, rel=1e-5)


def test_relative_strengths_are_factors_of_what_is_set() -> None:
    rule = Tune(**RULE)
    assert {v["reward.beta"] for v in rule.points(TILT, 20.0)} == {5.0, 10.0, 20.0, 40.0}
    assert {v["reward.beta"] for v in rule.points(TILT, 20.0, [{"strength": ["largest"]}])} == {
        5.0,
        10.0,
        20.0,
        40.0,
        80.0,
    }


# --- the stages -----------------------------------------------------------------------------------------------------


class Scripted:
    """An engine whose runs end at once, with gain and KL as a formula of their settings has them."""

    slots = 3

    def __init__(self, noise: float = 0.0):
        self.noise, self.runs, self.started = noise, {}, []
        self.jobs: dict[Path, dict[str, Any]] = {}

    def start(self, arguments: list[str], folder: Path, log: Path) -> Path:
        chosen = {}
        for word in arguments:
            key, _, value = word.removeprefix("--").partition("=")
            chosen[key] = value
        rate, samples = float(chosen["optimizer.lr"]), int(chosen.get("evaluation.samples_per_prompt", 4096))
        weight = float(chosen.get("method.kl", 0)) or 0.1 / float(chosen.get("reward.beta", 1))
        gain = 1 / (0.1 + weight) * math.exp(-((math.log(rate / 4e-3)) ** 2))  # the best rate is the largest offered
        error = self.noise * gain * (64 / samples) ** 0.5
        folder.mkdir(parents=True, exist_ok=True)
        same = {"run": folder.name, "seed": int(chosen["seed"]), "degrees": 100.0, "settings": json.dumps(chosen)}
        for name, updates, share in (("rows-at-0000100", 100, 0.5), ("rows", 400, 1.0)):
            found = {"reward/train": {"difference": share * gain}, "path_kl": {"value": share**2 * gain}}
            rows = [row(budget=updates, metric=m, standard_error=error, **v, **same) for m, v in found.items()]
            write_rows(folder / f"{name}.parquet", rows)
        self.started.append(folder)
        self.runs[folder] = log
        return folder

    def wait(self, seconds: float) -> dict[Path, int]:
        ended = dict.fromkeys(self.runs, 0)
        self.runs.clear()
        return ended

    def stop(self, number: int) -> None:
        self.runs.clear()


QUIET = Console(quiet=True)


def test_winners_at_an_edge_widen_the_grid_of_every_method(tmp_path: Path) -> None:
    staged, engine = spec(tmp_path, tune={"widen": 2, "most": 2}), Scripted()
    choices, failed = tune(staged, QUIET, engine)
    assert not failed
    tree = yaml.safe_load((staged.out / "tuned.yaml").read_text())
    assert tree["widened"]
    counts = {len(choice["trials"]) for choice in choices.values()}
    assert len(counts) == 1 and counts.pop() > 8  # as many for each
    rates = {trial["values"]["optimizer.lr"] for choice in choices.values() for trial in choice["trials"]}
    assert ("optimizer.lr" in tree["widened"][0]) == (len(rates) > 2)
    for choice in choices.values():
        assert 1 <= len(configurations(choice)) <= 2
        assert all(len(trial["evaluations"]) == 2 for trial in choice["trials"])
    started = len(engine.started)
    assert tune(staged, QUIET, engine)[0] == choices  # from the file: no trial is run again
    assert len(engine.started) == started
    jobs = plan_sweep(staged, choices)
    assert len(jobs) == 2 * sum(len(configurations(choice)) for choice in choices.values())
    assert {job.config.seed for job in jobs} == {0, 1}
    for job in jobs:
        chosen = dict(leaves(job.config.model_dump()))
        (choice,) = (one for one in choices.values() if one["method"] == job.config.method.name)
        assert any(all(chosen[key] == value for key, value in own.items()) for own in configurations(choice))


def test_the_cost_has_trials_that_a_wider_grid_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a strength the rates lie elsewhere in it."""
    monkeypatch.setitem(registry.plugins("methods"), "plain", Plugin(f"{__name__}:Plain", "mine"))
    rule = {"envelope": None, "largest": "reward/train", "widen": 1}
    staged, engine = spec(tmp_path, methods=["plain"], tune=rule), Scripted()
    (choice,) = tune(staged, QUIET, engine)[0].values()
    kept, replaced = ({trial["run"] for trial in choice[name]} for name in ("trials", "replaced"))
    assert replaced and not replaced & kept
    assert kept | replaced == {path.name for path in engine.started}
    assert choice["cost"]["runs"] == len(engine.started)
    (read,) = tune(staged, QUIET, engine)[0].values()  # from the file
    assert read == choice


def test_a_grid_that_cannot_grow_stays_as_it_is(tmp_path: Path) -> None:
    """The first of equals wins, which is the largest share that there is."""
    grid = {"optimizer.lr": [4e-3], "train.beta_warmup": [1.0, 0.25]}
    staged = spec(tmp_path, methods=["draft"], tune={"grid": grid, "widen": 1, "strength": False})
    console = Console(record=True, width=300)
    (choice,) = tune(staged, console, Scripted())[0].values()
    assert choice["edge"] == {"train.beta_warmup": "largest"}
    assert len(choice["trials"]) == 2
    assert "cannot grow: train.beta_warmup (largest)" in console.export_text()


def test_ties_are_decided_by_more_samples_and_an_interrupted_stage_goes_on(tmp_path: Path) -> None:
    staged = spec(tmp_path, methods=["draft"], set={"evaluation.samples_per_prompt": 64}, tune={"resolve": 16})
    noisy = Scripted(noise=0.3)
    choices, _ = tune(staged, QUIET, noisy)
    (choice,) = choices.values()
    again = {trial["run"] for trial in choice["again"]}
    assert again and not again & {trial["run"] for trial in choice["trials"]}
    assert choice["cost"]["runs"] == 8 + len(again)
    samples = {path.name: path for path in noisy.started}
    for run in again:
        chosen = json.loads(read_rows(samples[run] / "rows.parquet")["settings"].iloc[0])
        assert chosen["evaluation.samples_per_prompt"] == str(16 * 64)
    assert all(own in [trial["values"] for trial in choice["again"]] for own in configurations(choice))
    assert "ties again with 16 times the samples" in yaml.safe_load((staged.out / "tuned.yaml").read_text())["rule"]

    lost = samples[sorted(again)[0]]
    (lost / "rows.parquet").unlink()  # as if it had been interrupted there
    (staged.out / "tuned.yaml").unlink()
    resumed = Scripted(noise=0.3)
    assert tune(staged, QUIET, resumed)[0] == choices
    assert resumed.started == [lost]


def test_a_small_verdict_from_trials_to_the_table(tmp_path: Path, bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tree = yaml.safe_load((Path(registry.__file__).parent / "sweeps" / "verdict_ring.yaml").read_text())
    tree |= {"methods": ["draft_kl"], "seeds": 1, "nfe": 30_000, "out": str(tmp_path / "out")}
    tree["set"] = {"evaluation.samples_per_prompt": 64, "evaluation.at": [0.5]}
    tree["tune"] |= {"grid": {"optimizer.lr": [8e-3]}, "most": 1, "widen": 0, "resolve": 1}
    path = tmp_path / "verdict.yaml"
    path.write_text(yaml.safe_dump(tree))
    status, text = bench("sweep", path)
    assert status == 0, text
    assert "Tuning: 1 × 4 trials, each of" in text
    (choice,) = yaml.safe_load((tmp_path / "out" / "tuned.yaml").read_text())["choices"]
    assert [len(trial["evaluations"]) for trial in choice["trials"]] == [2] * 4
    final = read_rows(sorted((tmp_path / "out").glob("draft_kl-*/rows.parquet")))
    (chosen,) = map(json.loads, final["settings"].unique())
    assert {key: chosen[key] for key in choice["chosen"][0]} == choice["chosen"][0]
