"""A sweep on a real cluster of two nodes, one of which is lost."""

import threading
import time
from pathlib import Path

import pytest
import yaml

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from bench.reporting.rows import read_rows  # noqa: E402
from bench.runs.log import last_record  # noqa: E402


@pytest.mark.slow
def test_a_lost_nodes_runs_go_on_elsewhere_and_every_row_is_there_once(
    tmp_path: Path, bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = {"train.updates": 300, "evaluation.samples_per_prompt": 64, "train.checkpoint_every": 10}
    spec = {"suite": "ring", "methods": ["draft_1"], "seeds": 3, "set": settings, "out": str(tmp_path / "out")}
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    lost = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    killed: list[dict[str, int]] = []

    def kill() -> None:
        """Once both nodes are at work and have checkpoints."""
        while len(known := {f.parent.name: last_record(f.parent) for f in tmp_path.glob("out/*/log.jsonl")}) < 2 or any(
            record is None or record["update"] < 30 for record in known.values()
        ):
            time.sleep(0.1)
        cluster.remove_node(lost, allow_graceful=False)
        killed.append({name: record["update"] for name, record in known.items()})

    threading.Thread(target=kill, daemon=True).start()
    try:
        status, text = bench("sweep", path, "--on", "ray", "--address", cluster.address)
    finally:
        cluster.shutdown()
    assert status == 0, text
    assert len(killed[0]) == 2
    assert max(killed[0].values()) < 300
    logs = [log.read_text() for log in (tmp_path / "out" / "logs").iterdir()]
    assert sum("Resuming after update" in log for log in logs) == 1  # the lost one, which did not begin anew
    rows = read_rows(sorted((tmp_path / "out").glob("*/rows.parquet")))
    assert sorted(rows["seed"].unique()) == [0, 1, 2]
    assert not rows.duplicated(["run", "metric", "budget"]).any()
    assert set(rows["status"]) <= {"ok", "refused"}
    assert set(rows["updates"]) == {300}
    for folder in rows["run"].unique():
        updates = [record["update"] for record in map(yaml.safe_load, (tmp_path / "out" / folder / "log.jsonl").open())]
        assert updates == list(range(1, 301))
