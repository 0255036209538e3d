"""Rows survive storage or are refused, tables say what the rows say, pictures show the samples."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from scaffold import ROOT

from bench import config, registry
from bench.errors import BenchError
from bench.metric import Metric
from bench.prompts import load_prompts
from bench.reporting import report as reports
from bench.reporting.budgets import at
from bench.reporting.figures.methods import plot_methods
from bench.reporting.formats import interval, markdown
from bench.reporting.identity import identified
from bench.reporting.leaderboard import Board, leaderboard, selected
from bench.reporting.plots import plot_curves, plot_samples
from bench.reporting.report import Question, sections, write_report
from bench.reporting.rows import COLUMNS, RANDOM, read_rows, write_rows
from bench.reporting.selection import collect, settings
from bench.reporting.table import is_clear, number, run_table, with_error
from bench.runs.folder import is_finished
from bench.runs.log import UpdateLog, read_log
from bench.runs.rows import comparable_settings, evaluation_id

PUBLISHED = ROOT / "results" / "published"
COSTS = (
    "NFE | backward NFE | reward calls | reward gradients | training time [s] | n |"  # the columns that end every table
)


def chosen(**changes: Any) -> str:
    """Settings of a row; a double underscore stands for the dot."""
    own = {"optimizer.lr": 0.002, "train.updates": 60, "evaluation.seed": None, "evaluation.samples_per_prompt": 8}
    return json.dumps(own | {key.replace("__", "."): value for key, value in changes.items()}, sort_keys=True)


def row(**changes: Any) -> dict[str, Any]:
    return {
        "run": "r1",
        "config_hash": "abc",
        "settings": chosen(),
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
        "degrees": 3.0,
        "n": 64,
        "direction": "higher",
        "support": "real",
        "prior_is_best": False,
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
    own = {"support": "positive", "prior_is_best": True}
    own |= {"metric": "fid_prior/space", "value": 90.0, "prior": 70.0, "difference": 20.0, "standard_error": None}
    return row(**({"direction": "lower"} | own | changes))


def floor(**changes: Any) -> dict[str, Any]:
    own = {"support": "positive", "prior_is_best": True}
    own |= {"metric": "fid_prior/space/floor", "value": 65.0, "prior": None, "difference": None, "standard_error": 2.0}
    return row(**({"direction": "none"} | own | changes))


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


FLOATS = [name for name, column in COLUMNS.items() if pa.types.is_floating(column.type)]


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


# --- tables ---------------------------------------------------------------------------------------------------------


def test_numbers_are_legible() -> None:
    shown = [number(x) for x in (None, float("nan"), 0.0, -0.0, 1234567.0, 0.012345)]
    assert shown == ["–", "–", "0", "0", "1,234,567", "0.01235"]
    assert with_error(5.25, 0.125, sign=True) == "+5.25 ± 0.12"
    assert with_error(-1234.4, 56.0) == "-1,234 ± 56"
    assert with_error(0.000123, 0.00001) == "0.000123 ± 0.000010"
    assert with_error(2.0, None, sign=True) == "+2"
    assert with_error(0.3164, 0.0) == "0.3164 ± 0"
    assert with_error(0.0, 0.0) == "0 ± 0"


def test_run_table_shows_value_error_floor_and_refusal() -> None:
    refused = row(metric="tilt_gap", value=None, prior=None, direction="lower", unit="nats", note="refused: few")
    console = Console(width=80, record=True, file=StringIO())
    console.print(run_table([row(), fid(), floor(), refused]))
    lines = console.export_text().splitlines()
    names = ("reward/train ↑", "fid_prior/space ↓", "fid_prior/space/floor", "tilt_gap [nats] ↓")
    text = {name: next(line for line in lines if name in line) for name in names}
    assert "+5.25 ± 0.12" in text["reward/train ↑"]
    assert text["fid_prior/space ↓"].split()[2:5] == ["70", "90", "+20"]
    assert "65.0 ± 2.0" in text["fid_prior/space/floor"]
    assert "– " in text["tilt_gap [nats] ↓"]
    assert "tilt_gap: refused: few" in [line.strip() for line in lines]


def test_a_null_effect_is_coloured_in_one_of_twenty() -> None:
    """Differences of mean zero on four prompts: with Student's t for them 5 % are coloured, at two errors 14 %."""
    draws = np.random.default_rng(0).normal(size=(4000, 4))
    means, errors = draws.mean(1), draws.std(1, ddof=1) / 2
    pairs = list(zip(means, errors, strict=True))
    share = np.mean([is_clear(row(difference=mean, standard_error=error, degrees=3.0)) for mean, error in pairs])
    assert share == pytest.approx(0.05, abs=0.012)
    assert (abs(means) > 2 * errors).mean() > 0.12
    assert is_clear(row(difference=9.0, standard_error=1.0, degrees=3.0))
    assert not is_clear(row(difference=9.0, standard_error=1.0, degrees=None))  # nobody knows on how many it rests


