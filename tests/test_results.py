"""Rows survive storage or are refused, tables say what the rows say, pictures show the samples."""

import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from results.plots import plot_curves, plot_samples
from results.report import at_cost, write_report
from results.rows import COLUMNS, read_rows, write_rows
from results.table import comparison_markdown, markdown_table, number, run_table, with_error


def row(**changes: Any) -> dict[str, Any]:
    return {
        "run": "r1",
        "config_hash": "abc",
        "method": "draft",
        "reward": "emoji_clip",
        "model": "emoji",
        "beta": 1.0,
        "prompts": "emoji",
        "evaluation": "e1",
        "seed": 0,
        "budget": 60,
        "budget_unit": "updates",
        "metric": "reward/train",
        "metric_version": 1,
        "value": 35.25,
        "prior": 30.0,
        "difference": 5.25,
        "standard_error": 0.125,
        "n": 64,
        "direction": "higher",
        "unit": "",
        "note": "",
        "status": "ok",
        "revision": "0123abc",
        "dirty": None,
        "packages": "{}",
        "hardware": "cpu",
        "updates": 60,
        "reward_calls": 960,
        "reward_gradients": 960,
        "network_forwards": 10_000,
        "network_backwards": 2_000,
        "wall_seconds": 150.0,
        "train_seconds": 120.0,
        "peak_memory_bytes": 2**30,
    } | changes


def fid(**changes: Any) -> dict[str, Any]:
    floor = {"metric": "fid_prior/space", "value": 90.0, "prior": 70.0, "difference": 20.0, "standard_error": None}
    return row(**({"direction": "lower"} | floor | changes))


# --- rows -----------------------------------------------------------------------------------------------------------


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


def test_results_import_neither_torch_nor_bench() -> None:
    code = "import sys, results.rows, results.table, results.plots; print({'torch', 'bench'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- tables ---------------------------------------------------------------------------------------------------------


def test_numbers_are_legible() -> None:
    assert [number(x) for x in (None, float("nan"), 0.0, 1234567.0, 0.012345)] == [
        "–",
        "–",
        "0",
        "1,234,567",
        "0.01235",
    ]
    assert with_error(5.25, 0.125, sign=True) == "+5.25 ± 0.12"
    assert with_error(-1234.4, 56.0) == "-1,234 ± 56"
    assert with_error(0.000123, 0.00001) == "0.000123 ± 0.000010"
    assert with_error(2.0, None, sign=True) == "+2"


def test_run_table_shows_value_error_floor_and_refusal() -> None:
    refused = row(metric="tilt_gap", value=None, prior=None, direction="lower", unit="nats", note="refused: few")
    console = Console(width=80, record=True, file=StringIO())
    console.print(run_table([row(), fid(), refused]))
    lines = console.export_text().splitlines()
    names = ("reward/train ↑", "fid_prior/space ↓", "tilt_gap [nats] ↓")
    text = {name: next(line for line in lines if name in line) for name in names}
    assert "+5.25 ± 0.12" in text["reward/train ↑"]
    assert "70*" in text["fid_prior/space ↓"]
    assert "* the floor" in "\n".join(lines)
    assert "floor" not in text["reward/train ↑"]
    assert "– " in text["tilt_gap [nats] ↓"]
    assert "tilt_gap: refused: few" in [line.strip() for line in lines]


def test_markdown_table_survives_storage_and_pipes(tmp_path: Path) -> None:
    rows = [row(), fid(note="a|b")]
    write_rows(tmp_path / "rows.parquet", rows)
    text = markdown_table(rows)
    assert text == markdown_table(read_rows(tmp_path))
    assert text.splitlines()[2] == "| reward/train ↑ | 30 | 35.25 | +5.25 ± 0.12 | 64 |  |"
    assert r"a\|b" in text


def comparison(*rows: dict[str, Any]) -> list[str]:
    return comparison_markdown(pd.DataFrame(rows)).splitlines()


def test_comparison_of_methods() -> None:
    ddpo = {"run": "r2", "method": "ddpo", "wall_seconds": 30.0, "updates": 200, "budget": 200}
    ddpo |= {"value": 32.0, "difference": 2.0}
    kl = {"metric": "path_kl", "unit": "nats", "direction": "lower", "value": 5.25, "prior": 0.0}
    failed = {"run": "r3", "method": "broken", "value": None, "status": "failed"}
    lines = comparison(row(), fid(), row(**kl), row(**ddpo), row(**failed))
    headings = (
        "| method | reward/train ↑ | fid_prior/space ↓ | path_kl [nats] ↓ | updates | reward calls | time | seeds |"
    )
    assert lines[0] == headings
    assert lines[2] == "| prior | 30 | 70 (floor) | 0 |  |  |  |  |"
    assert lines[3] == "| draft | 35.25 (+5.25 ± 0.12) | 90 | 5.25 ± 0.12 | 60 | 960 | 2.5 min | 1 |"
    assert lines[4] == "| ddpo | 32 (+2.00 ± 0.12) | – | – | 200 | 960 | 30 s | 1 |"
    assert lines[5] == "| broken | failed | failed | failed |  |  |  |  |"


