"""Which runs count, and why others are left out."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from example_rows import PUBLISHED, chosen, fid, report, row, run_folder

from bench.errors import BenchError
from bench.reporting.rows import RANDOM, write_rows
from bench.reporting.selection import collect, settings


def test_a_run_counts_once(tmp_path: Path) -> None:
    """Copies, folders moved aside, paths given twice and a run's own further evaluations change no number."""
    one = run_folder(tmp_path / "runs" / "one", row(), fid())
    run_folder(tmp_path / "runs" / "two", row(seed=1, value=37.25), fid(seed=1))
    before, left_out = collect([tmp_path / "runs"])
    assert not left_out
    again = row(value=99.0), row(metric="vendi", value=3.0)
    (one / "eval-1").mkdir()
    write_rows(one / "eval-1" / "rows.parquet", [row(run="r9", config_hash="other"), again[1]])
    shutil.copytree(one, tmp_path / "runs" / "copy of one")
    run_folder(tmp_path / "runs" / "one.old1", row(value=0.0), row(settings=chosen(optimizer__lr=1.0)))
    after, left_out = collect([tmp_path / "runs", one, one / "rows.parquet"])
    assert not left_out
    assert set(after["metric"]) == {"reward/train", "fid_prior/space", "vendi"}
    after = after[after["metric"] != "vendi"]
    columns = ["settings", "seed", "metric", "budget", "value"]
    keys = columns[:4]
    pd.testing.assert_frame_equal(
        *(frame[columns].sort_values(keys).reset_index(drop=True) for frame in (before, after))
    )
    write_rows(one / "eval-1" / "rows.parquet", [again[0]])
    frame, (told,) = collect([one])
    assert 99.0 not in set(frame["value"])
    assert "with other values; the latter count" in told


def test_unfinished_failed_and_unreadable_runs_are_left_out_with_a_reason(tmp_path: Path) -> None:
    run_folder(tmp_path / "good", row())
    (tmp_path / "good" / "adapter").mkdir()
    shutil.copy(tmp_path / "good" / "config.yaml", tmp_path / "good" / "adapter")  # as a run leaves it
    begun = run_folder(tmp_path / "begun", row(seed=1), finished=False)
    stopped = run_folder(tmp_path / "stopped", row(seed=2), finished=False)
    (stopped / "error.log").write_text("Traceback:\n  somewhere\nValueError: too hot\n")
    run_folder(tmp_path / "empty", row(seed=3))
    (tmp_path / "empty" / "rows.parquet").write_bytes(b"")
    run_folder(tmp_path / "schema", row(seed=4))
    pq.read_table(tmp_path / "good" / "rows.parquet").to_pandas().assign(schema=1).to_parquet(
        tmp_path / "schema" / "rows.parquet"
    )
    failed = row(seed=5, metric="run", value=None, status="failed", direction="none", note="update 3: not finite")
    run_folder(tmp_path / "failed", row(seed=5))
    write_rows(tmp_path / "failed" / "rows.parquet", [failed])
    run_folder(tmp_path / "random", row(seed=6, status=RANDOM))
    frame, left_out = collect([tmp_path])
    assert set(frame["seed"]) == {0, 5}
    assert set(frame.loc[frame["seed"] == 5, "status"]) == {"failed"}  # what it measured before does not enter
    text = "\n".join(left_out)
    assert f"{begun} is unfinished: it has no rows.parquet yet." in text
    assert f"{stopped} is unfinished: ValueError: too hot." in text
    assert "empty/rows.parquet cannot be read" in text
    assert "schema/rows.parquet holds rows of schema 1" in text
    assert "made with random weights" in text
    assert len(left_out) == 5  # and no adapter
    page = report(frame, left_out)
    assert "| 1, 1 failed |" in page
    assert "draft, seed 5, failed: update 3: not finite" in page
    assert all(f"- {sentence}" in page for sentence in left_out)
    run_folder(tmp_path / "later", row(seed=5))  # the same run, begun anew elsewhere
    assert "failed" not in set(collect([tmp_path])[0]["status"])


def test_the_command_reports_what_it_can(tmp_path: Path, bench: Callable[..., tuple[int, str]]) -> None:
    run_folder(tmp_path / "good", row())
    (run_folder(tmp_path / "bad", row(seed=1)) / "rows.parquet").write_bytes(b"PAR1")
    status, text = bench("report", tmp_path)
    assert status == 0, text
    assert "+5.2 [+4.9, +5.6]" in text
    assert "bad/rows.parquet cannot be read" in text
    status, text = bench("report", tmp_path / "bad")
    assert status == 2
    assert "there are no rows to compare." in text
    status, text = bench("report", tmp_path, "--out", tmp_path / "page", "--metrics", "reward/train")
    assert status == 0, text
    assert "bad/rows.parquet cannot be read" in (tmp_path / "page" / "report.md").read_text()


def test_nothing_to_compare_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no result rows found"):
        collect([tmp_path])
    with pytest.raises(BenchError, match="there is no file or folder"):
        collect([tmp_path / "nowhere"])
    run_folder(tmp_path / "begun", row(), finished=False)
    with pytest.raises(ValueError, match=r"no rows to compare\. .*begun is unfinished"):
        collect([tmp_path])


@pytest.mark.slow
def test_published_rows_are_read_whole() -> None:
    frame, left_out = collect([PUBLISHED])
    assert not left_out
    assert {heading.split(" ")[0] for heading, _ in settings(frame)} == {
        "quadratic", "emoji_style", "emoji_clip", "colorfulness", "emoji_preference",
    }  # fmt: skip
