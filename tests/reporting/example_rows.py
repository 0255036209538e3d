"""Rows as runs write them, and what tests of several modules read of them."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from scaffold import ROOT

from bench.reporting import report as reports
from bench.reporting.leaderboard import Board, leaderboard
from bench.reporting.report import Question
from bench.reporting.rows import write_rows
from bench.reporting.selection import settings

PUBLISHED = ROOT / "results" / "published"


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


def board(*rows: dict[str, Any], **options: Any) -> Board:
    """The only table."""
    ((_, found),) = settings(pd.DataFrame(rows))
    return leaderboard(found, **options)


def report(frame: pd.DataFrame, left_out: list[str], metrics: tuple[str, ...] = ()) -> str:
    return reports.text(reports.compared(frame, Question(metrics)), left_out)


def run_folder(folder: Path, *rows: dict[str, Any], finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    write_rows(folder / "rows-at-0000030.parquet", [one | {"budget": 30, "value": 1.0} for one in rows])
    if finished:
        write_rows(folder / "rows.parquet", rows)
    return folder


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
