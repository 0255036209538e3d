"""`bench sweep`: what it plans, what it runs, what it skips."""

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from bench.errors import BenchError
from bench.reporting.rows import read_rows
from bench.reporting.selection import collect
from bench.runs.log import last_record
from bench.runtime.files import locked
from bench.sweeps.choosing import COST, choose, total
from bench.sweeps.jobs import plan_sweep
from bench.sweeps.spec import read_sweep
from bench.sweeps.sweep import make_engine, plan, reserved
from bench.sweeps.tune import Tune
from bench.sweeps.tuned_file import other_choices, write_choices


def write(folder: Path, **spec: object) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def value_of(arguments: list[str], key: str) -> str:
    """The last value that a run's arguments give to a setting: later ones win."""
    return [word.partition("=")[2] for word in arguments if word.startswith(f"{key}=")][-1]


def test_the_plan_is_the_product_and_later_settings_win(tmp_path: Path) -> None:
    path = write(
        tmp_path, suite="ring", methods=["rtb", "draft"], seeds=[3, 5], set={"optimizer.lr": 1e-3, "train.updates": 7},
        settings={"rtb": {"optimizer.lr": 2e-3, "reward.beta": 2.0}}, grid={"reward.beta": [0.5, 1.5]},
    )  # fmt: skip
    spec = read_sweep(path)
    assert spec.out == Path("runs/small")
    jobs = plan_sweep(spec)
    assert len(jobs) == len({job.folder for job in jobs}) == 8
    found = {
        (
            job.arguments[1], value_of(job.arguments, "--seed"), value_of(job.arguments, "reward.beta"),
            value_of(job.arguments, "optimizer.lr"), value_of(job.arguments, "train.updates"),
        )
        for job in jobs
    }  # fmt: skip
    rates = {"rtb": "0.002", "draft": "0.001"}
    expected = {(f"--method={m}", s, b, rates[m], "7") for m in rates for s in "35" for b in ("0.5", "1.5")}
    assert found == expected
    assert all(job.state == "new" for job in jobs)


def test_mistakes_are_told_all_at_once_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(BenchError) as caught:
        read_sweep(write(tmp_path, methods=[], sedes=3, workers=0))
    assert all(word in str(caught.value) for word in ("methods", "sedes", "workers"))
    with pytest.raises(BenchError, match="settings for ddpo"):
        read_sweep(write(tmp_path, methods=["rtb"], settings={"ddpo": {}}))
    impossible = {"methods": ["draft", "rtb", "rbt"], "reward": "jpeg_compressibility", "set": {"train.update": 3}}
    with pytest.raises(BenchError) as caught:
        plan_sweep(read_sweep(write(tmp_path, **impossible)))
    assert all(word in str(caught.value) for word in ("draft: ", "train.update", "unknown method 'rbt'"))
    with pytest.raises(BenchError, match="needs the gradient"):
        plan_sweep(read_sweep(write(tmp_path, methods=["draft"], reward="jpeg_compressibility")))
    (tmp_path / "broken.yaml").write_text("methods: [rtb", encoding="utf8")
    for name, words in {"missing": "there is no file", "broken": "cannot read the sweep"}.items():
        with pytest.raises(BenchError, match=words):
            read_sweep(tmp_path / f"{name}.yaml")