def board(*rows: dict[str, Any], **options: Any) -> Board:
    """The only table."""
    ((_, found),) = settings(pd.DataFrame(rows))
    return leaderboard(found, **options)


def comparison(*rows: dict[str, Any], **options: Any) -> list[str]:
    """Its lines."""
    return markdown(board(*rows, **options)).splitlines()


def report(frame: pd.DataFrame, left_out: list[str], metrics: tuple[str, ...] = ()) -> str:
    return reports.text(reports.compared(frame, Question(metrics)), left_out)


def test_comparison_of_methods() -> None:
    ddpo = {"run": "r2", "method": "ddpo", "wall_seconds": 300.0, "train_seconds": 30.0, "updates": 200, "budget": 200}
    ddpo |= {"value": 32.0, "difference": 2.0}
    kl = {"metric": "path_kl", "unit": "nats", "direction": "lower", "value": 5.25, "prior": 0.0}
    failed = {"run": "r3", "method": "broken", "metric": "run", "value": None, "status": "failed", "note": "a | b"}
    lines = comparison(row(), fid(), floor(), row(**kl), row(**ddpo), row(**failed))
    columns = f"reward/train ↑ | fid_prior ↓ | path_kl [nats] ↓ | {COSTS}"
    assert lines[0] == f"| method | {columns}"
    assert lines[2] == "| prior | 30 | 70 | 0 | – | – | – | – | – |  |"
    assert lines[3] == "| sampling floor | – | 65 [62, 68] | – | – | – | – | – | – |  |"  # ± 3.2 · 2/√4, of four draws
    assert (
        lines[4]
        == "| draft | **35.25** (+5.2 [+4.9, +5.6]) | 90 | 5.2 [4.9, 5.6] | 12,000 | 2000 | 960 | 960 | 120 | 1 |"
    )
    assert lines[5] == "| ddpo | 32 (+2.0 [+1.6, +2.4]) | – | – | 12,000 | 2000 | 960 | 960 | 30 | 1 |"
    assert lines[6] == "| broken | failed | – | – | – | – | – | – | – | 0, 1 failed |"
    assert "95 % within the one evaluation" in lines[8]
    assert lines[10].startswith("At fid_prior the prior is best")
    assert lines[12] == "Feature space: space."
    assert lines[14] == r"broken, seed 0, failed: a \| b"
    every = comparison(row(), row(metric="path_kl/late"), every=True)[0]
    assert "path_kl/late" in every
    assert "reward calls" in every


def test_methods_are_compared_over_settings_that_all_of_them_had() -> None:
    places = {"ddpo": "ab", "draft": "bc", "nft": "abc", "refl": "abc"}
    gains = {"ddpo": 1.0, "draft": 8.0, "nft": 2.0, "refl": 4.0}
    rows = [
        row(run=name + reward, method=name, difference=gains[name], settings=chosen(reward__name=reward), reward=reward)
        for name, own in places.items()
        for reward in own
    ]
    scored = reports.scores(sections(pd.DataFrame(rows), Question()))
    assert set(scored) == {"nft", "refl"}
    assert [share for (share,) in scored["nft"].values()] == [0.5, 0.25, 0.25]
    assert set(reports.scores(sections(pd.DataFrame(rows[:4]), Question()))) == set()  # none had all three


@pytest.mark.parametrize(("apart", "marked"), [(40.0, True), (10.0, False)])
def test_what_floors_scatter_over_is_marked_nowhere_and_said(apart: float, marked: bool) -> None:
    """Five seeds' floors of three draws each, from 298 to 316: rows that lie 10 apart are not told apart by it."""
    rows = []
    for seed, low in enumerate((298.0, 303.0, 307.0, 311.0, 316.0)):
        for name, gap in (("draft", apart), ("ddpo", 0.0)):
            own = {"method": name, "run": f"{name}{seed}", "seed": seed}
            scattered = low + 20 + gap + 0.1 * seed * (gap > 0)  # clear by Student's t within seeds, whatever the floor
            rows += [row(**own), fid(value=scattered, prior=low, difference=scattered - low, **own)]
            rows.append(floor(value=low, standard_error=3.0, degrees=2.0, **own))
    ((_, own),) = settings(pd.DataFrame(rows))
    shown = leaderboard(own)
    place = shown.columns.index("fid_prior/space")
    marks = {line.name: line.cells[place].mark for line in shown.lines if line.n}
    assert marks == {"ddpo": "best" if marked else "", "draft": ""}
    draws = np.array([low + step for low in (298, 303, 307, 311, 316) for step in (-3, 0, 3)])  # with that deviation
    low, high = draws.mean() - 1.96 * draws.std(ddof=1), draws.mean() + 1.96 * draws.std(ddof=1)
    said = f"fid_prior: 95 % of its floors fall between {low:.3g} and {high:.3g}, as far apart as the rows compared"
    assert any(note.startswith(said) for note in shown.notes) != marked


