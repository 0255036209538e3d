"""`bench sweep`: what it plans, what it runs, what it skips."""

from pathlib import Path

import pytest
import yaml

from bench.commands.sweep import plan_sweep, read_sweep
from bench.errors import BenchError
from results.rows import read_rows


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
    with pytest.raises(BenchError, match="cannot read the sweep"):
        read_sweep(tmp_path / "missing.yaml")


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
    assert [line.split()[0] for line in text.splitlines()] == ["begun", "finished"]
    status, text = bench("sweep", write(tmp_path, **spec))
    assert status == 0, text
    assert "1 of 2 runs are finished already" in text
    rows = read_rows(tmp_path / "out")
    good = rows[(rows["method"] == "draft_1") & (rows["status"] == "ok") & (rows["metric"] == "tilt_tv")]
    assert sorted(good["budget"]) == [1, 2]
    assert list(good.sort_values("budget")["reward_calls"]) == [128, 256]
    status, text = bench("report", tmp_path / "out", "--at-updates", 1, "--metrics", "tilt_tv")
    assert status == 0, text
    assert "At most 1 updates a run." in text
    assert "| sampling floor |" in text