SEVERAL = {"suite": "ring", "methods": ["rtb", "draft_1"]}
RULE = {
    "grid": {"optimizer.lr": [1e-4, 1e-3]}, "seed": 9, "smallest": "tilt_sw2",
    "set": {"evaluation.samples_per_prompt": 128},
}  # fmt: skip
IMPOSSIBLE: dict[str, tuple[dict, str]] = {
    "no seed": ({"seeds": 0}, "seeds"),
    "an empty list of seeds": ({"seeds": []}, "seeds"),
    "a negative count": ({"seeds": -1}, "seeds"),
    "half a seed": ({"seeds": [0.5]}, "seeds.0 = 0.5"),
    "a seed that is a whole float": ({"seeds": [1.0]}, "seeds.0 = 1.0"),
    "a seed that is a word": ({"seeds": ["1"]}, "seeds.0 = '1'"),
    "a count that is a bool": ({"seeds": True}, "seeds = True"),
    "a seed twice": ({"seeds": [3, 4, 3]}, "3 stands there twice"),
    "a method twice": ({"methods": ["rtb", "rtb"]}, "'rtb' stands there twice"),
    "a tracker twice": ({"track": ["wandb", "wandb"]}, "'wandb' stands there twice"),
    "no values": ({"grid": {"reward.beta": []}}, "grid.reward.beta"),
    "a value twice": ({"grid": {"reward.beta": [1, 2, 1.0]}}, "grid.reward.beta = [1, 2, 1.0]: 1.0 stands there twice"),
    "a value twice, written otherwise": (
        {"grid": {"reward.beta": [1, "1"]}}, r'rtb: reward.beta = "1" makes the same run as reward.beta = 1:',
    ),
    "a value twice, in a group": (
        {"grid": {"train": [{"micro_batch": 1}, {"micro_batch": 2}]}}, "train.* makes the same run as",
    ),
    "an unknown setting": ({"set": {"train.update": 3}}, "train.update"),
    "another method's setting": ({"settings": {"rtb": {"method.depth": 1}}}, "rtb: unknown setting 'method.depth'"),
    "a word for a number": ({"set": {"optimizer.lr": "fast"}}, "optimizer.lr = 'fast'"),
    "not a number": ({"set": {"optimizer.lr": math.nan}}, "optimizer.lr = 'nan'|optimizer.lr = '.nan'"),
    "an infinite value of a grid": ({"grid": {"reward.beta": [1, math.inf]}}, "reward.beta = "),
    "no update": ({"set": {"train.updates": 0}}, "train.updates = 0"),
    "half an update": ({"set": {"train.updates": 0.5}}, "train.updates = 0.5"),
    "an evaluation after the end": ({"set": {"evaluation.at": [500]}}, "lies beyond train.updates"),
    "a metric that there is not": ({"set": {"evaluation.metrics": ["fid"]}}, "unknown metric 'fid'"),
    "a reward that there is not": ({"set": {"evaluation.rewards": ["score"]}}, "unknown reward 'score'"),
    "a reward of images on points": ({"set": {"evaluation.rewards": ["colorfulness"]}}, "scores images"),
    "seeds among the settings": ({"set": {"seed": 3}}, "seed under set: give it as seeds"),
    "threads among the settings": ({"settings": {"rtb": {"train": {"threads": 2}}}}, "train.threads under settings of"),
    "methods in a grid": ({"grid": {"method.name": ["rtb", "ddpo"]}}, "method.name under grid: give it as methods"),
    "rewards in a grid": ({"grid": {"reward": ["linear"]}}, "reward under grid: give it as reward"),
    "a setting twice": ({"set": {"optimizer.lr": 1, "optimizer": {"lr": 2}}}, "optimizer.lr is given twice under set"),
    "more threads than cores": ({"threads": 4096}, "this machine has"),
    "a tracker that is not installed": ({"track": ["comet_ml"]}, "comet_ml"),
    "a folder that is a file": ({"out": __file__}, "is no folder"),
    "a folder in a file": ({"out": f"{__file__}/a/b"}, "is no folder"),
    "a metric of tuning that there is not": ({"tune": RULE | {"smallest": "tilt_sw3"}}, "'tilt_sw3' is not measured"),
    "a split that there is not": ({"tune": RULE | {"smallest": "reward/test"}}, "did you mean 'reward/train'"),
    "another feature space": ({"tune": RULE | {"smallest": "kid_prior/inception_v3"}}, "inception_v3' is not"),
    "a metric that is not measured": ({"tune": RULE | {"smallest": "path_kl_steps/01"}}, "add 'path_kl_steps' to"),
    "a metric that trials leave out": (
        {"tune": RULE | {"set": {"evaluation.metrics": ["reward"]}}}, "add 'tilt_sw2' to",
    ),
    "a metric without a value": (
        {"tune": RULE | {"smallest": "tilt_gap", "set": {"evaluation.samples_per_prompt": 30}}},
        "'tilt_gap' has no value in this setting: refused",
    ),
    "a bound's metric that there is not": ({"tune": RULE | {"at_most": {"path_lk": 2}}}, "did you mean 'path_kl'"),
    "a bound that is no number": ({"tune": RULE | {"at_least": {"path_kl": math.inf}}}, "at_least.path_kl"),
    "bounds that exclude each other": (
        {"tune": RULE | {"at_most": {"path_kl": 1}, "at_least": {"path_kl": 2}}}, "both bounds of path_kl",
    ),
    "no rule": ({"tune": {"grid": RULE["grid"], "seed": 9}}, "name one metric"),
    "two rules": ({"tune": RULE | {"largest": "path_kl"}}, "name one metric"),
    "no values to try": ({"tune": RULE | {"grid": {"optimizer.lr": []}}}, "tune.grid.optimizer.lr"),
    "a value to try twice": ({"tune": RULE | {"grid": {"optimizer.lr": [1e-4, 1e-4]}}}, "0.0001 stands there twice"),
    "the table's seed": ({"tune": RULE | {"seed": 0}}, "seed = 0 is a seed of the table"),
    "no update of a trial": ({"tune": RULE | {"updates": 0}}, "tune.updates = 0"),
    "two numbers of updates": (
        {"tune": RULE | {"updates": 5, "set": {"train": {"updates": 4}}}}, "train.updates of a trial",
    ),
    "tuned and set": ({"tune": RULE, "set": {"optimizer": {"lr": 1e-3}}}, "is tuned, and stands under set"),
    "a trial's seed among the settings": ({"tune": RULE | {"set": {"seed": 4}}}, "seed under tune.set"),
    "an evaluation after a trial's end": (
        {"tune": RULE | {"updates": 5, "set": {"evaluation.at": [6]}}}, "lies beyond train.updates = 5",
    ),
    "a run that is impossible though its trials are not": (
        {"tune": RULE, "set": {"evaluation.at": [500]}}, "lies beyond",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_is_impossible_is_told_before_anything_runs(case: str, tmp_path: Path) -> None:
    changed, words = IMPOSSIBLE[case]
    with pytest.raises(BenchError, match=words.replace("[", r"\[")):
        plan(read_sweep(write(tmp_path, **SEVERAL | {"out": str(tmp_path / "out")} | changed)))
    assert not (tmp_path / "out").exists()


def test_a_plain_sweep_with_every_part_is_possible(tmp_path: Path) -> None:
    whole = {"grid": {"reward.beta": [1, 2]}, "seeds": [4, 2], "tune": RULE | {"at_most": {"path_kl/late": 2}}}
    jobs = plan(read_sweep(write(tmp_path, **SEVERAL, **whole, out=str(tmp_path / "out"))))
    assert len(jobs) == 2 * 2 * 2  # trials of both methods at both points; the runs wait for the choice


def test_a_later_setting_wins_however_it_is_written(tmp_path: Path) -> None:
    layers = {"set": {"optimizer.lr": 1e-3}, "settings": {"rtb": {"optimizer": {"lr": 2e-3}}}}
    spec = read_sweep(write(tmp_path, **SEVERAL, **layers, grid={"optimizer.lr": [3e-3, 4e-3]}))
    assert {job.config.optimizer.lr for job in plan_sweep(spec)} == {3e-3, 4e-3}


@pytest.mark.parametrize(
    "text", ["", "- 1", "methods: [rtb]\nmethods: [ddpo]", "methods: [rtb]\nset: {a: 1, a: 2}", "{"]
)
def test_a_file_that_is_no_sweep_is_told_in_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    with pytest.raises(BenchError, match=r"^cannot read the sweep .*\.$") as caught:
        read_sweep(path)
    assert "\n" not in str(caught.value)


def test_a_sweep_has_its_folder_and_its_engine_to_itself(tmp_path: Path, bench) -> None:
    path = write(tmp_path, suite="ring", methods=["prior"], out=str(tmp_path / "out"))
    with reserved(read_sweep(path), create=True):
        for options, listed in (((), False), (("--dry-run",), True)):
            status, text = bench("sweep", path, *options)
            assert (status, "another sweep is at work" in text, "new " in text) == (2, True, listed)
    status, text = bench("sweep", path, "--dry-run", "--address", "here:1")
    assert (status, "give --on ray too" in text) == (2, True)
    with pytest.raises(BenchError, match="gpus = 4096 a run"):
        make_engine(read_sweep(write(tmp_path, suite="ring", methods=["prior"], gpus=4096)), "local", None)


def test_choices_of_another_sweep_are_kept_or_else_refused(tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "out" / "tuned.yaml"
    spec = {"suite": "ring", "out": str(out), "tune": RULE}
    tune = read_sweep(write(tmp_path, methods=["rtb"], **spec)).tune
    other = {"method": "ddpo", "at": {}, "trials": [], "cost": total([])}
    out.mkdir()
    write_choices(path, tune, [other])
    plan(read_sweep(write(tmp_path, methods=["rtb"], **spec)))
    assert other_choices(path, tune, ["rtb {}"]) == [other]
    changed = spec | {"tune": RULE | {"seed": 8}}
    with pytest.raises(BenchError, match=r"choices of another sweep, tuned otherwise \(ddpo\)"):
        plan(read_sweep(write(tmp_path, methods=["rtb"], **changed)))
    plan(read_sweep(write(tmp_path, methods=["ddpo"], **changed)))  # its own, to be chosen again


def test_a_sweep_runs_skips_and_reports_failures(tmp_path: Path, bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = {"train.updates": 2, "evaluation.samples_per_prompt": 64, "evaluation.at": [1]}
    spec = {"suite": "ring", "methods": ["draft_1", "prior"], "set": small, "workers": 2, "out": str(tmp_path / "out")}
    broken = {"settings": {"draft_1": {"optimizer.lr": 1e30}}}
    path = write(tmp_path, **spec, **broken)
    status, text = bench("sweep", path)
    assert status == 1
    assert "failed: draft_1-seed0" in text
    assert "not finite" in text
    assert "1 of 2 runs are in" in text
    status, text = bench("sweep", path, "--dry-run")
    assert [line.split()[0] for line in text.splitlines()] == ["begun", "finished", "Time:"]
    status, text = bench("sweep", write(tmp_path, **spec))
    assert status == 0, text
    assert "1 of 2 runs are finished already" in text
    rows = read_rows(tmp_path / "out")
    good = rows[(rows["method"] == "draft_1") & (rows["status"] == "ok") & (rows["metric"] == "tilt_tv")]
    assert sorted(good["budget"]) == [1, 2]
    assert list(good.sort_values("budget")["reward_calls"]) == [128, 256]
    status, text = bench("report", tmp_path / "out", "--at-updates", 1, "--metrics", "tilt_tv", "--format", "md")
    assert status == 0, text
    assert "at 1 updates" in text
    assert "| sampling floor |" in text


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_an_interrupted_sweep_stops_its_runs_with_checkpoints(tmp_path: Path, engine: str) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    spec = {"suite": "ring", "methods": ["draft_1"], "seeds": 3, "workers": 2, "out": str(tmp_path / "out")}
    path = write(tmp_path, set={"train.updates": 3000, "evaluation.samples_per_prompt": 64}, **spec)
    command = [sys.executable, "-m", "bench", "sweep", str(path), "--on", engine]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sweep:
        end = time.monotonic() + 240
        while sum(last_record(log.parent) is not None for log in tmp_path.glob("out/*/log.jsonl")) < 2:
            assert time.monotonic() < end
            time.sleep(0.2)
        sweep.send_signal(signal.SIGINT)
        text = sweep.communicate(timeout=120)[0]
    assert sweep.returncode == 130, text
    assert "The same command resumes" in text
    begun = sorted(folder.parent for folder in tmp_path.glob("out/*/config.yaml"))
    assert len(begun) == 2  # the third run was not begun
    for folder in begun:
        with locked(folder):  # nobody is at work there any more
            assert list((folder / "checkpoints").iterdir())
        log = (tmp_path / "out" / "logs" / f"{folder.name}.log").read_text()
        assert "Stopping after this update" in log
        assert last_record(folder)["update"] < 3000


@pytest.mark.slow
def test_runs_end_with_a_sweep_that_was_killed_and_the_next_sweep_resumes_them(tmp_path: Path) -> None:
    spec = {"suite": "ring", "methods": ["draft_1"], "seeds": 1, "out": str(tmp_path / "out")}
    path = write(tmp_path, set={"train.updates": 100_000, "evaluation.samples_per_prompt": 64}, **spec)
    command = [sys.executable, "-m", "bench", "sweep", str(path)]
    (job,) = plan_sweep(read_sweep(path))

    def wait_until(holds: Callable[[], bool]) -> None:
        end = time.monotonic() + 240
        while not holds():
            assert time.monotonic() < end
            time.sleep(0.2)

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        wait_until(lambda: last_record(job.folder) is not None)
        killed.kill()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sweep:
        wait_until(lambda: job.log.is_file() and "Resuming after" in job.log.read_text())
        sweep.send_signal(signal.SIGINT)
        text = sweep.communicate(timeout=120)[0]
    assert sweep.returncode == 130, text
    assert "failed" not in text


SMALL = {"train.updates": 2, "evaluation.samples_per_prompt": 64}


def tuned_spec(folder: Path, **tune: object) -> dict:
    rule = {"grid": {"optimizer.lr": [1e30, 1e-4, 1e-2]}, "seed": 9, "largest": "reward/train", **tune}
    return {"suite": "ring", "methods": ["draft_1", "prior"], "set": SMALL, "out": str(folder / "out"), "tune": rule}


def test_tuning_runs_trials_chooses_and_trains_with_the_choice(
    tmp_path: Path, bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path, **tuned_spec(tmp_path))
    status, text = bench("sweep", path)
    assert status == 0, text
    assert "Tuning: largest reward/train, seed 9." in text
    file = tmp_path / "out" / "tuned.yaml"
    (choice,) = yaml.safe_load(file.read_text())["choices"]  # of the prior there is nothing to tune
    values = {trial["values"]["optimizer.lr"]: trial["reward/train"] for trial in choice["trials"]}
    assert values[1e30] is None  # it diverged, which is a result
    assert choice["chosen"]["optimizer.lr"] == max((1e-4, 1e-2), key=values.get)
    assert all(trial["path_kl"] >= 0 for trial in choice["trials"][1:])  # what the rule does not look at is kept too
    assert choice["cost"]["runs"] == 3
    assert choice["cost"]["reward_calls"] == 2 * 2 * 128 + choice["trials"][0]["reward_calls"]
    final = read_rows(sorted((tmp_path / "out").glob("draft_1-*/rows.parquet")))
    (settings,) = final["settings"].unique()
    assert yaml.safe_load(settings)["optimizer.lr"] == choice["chosen"]["optimizer.lr"]
    assert collect([tmp_path / "out"])[0]["seed"].unique().tolist() == [0]  # trials are no part of a table
    assert set(collect([tmp_path / "out" / "tune"])[0]["seed"]) == {9}
    before = file.read_bytes()
    status, text = bench("sweep", path)
    assert (status, file.read_bytes()) == (0, before)
    assert "2 of 2 runs are finished already" in text
    states = [line.split()[0] for line in bench("sweep", path, "--dry-run")[1].splitlines()]
    assert states == ["finished", "finished"]  # the choice is made, its trials are not needed again


def trial(run: str, rate: float, status: str = "ok", **values: float | None) -> tuple[str, dict, pd.DataFrame]:
    costs = dict.fromkeys(COST, 10)
    error = {"standard_error": 0.3, "degrees": 20.0}  # with Student's factor of 2.09 ± 0.63, 0.89 for a difference
    rows = [
        {"metric": m, "value": v, "budget": 5, "status": status, "note": "boom", **error, **costs}
        for m, v in values.items()
    ]
    early = [{**row, "budget": 1, "value": 99.0} for row in rows]
    return run, {"optimizer.lr": rate}, pd.DataFrame([*early, *rows])


def test_a_grid_of_lists_has_no_edge() -> None:
    trials = [(name, {"method.start": value}, rows) for name, value, rows in (
        ("a", [0.0, 1.0], trial("a", 1e-4, r=1.0)[2]), ("b", [1.0, 2.0], trial("b", 1e-4, r=2.0)[2]),
    )]  # fmt: skip
    tune = Tune(grid={"method.start": [[0.0, 1.0], [1.0, 2.0]]}, seed=1, largest="r")
    assert choose(tune, "m", trials)["edge"] == {}


def test_the_rule_of_tuning() -> None:
    rates = [1e-4, 1e-3, 1e-2, 1e-1]
    trials = [
        trial("a", 1e-4, r=1.0, d=9.0), trial("b", 1e-3, r=2.0, d=5.0), trial("c", 1e-2, r=3.0, d=4.0),
        trial("d", 1e-1, "failed", r=None),
    ]  # fmt: skip

    def chosen(count: int = 4, **rule: object) -> dict:
        return choose(Tune(grid={"optimizer.lr": rates}, seed=1, **rule), "m", trials[:count])

    best = chosen(largest="r")
    assert (best["chosen"], best["edge"], best["within"]) == ({"optimizer.lr": 1e-2}, {}, True)
    assert best["cost"] == {**dict.fromkeys(best["cost"], 40), "runs": 4}
    assert best["trials"][3]["failed"] == "boom"
    assert best["ties"] == []  # one apart, which is more than 0.89
    assert chosen(smallest="d")["ties"] == []
    noisy = [*trials[:3], trial("d", 1e-1, r=2.5, d=9.0)]
    assert choose(Tune(grid={"optimizer.lr": rates}, seed=1, largest="r"), "m", noisy)["ties"] == [
        {"optimizer.lr": 1e-1}
    ]
    bounded = Tune(grid={"optimizer.lr": rates}, seed=1, largest="r", at_most={"d": 6})
    assert choose(bounded, "m", noisy)["ties"] == []  # a trial beyond the bounds could not have been chosen
    assert chosen(smallest="r")["edge"] == {"optimizer.lr": "smallest"}
    assert chosen(largest="r", at_least={"d": 4.5})["chosen"] == {"optimizer.lr": 1e-3}
    assert chosen(largest="r", at_most={"r": 1.5})["chosen"] == {"optimizer.lr": 1e-4}
    nearest = chosen(largest="r", at_least={"d": 10})
    assert (nearest["chosen"], nearest["within"]) == ({"optimizer.lr": 1e-4}, False)
    for error in (math.nan, 0.0):  # a distance between sets of samples has no error
        exact = [(run, values, rows.assign(standard_error=error)) for run, values, rows in trials[:3]]
        assert choose(Tune(grid={"optimizer.lr": rates}, seed=1, largest="r"), "m", exact)["chosen"] == best["chosen"]
    with pytest.raises(BenchError, match="'q'"):
        chosen(largest="q")
    with pytest.raises(BenchError, match="no trial of m has a value"):
        choose(Tune(grid={"optimizer.lr": rates}, seed=1, largest="r"), "m", trials[3:])