def test_cells_survive_pipes() -> None:
    assert comparison(row(metric="a|b"), metrics=["a|b"])[0].startswith(r"| method | a\|b ↑ |")


def seeds(*values: float, prior: tuple[float, ...] = (), **changes: Any) -> list[dict[str, Any]]:
    before = prior or (30.0,) * len(values)
    pairs = enumerate(zip(values, before, strict=True))
    return [row(seed=i, value=v, prior=p, difference=v - p, **changes) for i, (v, p) in pairs]


def test_comparison_over_seeds_takes_the_error_over_seeds_and_nothing_else() -> None:
    earlier = row(seed=1, value=0.0, budget=30)
    alone = row(method="ddpo", value=33.0)
    lines = comparison(*seeds(35.25, 37.25), earlier, alone)
    assert lines[3] == "| draft | 36 [24, 49] | 12,000 | 2000 | 960 | 960 | 120 | 2 † |"  # 36.25 ± 12.7 · 1.0
    assert lines[4].startswith("| ddpo | 33 | 12,000 |")  # the one evaluation's error is something else
    assert "95 % over seeds, each with evaluation noise of its own." in lines[6]
    fixed = comparison(*seeds(35.25, 37.25, settings=chosen(evaluation__seed=0)))
    assert "of training alone: all share one draw of evaluation noise." in fixed[-3]


def test_paired_differences_over_seeds_leave_out_the_evaluation_noise() -> None:
    lines = comparison(*seeds(35.0, 37.0, 39.0, prior=(30.0, 32.0, 34.0)))
    assert lines[2].startswith("| prior | 32 [27, 37] |")
    assert lines[3].startswith("| draft | 37 [32, 42] (+5) |")


def test_seeds_without_a_value_are_told() -> None:
    gap = {"metric": "tilt_gap", "direction": "lower"}
    refused = row(seed=2, value=None, prior=None, status="refused", **gap)
    lines = comparison(*seeds(35.25, 37.25, 36.25), *seeds(0.5, 0.7, **gap), refused, every=True)
    assert "| 0.6 [-0.7, 1.9] (2 of 3 seeds) |" in lines[3]


def test_rows_name_the_settings_in_which_they_differ() -> None:
    """A sweep over a rate, and runs of other lengths, are rows of their own; what methods differ in is no matter."""
    short = {"settings": chosen(train__updates=40), "budget": 40, "updates": 40}
    rows = [*seeds(35.25, 37.25), row(value=33.0, **short), row(value=32.0, settings=chosen(optimizer__lr=0.1))]
    other = row(method="ddpo", value=31.0, settings=chosen(optimizer__lr=7, method__clip=1))
    lines = comparison(*rows, other)
    assert [line.split(" | ")[0] for line in lines[3:7]] == [
        "| draft (optimizer.lr = 0.002, train.updates = 60)",
        "| draft (optimizer.lr = 0.002, train.updates = 40)",
        "| draft (optimizer.lr = 0.1, train.updates = 60)",
        "| ddpo",
    ]
    assert lines[3].endswith("| 2 † |")
    assert lines[4].endswith("| 1 |")


def test_a_setting_that_came_later_makes_no_other_row() -> None:
    newer = {"settings": chosen(model__negative_prompt=""), "run": "r2"}
    ((_, found),) = settings(identified(pd.DataFrame([row(), row(seed=1, **newer), row(seed=2, **newer)])))
    assert set(found["row"]) == {"draft"}
    changed = {"settings": chosen(model__negative_prompt="", optimizer__lr=0.1), "run": "r3"}
    ((_, found),) = settings(identified(pd.DataFrame([row(), row(seed=1, **newer), row(**changed)])))
    assert list(found["row"]) == ["draft (optimizer.lr = 0.002)"] * 2 + ["draft (optimizer.lr = 0.1)"]


def test_runs_on_other_weights_or_in_another_precision_have_tables_of_their_own() -> None:
    kinds = [{}, {"model__fingerprint": "aa"}, {"model__fingerprint": "bb", "model__dtype": "bfloat16"}]
    rows = [row(method=name, settings=chosen(**kind)) for kind in kinds for name in ("draft", "rtb")]
    tables = list(settings(pd.DataFrame(rows)))
    assert [list(table["row"]) for _, table in tables] == [["draft", "rtb"]] * 3
    assert [heading.partition("; ")[2] for heading, _ in tables] == [
        "model.fingerprint = –, model.dtype = –",
        'model.fingerprint = "aa", model.dtype = –',
        'model.dtype = "bfloat16", model.fingerprint = "bb"',
    ]


