"""Rows survive storage or are refused."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_rows import fid, row

from bench import config, registry
from bench.metric import Metric
from bench.prompts import load_prompts
from bench.reporting.rows import COLUMNS, read_rows, write_rows
from bench.runs.rows import comparable_settings, evaluation_id

FLOATS = [name for name, column in COLUMNS.items() if pa.types.is_floating(column.type)]


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    rows = [row(), row(metric="tilt_gap", value=None, standard_error=None, status="refused", note="few samples")]
    (tmp_path / "a").mkdir()
    write_rows(tmp_path / "a" / "rows.parquet", rows)
    write_rows(tmp_path / "b.parquet", [row(run="r2")])
    frame = read_rows(tmp_path)
    assert list(frame) == list(COLUMNS)
    assert list(frame["run"]) == ["r1", "r1", "r2"]
    first = frame.iloc[0].drop("schema").to_dict()
    assert first == row()
    assert np.isnan(frame["value"][1])
    assert frame["note"][1] == "few samples"
    assert len(read_rows([tmp_path / "b.parquet"])) == len(read_rows(tmp_path / "b.parquet")) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({key: value for key, value in row().items() if key != "seed"}, "missing columns seed"),
        (row(sead=1), "unknown columns sead"),
        (row(n=None), "empty columns n"),
        (row(seed="zero"), "wrong type"),
        (row(direction="up"), "direction 'up'"),
        (row(status="fine"), "status 'fine'"),
    ],
)
def test_malformed_rows_are_refused(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_rows(tmp_path / "rows.parquet", [row(), bad])
    assert not list(tmp_path.iterdir())


def test_rows_of_another_schema_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_rows(path, [row()])
    table = pq.read_table(path).to_pandas()
    for changed in (table.assign(schema=99), table.assign(extra=1), table.drop(columns="schema")):
        changed.to_parquet(path)
        with pytest.raises(ValueError, match=r"rows\.parquet holds rows of schema"):
            read_rows(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no rows", b"PAR1" + b"x" * 99 + b"PAR1"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read \(.+\): remove it"):
        read_rows(tmp_path)


def test_rows_of_schema_2_are_given_what_metrics_declare(tmp_path: Path) -> None:
    """What was published before is read as what the metrics' classes declare now."""
    later = {"share_tv", "within_mode", "target_sw2", "prior_nll", "tilt_within"}  # than schema 2
    names = [*(name for name in registry.BUILT_IN["metrics"] if name not in later), "run"]
    path = tmp_path / "rows.parquet"
    write_rows(path, [row(metric=f"{name}/space") for name in names])
    old = pq.read_table(path).drop_columns(["support", "prior_is_best"])
    old = old.set_column(0, "schema", pa.array([2] * len(old), pa.int32()))
    pq.write_table(old, path)
    frame = read_rows(path)
    classes = [registry.load("metrics", name) for name in names[:-1]] + [Metric]
    assert list(frame["support"]) == [one.support for one in classes]
    assert list(frame["prior_is_best"]) == [one.prior_is_best for one in classes]
    assert set(frame["schema"]) == {3}
    write_rows(path, frame.to_dict("records"))
    pd.testing.assert_frame_equal(read_rows(path), frame)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", FLOATS)
def test_a_number_that_is_none_is_named(tmp_path: Path, column: str, number: float, bench) -> None:
    path = tmp_path / "rows.parquet"
    with pytest.raises(ValueError, match=f"{column} of fid_prior/space of the run r1 after 60 updates is {number}"):
        write_rows(path, [row(), fid(**{column: number})])
    assert not path.exists()
    write_rows(path, [row(), fid()])
    table = pq.read_table(path)
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array([1.0, number], pa.float64())), path)
    for command in ("report", "reproduce"):
        status, text = bench(command, path)
        assert (status, f"{column} of fid_prior/space of the run r1 after 60 updates is {number}" in text) == (2, True)


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path)


def test_a_full_disk_leaves_the_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "rows.parquet"
    write_rows(path, [row()])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_rows(path, [row(), row()])
    assert len(read_rows(tmp_path)) == 1


def test_reporting_imports_neither_torch_nor_the_core() -> None:
    code = (
        "import sys, bench.reporting.rows, bench.reporting.table, bench.reporting.plots, bench.reporting.report;"
        "print({'torch', 'diffusers', 'bench.core'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_settings_of_a_row_leave_out_what_makes_no_other_run() -> None:
    def described(*assignments: str) -> tuple[str, dict[str, Any]]:
        own = config.resolve("rtb", suite="ring", assignments=list(assignments))
        return evaluation_id(own, load_prompts(own.prompts.name)), comparable_settings(own)

    same = ("seed=3", "evaluation.at=[5, 7]", "evaluation.metrics=[path_kl]", "evaluation.rewards=[linear]")
    assert described(*same, "train.micro_batch=7", "train.threads=1") == described()
    (plain, settings_), (other, changed) = described(), described("evaluation.samples_per_prompt=64")
    assert plain != other
    assert {key for key in settings_ if settings_[key] != changed[key]} == {"evaluation.samples_per_prompt"}
    assert described("optimizer.lr=1", "train.updates=40")[0] == plain
    assert described("optimizer.lr=1")[1]["optimizer.lr"] == 1
    assert settings_["method.name"] == "rtb"