def test_comparison_over_seeds_takes_the_error_over_seeds() -> None:
    second = {"run": "r2", "seed": 1, "value": 37.25, "difference": 7.25}
    earlier = {**second, "budget": 30, "value": 0.0}
    lines = comparison(row(), row(**second), row(**earlier))
    assert lines[3] == "| draft | 36.2 ± 1.0 | 60 | 960 | 2.5 min | 2 |"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": "colorfulness"}, "one reward"),
        ({"model": "other"}, "one model"),
        ({"metric_version": 2}, "versions or sample counts of reward/train"),
        ({"n": 8}, "versions or sample counts of reward/train"),
    ],
)
def test_comparison_refuses_to_mix(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        comparison(row(), row(run="r2", **change))


def test_comparison_without_values_is_an_error() -> None:
    with pytest.raises(ValueError, match="no row has a value of vendi"):
        comparison_markdown(pd.DataFrame([row()]), ["vendi"])


# --- plots ----------------------------------------------------------------------------------------------------------


def test_samples_show_the_prior_above_the_finetuned(tmp_path: Path) -> None:
    prior, finetuned = np.zeros((2, 3, 3, 32, 32, 3), np.uint8)
    prior[..., 0] = finetuned[..., 2] = 255
    prompts = ["a $red$ apple", "long " * 60, "cat"]
    plot_samples(prior, finetuned, prompts, tmp_path / "samples.png", "title", np.ones((3, 3)), np.zeros((3, 3)))
    pixels = matplotlib.image.imread(tmp_path / "samples.png")[..., :3]
    red, blue = ((pixels == color).all(2) for color in ([1, 0, 0], [0, 0, 1]))
    assert red.mean() > 0.15
    assert red.mean() == pytest.approx(blue.mean(), rel=0.02)
    columns = red.any(0) & blue.any(0)
    # below the first red pixel of a column comes its blue one: the finetuned strip lies under the prior's
    assert (red.argmax(0) < blue.argmax(0))[columns].all()
    assert columns.mean() > 0.4


@pytest.mark.parametrize("updates", [1, 40])
def test_curves_are_drawn(tmp_path: Path, updates: int) -> None:
    generator = np.random.default_rng(0)
    log = pd.DataFrame({name: generator.normal(1, 0.1, updates) for name in ("reward", "loss", "seconds/sample")})
    log["update"] = np.arange(updates)
    plot_curves(log, tmp_path / "three.png", "title")
    plot_curves(log.drop(columns="loss"), tmp_path / "two.png")
    three, two = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("three", "two"))
    assert three.shape[1] == pytest.approx(1.5 * two.shape[1], abs=2)
    assert (two.std(2) > 0.1).mean() > 1e-4  # something coloured was drawn


# Comparing at equal cost, and the report ------------------------------------------------------------------------------


def budgets() -> pd.DataFrame:
    """Two methods with three evaluations each, one twice as dear, and one without training."""
    rows = []
    for method, calls in (("cheap", 10), ("dear", 20)):
        for seed in range(2):
            for update, value in ((10, 1.0), (20, 2.0), (40, 4.0)):
                cost = {"budget": update, "updates": update, "reward_calls": update * calls}
                rows.append(row(run=f"{method}{seed}", method=method, seed=seed, value=value + seed, **cost))
    rows.append(row(run="best", method="best_of_n", value=9.0, budget=0, updates=0, reward_calls=0))
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("cost", "limit", "expected", "short"),
    [
        ("updates", 20, {"cheap": 20, "dear": 20, "best_of_n": 0}, []),
        ("updates", 39, {"cheap": 20, "dear": 20, "best_of_n": 0}, []),
        ("reward_calls", 400, {"cheap": 40, "dear": 20, "best_of_n": 0}, []),
        ("reward_calls", 150, {"cheap": 10, "best_of_n": 0}, ["dear"]),  # its first evaluation had cost 200
        ("reward_calls", 900, {"cheap": 40, "dear": 40, "best_of_n": 0}, ["cheap"]),  # it ended at 400
    ],
)
def test_comparison_at_equal_cost(cost: str, limit: int, expected: dict[str, int], short: list[str]) -> None:
    chosen, told = at_cost(budgets(), cost, limit)
    assert dict(zip(chosen["method"], chosen["budget"], strict=True)) == expected
    assert told == short


def test_the_floor_is_a_row_of_its_own() -> None:
    least = row(metric="reward/train/floor", value=0.5, prior=None, difference=None, direction="none")
    lines = comparison(row(), least)
    assert lines[0].startswith("| method | reward/train ↑ | updates |")
    assert lines[3] == "| sampling floor | 0.5 |  |  |  |  |"


def test_report_writes_a_page_and_its_figures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    run = tmp_path / "runs" / "cheap0"
    run.mkdir(parents=True)
    np.savez(
        run / "points.npz", **{name: rng.normal(size=(50, 2)) for name in ("target", "prior", "finetuned")},
        density=np.ones((20, 20)), extent=np.array([-3.0, 3, -3, 3]),
    )  # fmt: skip
    page = write_report(budgets(), [tmp_path / "runs"], tmp_path / "out", None, "updates", 20)
    text = page.read_text()
    assert "At most 20 updates a run." in text
    assert "| cheap | 2.50 ± 0.50 " in text
    figures = re.findall(r"\]\((.*?)\)", text)
    assert figures == ["methods-0.png", "budgets-0.png", "points-0.png"]
    for name in figures:
        image = plt.imread(tmp_path / "out" / name)
        assert min(image.shape[:2]) > 150
        assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20