def test_settings_have_tables_of_their_own_with_headings_of_their_own() -> None:
    more = {"evaluation": "e2", "settings": chosen(evaluation__samples_per_prompt=64)}
    tables = dict(settings(pd.DataFrame([row(), row(**more), row(beta=2.0), row(reward="colorfulness")])))
    start = "emoji_clip (β = 1) on emoji, prompts emoji"
    assert list(tables) == [
        f"{start}; evaluation.samples_per_prompt = 8",
        f"{start}; evaluation.samples_per_prompt = 64",
        "emoji_clip (β = 2) on emoji, prompts emoji",
        "colorfulness (β = 1) on emoji, prompts emoji",
    ]
    files = dict(settings(pd.DataFrame([row(), row(evaluation="e2")])))  # prompt files of one name
    assert list(files) == [f"{start}; evaluation e1", f"{start}; evaluation e2"]


def test_versions_of_a_metric_are_not_mixed() -> None:
    rows = pd.DataFrame([row(), row(seed=1, metric_version=2), fid(), fid(seed=1)])
    ((_, found),) = settings(rows)
    chosen_rows, _, notes = at(found)
    assert set(chosen_rows["metric"]) == {"fid_prior/space"}
    assert notes == ["Left out, for the runs hold different versions of it: reward/train."]


def test_a_setting_whose_runs_all_failed_leaves_the_others() -> None:
    failed = {"beta": 2.0, "metric": "run", "value": None, "status": "failed", "direction": "none", "note": "nan"}
    shown = report(pd.DataFrame([row(**failed), row()]), [])
    assert "draft, seed 0, failed: nan" in shown
    assert "| draft | 35.25 (+5.2 [+4.9, +5.6]) |" in shown


def test_a_metric_that_nobody_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="no row has a value of vendi; there are reward/train"):
        report(pd.DataFrame([row()]), [], ("vendi",))


# --- which runs count -----------------------------------------------------------------------------------------------


def run_folder(folder: Path, *rows: dict[str, Any], finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    write_rows(folder / "rows-at-0000030.parquet", [one | {"budget": 30, "value": 1.0} for one in rows])
    if finished:
        write_rows(folder / "rows.parquet", rows)
    return folder


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


def test_nothing_to_compare_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no result rows found"):
        collect([tmp_path])
    with pytest.raises(BenchError, match="there is no file or folder"):
        collect([tmp_path / "nowhere"])
    run_folder(tmp_path / "begun", row(), finished=False)
    with pytest.raises(ValueError, match=r"no rows to compare\. .*begun is unfinished"):
        collect([tmp_path])


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


@pytest.mark.parametrize("updates", [1, 40, 300])
def test_curves_are_drawn(tmp_path: Path, updates: int) -> None:
    generator = np.random.default_rng(0)
    names = ("reward_over_prior", "loss", "gradient_norm/policy", "seconds/sample")
    log = pd.DataFrame({name: generator.normal(1, 0.1, updates) for name in names})
    log["update"], log["round"] = np.arange(1, updates + 1), np.arange(updates) // 2
    marks = pd.DataFrame({"updates": [1, updates], "prior": 2.0, "difference": 1.0, "standard_error": 0.2})
    plot_curves(log, tmp_path / "four.png", "title", marks)
    plot_curves(log.drop(columns=["loss", names[2]]).rename(columns={names[0]: "reward"}), tmp_path / "two.png")
    four, two = (matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3] for name in ("four", "two"))
    assert four.shape[1] == two.shape[1]
    assert four.shape[0] > 1.8 * two.shape[0]
    half, middle = four.shape[0] // 2, four.shape[1] // 2
    for panel in (four[:half, :middle], four[:half, middle:], four[half:, :middle], four[half:, middle:]):
        assert (panel.std(2) > 0.02).mean() > 1e-4  # points, bars or lines, even of one update


# --- comparing at equal cost, and the report ------------------------------------------------------------------------


def budgets() -> pd.DataFrame:
    """Two methods with three evaluations each, one twice as dear, and one without training."""
    rows = []
    for method, calls in (("cheap", 10), ("dear", 20)):
        for seed in range(2):
            for update, value in ((10, 1.0), (20, 2.0), (40, 4.0)):
                cost = {"budget": update, "updates": update, "reward_calls": update * calls}
                cost |= {"network_forwards": 1000 * update, "network_backwards": 200 * update}
                cost |= {"train_seconds": 12.0 * update, "difference": value}  # every seed's prior is its own
                rows.append(
                    row(run=f"{method}{seed}", method=method, seed=seed, value=value + seed, prior=float(seed), **cost)
                )
    free = {"updates": 0, "reward_calls": 0, "difference": 9.0, "prior": 0.0}
    rows.append(row(run="best", method="best_of_n", value=9.0, budget=0, **free))
    return pd.DataFrame(rows)


def test_a_report_at_a_cost_that_no_training_reaches_is_written(tmp_path: Path) -> None:
    frame = budgets().assign(source="x/rows.parquet")
    page = write_report(tmp_path, frame, [], Question(axis="nfe", limits=(1e9,))).read_text()
    assert "\nNo run here reaches 1,000,000,000 NFE: the most is 48,000, of cheap.\n" in page
    assert re.findall(r"\]\((.*?)\)", page) == ["methods-0.png"]  # of what trains nothing; there is no curve
    frame = frame[frame["method"] != "best_of_n"]
    assert "![" not in write_report(tmp_path, frame, [], Question(axis="nfe", limits=(1e9,))).read_text()


