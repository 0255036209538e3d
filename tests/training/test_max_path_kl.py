"""`train.max_path_kl`: training ends when the policy is too far from the prior."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.reporting.rows import read_rows
from bench.runs.log import UpdateLog, read_log

pytestmark = pytest.mark.usefixtures("undrawn")

SETTINGS = (
    "evaluation.samples_per_prompt=64", "evaluation.metrics=[reward,path_kl]", "evaluation.at=[]",
    "train.samples_per_prompt=32", "train.checkpoint_every=1", "optimizer.lr=0.01",
)  # fmt: skip
BOUND = "train.max_path_kl=2"
WATCHED = 16 * 20 * 2  # NFE per round: samples × steps × policy and prior


@pytest.fixture
def ring(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(method: str, out: str, *settings: str, updates: int = 30) -> tuple[int, str]:
        sets = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
        return bench("run", method, "--model", "ring", "--updates", updates, "--out", tmp_path / out, *sets)

    return call


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "analytic.safetensors").read_bytes()


@pytest.mark.parametrize(("method", "bound", "lag"), [("draft_1", 2, 1), ("nft", 0.5, 0)])
def test_a_maximiser_ends_where_an_unbounded_run_is_then(ring, bench, tmp_path, method, bound, lag) -> None:
    status, text = ring(method, "bounded", f"train.max_path_kl={bound}", f"train.data_lag={lag}")
    assert status == 0, text
    log, rows = read_log(tmp_path / "bounded"), read_rows(tmp_path / "bounded" / "rows.parquet").set_index("metric")
    made = len(log)
    assert 2 <= made < 30
    assert (log["path_kl"][:-1] <= bound).all() and log["path_kl"].iloc[-1] > bound
    assert ring(method, "free", f"train.data_lag={lag}", updates=made)[0] == 0
    assert adapter(tmp_path / "bounded") == adapter(tmp_path / "free")
    free = read_rows(tmp_path / "free" / "rows.parquet").set_index("metric")
    assert list(rows["value"]) == list(free["value"])
    assert set(rows["updates"]) == {made}
    spent = free["network_forwards"] + WATCHED * made
    assert list(rows["network_forwards"]) == list(spent)
    assert f"training ended after update {made} of 30" in rows.loc["path_kl", "note"]
    assert rows.loc["path_kl", "value"] == pytest.approx(log["path_kl"].iloc[-1], rel=0.3)
    assert json.loads(rows["settings"].iloc[0])["train.max_path_kl"] == bound
    assert set(rows["method"]) == {f"{method} (until {bound} nats)"}
    assert bench("eval", tmp_path / "bounded", "--set", "evaluation.samples_per_prompt=32")[0] == 0
    (again,) = (tmp_path / "bounded").glob("eval-*/rows.parquet")
    assert set(read_rows(again)["updates"]) == {made}


def test_a_bounded_run_resumes_to_the_bit(ring, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash in training, and after one between the end of training and the rows."""
    assert ring("draft_1", "straight", BOUND)[0] == 0
    ended = tmp_path / "ended"
    shutil.copytree(tmp_path / "straight", ended)
    (ended / "rows.parquet").unlink()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        write = UpdateLog.write
        patch.setattr(UpdateLog, "write", lambda self, record: write(self, record) if record["update"] < 2 else 1 / 0)
        ring("draft_1", "crashed", BOUND)
    straight = read_rows(tmp_path / "straight" / "rows.parquet")
    for name in ("crashed", "ended"):
        status, text = ring("draft_1", name, BOUND)
        assert status == 0, text
        assert "Resuming after update" in text
        rows = read_rows(tmp_path / name / "rows.parquet")
        assert adapter(tmp_path / name) == adapter(tmp_path / "straight")
        columns = ["metric", "value", "note", "updates", "network_forwards", "reward_calls"]
        assert rows[columns].equals(straight[columns])


def test_an_unbounded_log_has_no_path_kl(ring, tmp_path) -> None:
    assert ring("draft_1", "free", updates=1)[0] == 0
    assert "path_kl" not in read_log(tmp_path / "free")


@pytest.mark.parametrize(
    ("method", "setting", "words"),
    [
        ("prior", BOUND, "'prior' trains nothing"),
        ("draft_1", "sampler.eta=0", "use sampler.eta > 0"),
        ("draft_1", "sampler.final_alpha=1", "train.max_path_kl needs transition densities"),
        ("draft_1", "train.max_path_kl=0", "greater than 0"),
    ],
)
def test_what_has_no_path_kl_is_refused(ring, tmp_path, method, setting, words) -> None:
    status, text = ring(method, "out", BOUND, setting)
    assert status == 2
    assert words in text
    assert not (tmp_path / "out").exists()
