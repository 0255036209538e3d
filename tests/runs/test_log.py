"""A run's files: broken lines are named, a full disk is an error."""

import json
from pathlib import Path

import pytest

from bench import config
from bench.errors import BenchError
from bench.runs.folder import is_finished
from bench.runs.log import UpdateLog, read_log


def test_broken_files_of_a_run_are_named_in_one_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for text in ("", "a: [", "method: 3", "\x00"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(BenchError, match=r"config\.yaml is not the configuration of a run"):
            config.read(tmp_path / "config.yaml")
    (tmp_path / "rows.parquet").write_bytes(b"")
    assert not is_finished(tmp_path)  # the same command evaluates again
    (tmp_path / "log.jsonl").write_text('{"update": 1, "loss": 2.5}\n{"upda\n[3]\n{"update": 3}\n{"update": 4, "lo')
    assert list(read_log(tmp_path)["update"]) == [1, 3]
    assert f"line 2 of {tmp_path / 'log.jsonl'} is broken" in caplog.text
    with UpdateLog(tmp_path, 1) as log:
        log.write({"update": 2, "loss": 1.5})
    assert [json.loads(line)["update"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_tensorboard_is_an_error_of_the_run_and_no_traceback(tmp_path, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), UpdateLog(tmp_path, 0) as log:
        monkeypatch.setattr(RecordWriter, "write", full)
        for update in range(1, 1000):
            log.write({"update": update, "loss": 0.5})
            log._writer.flush()