def test_limits_have_the_names_of_columns(tmp_path: Path, bench: Callable[..., tuple[int, str]]) -> None:
    """NFE has one; what was written with its former name still runs."""
    for name, rows in budgets().groupby("run"):
        (tmp_path / str(name)).mkdir()
        write_rows(tmp_path / str(name) / "rows.parquet", rows.to_dict("records"))
    for option in ("--at-nfe", "--at-network-rows"):
        status, text = bench("report", tmp_path, option, 12_000, "--format", "md")
        assert status == 0, text
        assert ", at 12,000 NFE\n" in text
        assert "| cheap | **2** [-5, 8] (+1) | 12,000 | 2000 | 100 |" in text
    assert "network" not in bench("report", "--help")[1]


@pytest.mark.parametrize(
    ("axis", "limit", "expected", "near"),
    [
        (None, 0, {"cheap": 4.0, "dear": 4.0, "best_of_n": 9.0}, ""),
        ("updates", 20, {"cheap": 2.0, "dear": 2.0, "best_of_n": 9.0}, ""),
        ("updates", 30, {"cheap": 3.0, "dear": 3.0, "best_of_n": 9.0}, ""),
        ("reward_calls", 400, {"cheap": 4.0, "dear": 2.0, "best_of_n": 9.0}, ""),
        ("reward_calls", 100, {"cheap": 1.0, "dear": 0.5, "best_of_n": 9.0}, ""),  # half way from the prior
        ("reward_calls", 850, {"dear": 4.0, "best_of_n": 9.0}, "dear"),  # it ends at 800, and cheap at 400
        ("nfe", 12_000, {"cheap": 1.0, "dear": 1.0, "best_of_n": 9.0}, ""),
        ("train_seconds", 60, {"cheap": 0.5, "dear": 0.5, "best_of_n": 9.0}, ""),
        ("reward/train", 3.0, {"cheap": 3.0, "dear": 3.0}, ""),
    ],
)
def test_comparison_at_equal_cost(axis: str | None, limit: float, expected: dict[str, float], near: str) -> None:
    ((_, rows),) = settings(budgets())
    found, missing, told = at(rows, axis, limit)
    means = found[found["metric"] == "reward/train"].groupby("method")["difference"].mean().to_dict()
    assert means == pytest.approx(expected)
    assert {name: one.why for name, one in missing.items()} == ({"cheap": "ends at 400"} if near else {})
    from_prior = ["‡ Interpolated between the prior and a run's first evaluation."] * (limit in (100, 60))
    assert told == from_prior + [f"Up to 10% short of this cost, and read off at their end: {near}."] * bool(near)
    if axis in ("updates", "reward_calls") and not near:
        assert set(found.loc[found["updates"] > 0, axis]) == {limit}


def test_at_an_equal_gain_all_else_is_interpolated_within_a_run() -> None:
    """Half way between two evaluations lie half of their diversity, cost and error; the floor stays."""
    frame = budgets()
    frame = pd.concat([frame, *(frame.assign(metric=name, value=v, prior=p) for name, v, p in (
        ("path_kl", frame["updates"] / 4.0, 0.0), ("fid_prior/space/floor", 65.0, np.nan)
    ))])  # fmt: skip
    ((_, rows),) = settings(frame)
    found, _, _ = at(rows, "reward/train", 3.0)
    assert set(found["updates"]) == {30.0}
    own = found[found["method"] == "dear"].groupby("metric")["value"].first()
    assert own["path_kl"] == pytest.approx(30 / 4)
    assert own["fid_prior/space/floor"] == 65.0
    assert set(found.loc[found["method"] == "dear", "reward_calls"]) == {600.0}
    shown = leaderboard(rows, axis="reward/train", limit=3.0)
    costs = ("updates", "NFE", "backward NFE", "reward calls", "reward gradients", "training time")
    assert shown.columns == ("path_kl", *costs)
    marks = {line.name: line.cells[4].mark for line in shown.lines if line.n}
    assert marks == {"cheap": "best", "dear": ""}  # 300 reward calls against 600


def test_a_gain_that_is_not_reached_is_told() -> None:
    frame = budgets()
    frame.loc[(frame["method"] == "dear") & (frame["seed"] == 1), ["value", "difference"]] = 0.5
    ((_, rows),) = settings(frame)
    _, missing, told = at(rows, "reward/train", 2.0)
    assert not missing
    assert told == ["Not reached by all seeds, and values are of those that did: dear (1 of 2)."]
    _, missing, _ = at(rows, "reward/train", 9.0)
    assert {name: one.why for name, one in missing.items()} == dict.fromkeys(("cheap", "dear"), "never, at most +4")
    shown = leaderboard(rows, axis="reward/train", limit=9.0)
    assert [(line.name, line.cells[0].text, line.n) for line in shown.lines] == [
        ("cheap", "never, at most +4", "0"),
        ("dear", "never, at most +4", "0"),
    ]
    assert shown.lead == "No run here reaches a reward gain of +9: the most is +4, of cheap."


