"""The report of several settings, and its figures."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from example_rows import PUBLISHED, budgets, chosen, report, row, run_folder
from matplotlib.figure import Figure

from bench.reporting import report as reports
from bench.reporting.budgets import at
from bench.reporting.figures.methods import plot_methods
from bench.reporting.leaderboard import leaderboard
from bench.reporting.report import Question, sections, write_report
from bench.reporting.selection import collect, settings
from bench.reporting.table import number


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


def test_a_failed_run_counts_as_the_prior_over_settings() -> None:
    broken = {"metric": "run", "value": None, "difference": None, "status": "failed", "note": "nan"}
    rows = [
        row(run=f"{name}{reward}{seed}", method=name, seed=seed, difference=4.0, reward=reward)
        | {"settings": chosen(reward__name=reward)}
        | (broken if name == "draft" or (name == "nft" and seed) else {})
        for name in ("nft", "refl", "draft")
        for reward in "ab"
        for seed in range(2)
    ]
    found = sections(pd.DataFrame(rows), Question())
    scored = reports.scores(found)
    assert [task.tolist() for task in scored["nft"].values()] == [[1.0, 0.0]] * 2
    assert [task.tolist() for task in scored["refl"].values()] == [[1.0, 1.0]] * 2
    assert [task.tolist() for task in scored["draft"].values()] == [[0.0, 0.0]] * 2
    ranked = reports.ranked_over(found)
    assert ranked and ranked[0].means.to_dict() == {"refl": 1.0, "nft": 2.0, "draft": 3.0}


def test_a_setting_whose_runs_all_failed_leaves_the_others() -> None:
    failed = {"beta": 2.0, "metric": "run", "value": None, "status": "failed", "direction": "none", "note": "nan"}
    shown = report(pd.DataFrame([row(**failed), row()]), [])
    assert "draft, seed 0, failed: nan" in shown
    assert "| draft | 35.25 (+5.2 [+4.9, +5.6]) |" in shown


def test_a_metric_that_nobody_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="no row has a value of vendi; there are reward/train"):
        report(pd.DataFrame([row()]), [], ("vendi",))


def test_a_report_at_a_cost_that_no_training_reaches_is_written(tmp_path: Path) -> None:
    frame = budgets().assign(source="x/rows.parquet")
    page = write_report(tmp_path, frame, [], Question(axis="nfe", limits=(1e9,))).read_text()
    assert "\nNo run here reaches 1,000,000,000 NFE: the most is 48,000, of cheap.\n" in page
    assert re.findall(r"\]\((.*?)\)", page) == ["methods-0.png"]  # of what trains nothing; there is no curve
    frame = frame[frame["method"] != "best_of_n"]
    assert "![" not in write_report(tmp_path, frame, [], Question(axis="nfe", limits=(1e9,))).read_text()


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


def test_what_is_said_over_settings_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though tables, figures and the page's text all show it."""
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        whole = getattr(reports, name)
        return lambda *arguments: calls.append(name) or whole(*arguments)

    for name in ("scores", "across", "ranked_over", "groups"):
        monkeypatch.setattr(reports, name, counted(name))
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    write_report(tmp_path, budgets().assign(source="x/rows.parquet"), [], Question())
    assert sorted(calls) == ["across", "groups", "ranked_over", "scores"]
