"""Sweeps and published tables by name."""

from pathlib import Path

import pandas as pd
import pytest
from scaffold import ROOT

from bench import report
from bench.reporting.selection import collect
from bench.sweeps.spec import read_sweep

TABLE = "emoji_small_rate"  # the smallest


def test_a_name_means_what_ships(bench, monkeypatch, tmp_path: Path, caplog) -> None:
    shipped, file = ROOT / "results" / "published" / TABLE, ROOT / "bench" / "sweeps" / f"{TABLE}.yaml"
    monkeypatch.chdir(tmp_path)
    pd.testing.assert_frame_equal(report(TABLE), report(shipped))
    assert read_sweep(Path(TABLE)) == read_sweep(file)
    assert read_sweep(Path(TABLE)).out == Path("runs") / TABLE
    assert not caplog.text
    monkeypatch.chdir(shipped.parent)
    report(TABLE)
    assert not caplog.text  # it is the very folder


def test_a_folder_here_wins_and_says_so(monkeypatch, tmp_path: Path, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ring_flow").mkdir()
    rows = ROOT / "results" / "published" / TABLE / "rows.parquet"
    (tmp_path / "ring_flow" / "rows.parquet").write_bytes(rows.read_bytes())
    frame, _ = collect([Path("ring_flow")])
    assert set(frame["model"]) == {"emoji"}
    assert "ring_flow is read from this folder; it is also the name of a published table." in caplog.text
    assert read_sweep(Path("ring_flow")).suite == "ring_flow"  # a folder is no sweep


@pytest.mark.parametrize("given", ["rign", "elsewhere/rign", "rign.yaml"])
@pytest.mark.parametrize(
    ("words", "noun"),
    [
        (["report"], "published table"),
        (["serve"], "published table"),
        (["reproduce"], "published table"),
        (["sweep"], "sweep"),
    ],
)
def test_an_unknown_name_is_one_sentence_with_the_nearest(bench, monkeypatch, tmp_path, words, noun, given) -> None:
    monkeypatch.chdir(tmp_path)
    status, text = bench(*words, given)
    assert status == 2
    assert f" {given}, and no {noun} of that name; did you mean 'ring'?" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("kind", "files"), [("sweeps", "bench/sweeps/*.yaml"), ("published", "results/published/*/rows.parquet")]
)
def test_everything_that_ships_is_listed(bench, kind, files) -> None:
    _, text = bench("ls", kind)
    names = {file.stem if kind == "sweeps" else file.parent.name for file in ROOT.glob(files)}
    assert {line.split()[0] for line in text.splitlines() if line.strip()} >= {kind, "name", *names}
    assert "broken" not in text


def test_reproduce_takes_a_name(bench, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    status, text = bench("reproduce", TABLE, "--method", "ddpo")
    assert status == 2
    assert "no row of" in text and "has method = ddpo" in text