def test_a_table_at_a_cost_has_no_values_of_runs_that_end_before_it_and_says_so_on_top() -> None:
    """Of some rows, of all; a row of which one run ends earlier is none of those that got there."""
    ((_, rows),) = settings(budgets())
    some = leaderboard(rows, axis="reward_calls", limit=700)
    assert some.lead == "1 of 2 trained rows have no values here, as runs of theirs end before 700 reward calls."
    found = {line.name: line.cells[0] for line in some.lines}
    assert (found["cheap"].text, found["dear"].value) == ("ends at 400", 4.0)
    none = leaderboard(rows, axis="nfe", limit=1e6, title="T")
    assert none.lead == "No run here reaches 1,000,000 NFE: the most is 48,000, of cheap."
    assert [line.name for line in none.lines if pd.notna(line.cells[0].value) and line.n] == ["best_of_n"]
    assert markdown(none).startswith(none.lead)
    assert leaderboard(rows, axis="reward_calls", limit=400).lead == ""
    frame = budgets()
    ((_, rows),) = settings(frame[(frame["seed"] == 0) | (frame["budget"] < 40) | (frame["method"] == "cheap")])
    shown = leaderboard(rows, axis="reward_calls", limit=700)
    assert {line.name: line.cells[0].text for line in shown.lines}["dear"] == "1 of 2 runs end before"
    assert shown.lead == "2 of 2 trained rows have no values here, as runs of theirs end before 700 reward calls."


def test_best_of_n_is_charged_per_finished_sample() -> None:
    """Eight draws of 20 guided steps, in whatever sampler the evaluation has."""
    options = {"method__n": 8, "sampler__steps": 10, "sampler__guidance": 3.0, "evaluation__sampler__steps": 20}
    free = {"updates": 0, "budget": 0, "reward_calls": 0, "method": "best_of_n", "settings": chosen(**options)}
    shown = board(row(), row(**free))
    cells = dict(zip(shown.columns, next(line for line in shown.lines if line.name == "best_of_n").cells, strict=True))
    assert (cells["NFE"].text, cells["reward calls"].text) == ("320 per sample", "8 per sample")
    assert np.isnan(cells["NFE"].value)
    assert any("320 NFE and 8 reward calls; of a trained model it takes 40 NFE" in note for note in shown.notes)
    unguided = chosen(**options | {"sampler__guidance": 1.0, "evaluation__sampler__steps": None})
    shown = board(row(), row(**free | {"settings": unguided}))
    assert "| 80 per sample | 2000 | 8 per sample |" in markdown(shown)


def test_nothing_is_interpolated_far_from_an_evaluation() -> None:
    """The first evaluation has five times the gain: its cost is a bound, and nobody's cost is marked as least."""
    frame = budgets()
    early = (frame["method"] == "cheap") & (frame["budget"] == 10)
    frame.loc[early, "difference"] = 2.5  # asked for 0.5
    frame.loc[early & (frame["seed"] == 0), "difference"] = 0.9  # one seed near enough does not speak for the row
    ((_, rows),) = settings(frame)
    found, missing, told = at(rows, "reward/train", 0.5)
    assert set(found["method"]) == {"dear"}
    assert set(found["from_prior"]) == {True}
    assert missing["cheap"].why == "passed before its first evaluation"
    assert missing["cheap"].costs == {
        "updates": "< 10", "reward calls": "< 100", "NFE": "< 12,000", "training time": "< 120",
        "reward gradients": "< 960", "backward NFE": "< 2,000",
    }  # fmt: skip
    assert any(note.startswith("< and –") for note in told) and any(note.startswith("‡") for note in told)
    lines = markdown(leaderboard(rows, axis="reward/train", limit=0.5)).splitlines()
    assert lines[3].startswith("| dear | 5 ‡ | 6000 ‡ | 1000 ‡ | 100 ‡ | 480 ‡ | 60 ‡ | 2 † |")
    assert lines[4] == "| cheap | passed before its first evaluation | < 12,000 | < 2,000 | < 100 | < 960 | < 120 | 2 |"
    frame.loc[(frame["method"] == "dear") & (frame["budget"] == 40), "difference"] = 40.0  # from 2, and asked for 9
    frame = frame[(frame["method"] == "dear")]
    ((_, rows),) = settings(frame)
    _, missing, _ = at(rows, "reward/train", 9.0)
    assert missing["dear"].costs["updates"] == "20 – 40"
    _, missing, _ = at(rows, "reward_calls", 60.0)
    assert missing["dear"].why == "not evaluated between 0 and 200"


