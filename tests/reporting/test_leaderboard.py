"""Tables say what the rows say."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from example_rows import board, chosen, fid, floor, row

from bench.reporting.budgets import at
from bench.reporting.formats import markdown
from bench.reporting.identity import identified
from bench.reporting.leaderboard import leaderboard, selected
from bench.reporting.report import Question, sections
from bench.reporting.selection import settings

COSTS = (
    "NFE | backward NFE | reward calls | reward gradients | training time [s] | n |"  # the columns that end every table
)


def comparison(*rows: dict[str, Any], **options: Any) -> list[str]:
    """Its lines."""
    return markdown(board(*rows, **options)).splitlines()


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


def test_prompts_and_parts_of_an_error_are_no_feature_space() -> None:
    for name in ("target_sw2/test", "tilt_within/mean"):
        lines = comparison(row(), row(metric=name, direction="lower"))
        assert f"{name} ↓" in lines[0] and "Feature space" not in "\n".join(lines)


@pytest.mark.parametrize(("apart", "marked"), [(40.0, True), (10.0, False)])
def test_what_floors_scatter_over_is_marked_nowhere_and_said(apart: float, marked: bool) -> None:
    """Five seeds' floors of three draws each, from 298 to 316: rows that lie 10 apart do not differ by it."""
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


def test_few_runs_are_flagged() -> None:
    shown = board(*seeds(35.0, 36.0, 37.0), *(one | {"method": "ddpo"} for one in seeds(1.0, 2.0, 3.0, 4.0, 5.0)))
    assert [(line.name, line.runs) for line in shown.lines] == [("prior", ""), ("draft", "3 †"), ("ddpo", "5")]
    assert any(note.startswith("† Fewer than 5 runs") for note in shown.notes)
    assert not any("†" in note for note in board(row()).notes)


def test_metrics_of_plugins_stand_in_the_table_unasked() -> None:
    names = ("reward/train", "vendi", "contrast/train", "path_kl")
    frame = pd.DataFrame([row(metric=name) for name in names]).assign(row="draft", source="rows.parquet")
    costs = ["NFE", "backward NFE", "reward calls", "reward gradients", "training time"]
    assert selected(frame) == ["reward/train", "contrast/train", "path_kl", *costs]