def test_distances_to_the_prior_are_what_they_exceed_its_own_by() -> None:
    """A Fréchet distance of 307 beside a floor of 306 says nothing; `--all` prints it."""
    kl = {"metric": "path_kl", "direction": "lower", "prior": 0.0, "support": "positive", "prior_is_best": True}
    note = "rank-deficient covariance: 9 images in 99 dimensions"
    rows = [row(seed=s, run=f"r{s}") for s in range(3)]
    for s, (value, prior) in enumerate([(310.0, 300.0), (330.0, 310.0), (350.0, 320.0)]):
        same = {"seed": s, "run": f"r{s}"}
        rows += [
            fid(value=value, prior=prior, difference=value - prior, note=note, **same),
            row(value=5.0, **kl, **same),
        ]
        rows.append(floor(value=prior - 1, **same))
    frame = pd.DataFrame(rows)
    (shown,) = sections(frame, Question())[0].boards
    assert shown.headings[1] == "fid_prior [over the prior] ↓"
    cells = {line.name: line.cells[1] for line in shown.lines}
    assert (cells["prior"].value, cells["draft"].value, cells["sampling floor"].value) == (0, 20, -1)
    assert cells["draft"].low == pytest.approx(20 - 4.303 * 10 / 3**0.5, abs=0.01)
    assert f"fid_prior: {note}." in shown.notes
    (levels,) = sections(frame, Question(every=True))[0].boards
    assert {line.name: line.cells[1].value for line in levels.lines}["prior"] == pytest.approx(309.9, abs=0.1)


def test_an_end_of_an_interval_is_not_rounded_to_zero() -> None:
    assert interval(17.0, 0.4, 700.0) == ("17", "[0.4, 700]")
    assert interval(0.6, 0.04, 0.98) == ("0.6", "[0.04, 1.0]")
    assert interval(5.0, 4.8, 5.2) == ("5.00", "[4.80, 5.20]")
    assert interval(5e18, 1e9, 2e28) == ("5e+18", "[1e+09, 2e+28]")


def test_few_runs_are_flagged() -> None:
    shown = board(*seeds(35.0, 36.0, 37.0), *(one | {"method": "ddpo"} for one in seeds(1.0, 2.0, 3.0, 4.0, 5.0)))
    assert [(line.name, line.runs) for line in shown.lines] == [("prior", ""), ("draft", "3 †"), ("ddpo", "5")]
    assert any(note.startswith("† Fewer than 5 runs") for note in shown.notes)
    assert not any("†" in note for note in board(row()).notes)


def test_report_writes_a_page_and_its_figures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    run = tmp_path / "runs" / "cheap0"
    run.mkdir(parents=True)
    np.savez(
        run / "points.npz", **{name: rng.normal(size=(50, 2)) for name in ("target", "prior", "finetuned")},
        density=np.ones((20, 20)), extent=np.array([-3.0, 3, -3, 3]),
    )  # fmt: skip
    (tmp_path / "runs" / "dear0").mkdir()
    (tmp_path / "runs" / "dear0" / "points.npz").write_bytes(b"PK half of it")
    frame = budgets()
    frame["source"] = [str(tmp_path / "runs" / name / "rows.parquet") for name in frame["run"]]
    page = write_report(tmp_path / "out", frame, ["a run is unfinished."], Question(axis="updates", limits=(20.0,)))
    shown = page.read_text()
    assert ", at 20 updates\n" in shown
    assert "| cheap | **2** [-4, 9] (+2) " in shown
    assert "- a run is unfinished." in shown
    figures = re.findall(r"\]\((.*?)\)", shown)
    assert figures == ["methods-0.png", "curves-reward-train-0.png", "points-0.png"]
    for name in figures:
        assert name.startswith("points") or (tmp_path / "out" / name).with_suffix(".svg").read_text().startswith(
            "<?xml"
        )
        image = plt.imread(tmp_path / "out" / name)
        assert min(image.shape[:2]) > 150
        assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20


def test_figures_by_step_and_by_prompt_show_means_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for method, scale in (("ddpo", 1.0), ("rtb", 2.0)):
        for seed, noise in ((0, -0.25), (1, 0.25)):
            own = {"method": method, "run": f"{method}{seed}", "seed": seed}
            rows.append(row(**own))
            for k in (1, 2, 3):
                price = {"metric": f"path_kl_steps/{k:02}", "value": scale * k + noise, "direction": "lower"}
                rows.append(row(**own, **price, prior=0.0, difference=scale * k + noise))
            for i, prompt in enumerate(("train/a/b $x$", "train/c", "test/d")):
                rows.append(row(**own, metric=f"reward_prompts/{prompt}", difference=scale * i + noise))
    drawn = {}

    def keep(figure: Figure, path: Path, **options: Any) -> None:
        if path.suffix == ".png":
            drawn[path.name] = figure.axes

    monkeypatch.setattr(Figure, "savefig", keep)
    frame = pd.DataFrame([{"schema": 2, "source": "x/rows.parquet"} | one for one in rows])
    page = write_report(tmp_path, frame, [], Question()).read_text()
    assert "](path_kl_steps-0.png)" in page and "](reward_prompts-0.png)" in page
    assert "reward_prompts/train" not in page.replace("reward_prompts-0", "")
    lines = {line.get_label(): line.get_ydata().tolist() for ax in drawn["path_kl_steps-0.png"] for line in ax.lines}
    assert {name: lines[name] for name in ("ddpo", "rtb")} == {"ddpo": [1, 2, 3], "rtb": [2, 4, 6]}
    training, test, _ = drawn["reward_prompts-0.png"]
    maps = [np.asarray(ax.collections[0].get_array()).tolist() for ax in (training, test)]
    order = [text.get_text() for text in training.get_yticklabels()]
    assert [text.get_text() for text in training.get_xticklabels()] == ["a/b $x$", "c"]
    assert dict(zip(order, zip(*maps, strict=True), strict=True)) == {"ddpo": ([0, 1], [2]), "rtb": ([0, 2], [4])}


def test_reward_curves_are_paired_with_each_seeds_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.setdefault(path.name, figure.axes))
    write_report(tmp_path, budgets().assign(source="x/rows.parquet"), [], Question())
    axes = drawn["curves-reward-train-0.png"][0]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    for name in ("cheap", "dear"):
        assert lines[name] == pytest.approx([1.0, 2.0, 4.0])
    assert len(axes.collections) == 2
    for band in axes.collections:  # the seeds differ by their priors alone
        ends = band.get_paths()[0].vertices[:, 1]
        assert set(ends.round(9)) == {1, 2, 4}


def test_a_setting_without_anything_to_draw_has_no_figures(tmp_path: Path) -> None:
    failed = {"metric": "run", "value": None, "status": "failed", "direction": "none", "note": "nan"}
    for i, one in enumerate((row(method="prior"), row(**failed), row(value=None, status="refused"))):
        run_folder(tmp_path / str(i), one)
        assert "![" not in write_report(tmp_path / "page", *collect([tmp_path / str(i)]), Question()).read_text()


def test_the_figure_shows_what_the_table_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the published ring rows the last budget counts, in the bars as in the cells; checkpoints are no seeds."""
    drawn, beyond = {}, {}

    def keep(figure: Figure, path: Path, **options: Any) -> None:
        if path.suffix == ".svg":
            return
        for ax in figure.axes:
            beyond[ax.get_title()] = [text.get_text() for text in ax.texts]
            labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
            (bars,) = ax.containers
            drawn[ax.get_title()] = dict(
                zip(labels, sorted(bars[0].get_xydata().tolist(), key=lambda p: p[1]), strict=True)
            )
            assert len(ax.collections[0].get_offsets()) == 10 * len(labels) - 2  # of nabla_db, two runs failed

    monkeypatch.setattr(Figure, "savefig", keep)
    frame, _ = collect([PUBLISHED / "ring_little_noise"])
    ((heading, rows),) = settings(frame)
    selected, _, _ = at(rows)
    plot_methods(selected, ["tilt_tv", "tilt_sw2"], tmp_path / "x.png", heading)
    shown = {line.name: line.cells[0].value for line in leaderboard(rows, ["tilt_tv"]).lines if line.n}
    assert {name: value for name, (value, _) in drawn["tilt_tv ↓"].items()} == pytest.approx(shown)
    assert shown["draft_full"] == pytest.approx(0.308338, abs=1e-6)
    assert beyond == {"tilt_tv ↓": [], "tilt_sw2 ↓": [f"{number(drawn['tilt_sw2 ↓']['nabla_db'][0])} ▸"]}


def test_published_rows_are_read_whole() -> None:
    frame, left_out = collect([PUBLISHED])
    assert not left_out
    assert {heading.split(" ")[0] for heading, _ in settings(frame)} == {
        "quadratic", "emoji_style", "emoji_clip", "colorfulness",
    }  # fmt: skip


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


def test_every_suite_but_the_demo_has_a_curve() -> None:
    found = {
        suite: config.resolve("draft", suite=suite).evaluated_at()
        for suite in (path.stem for path in config.SUITES.glob("*.yaml"))
    }
    assert found.pop("demo") == [20]
    assert all(len(updates) >= 4 for updates in found.values())
    shares = config.resolve("rtb", suite="ring", assignments=["train.updates=3"])
    assert shares.evaluated_at() == [1, 3]


def test_metrics_of_plugins_stand_in_the_table_unasked() -> None:
    names = ("reward/train", "vendi", "contrast/train", "path_kl")
    frame = pd.DataFrame([row(metric=name) for name in names]).assign(row="draft", source="rows.parquet")
    costs = ["NFE", "backward NFE", "reward calls", "reward gradients", "training time"]
    assert selected(frame) == ["reward/train", "contrast/train", "path_kl", *costs]
