"""Runs from Python: the commands `bench run`, `bench eval` and `bench report`, with results as pandas frames."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bench import config as configs
from bench.errors import BenchError
from bench.reporting.budgets import at
from bench.reporting.rows import read_rows
from bench.reporting.selection import collect
from bench.reporting.selection import settings as settings_of
from bench.reporting.summary import summary
from bench.runs.evaluate import evaluate_again
from bench.runs.log import read_log
from bench.runs.preflight import preflight
from bench.runs.presets import fitted
from bench.runs.remote import readable, run_place
from bench.runs.run import Run
from bench.runtime.console import TextConsole
from bench.runtime.files import home_path
from bench.settings import RunConfig


@dataclass(frozen=True)
class FinishedRun:
    """A finished run's folder and what it holds.

    rows: a row per metric of the final evaluation (`metric`, `value`, `prior`, `difference`, `standard_error`, `n`, …).
    log: a row per update (`update`, `loss`, `reward`, gradient norms, counts, seconds); empty for a baseline.
    """

    folder: Path
    config: RunConfig
    rows: pd.DataFrame
    log: pd.DataFrame


def run(
    method: str,
    *,
    reward: str | None = None,
    model: str | None = None,
    prompts: str | Path | None = None,
    suite: str | None = None,
    seed: int | None = None,
    updates: int | None = None,
    metrics: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    preset: str | None = None,
    out: str | Path | None = None,
    progress: bool = False,
) -> FinishedRun:
    """`bench run`: train with a method and evaluate; resumed where it was interrupted, read where it is finished.

    metrics: measured too. settings: dotted keys, as of `--set`. preset: memory of the GPU to fit, "24gb".
    out: the folder or its URL; None: named by the configuration, below `runs`. progress: show bars and tables.
    Raises BenchError as the command does.
    """
    named = {"model.name": model, "prompts.name": prompts and str(prompts), "seed": seed, "train.updates": updates}
    overrides = {key: value for key, value in named.items() if value is not None}
    config = configs.resolve(
        method, reward=reward, suite=suite, overrides=overrides, assignments=_texts(settings), metrics=metrics
    )
    if preset:
        config = fitted(config, preset, settings or {}).config
    folder, mirror = run_place(out, config)
    preflight(config)
    with ExitStack() as locks:
        Run(config, folder, TextConsole(quiet=not progress), mirror=mirror).go(force=False, locks=locks)
    return load(folder)


def load(folder: str | Path) -> FinishedRun:
    """A finished run. Raises BenchError if the folder holds none."""
    folder = home_path(folder)
    try:
        rows = read_rows(folder / "rows.parquet")
    except (ValueError, OSError) as error:
        raise BenchError(f"{folder} holds no finished run: {error}") from None
    return FinishedRun(folder, configs.read(folder / "config.yaml"), rows, read_log(folder))


def evaluate(folder: str | Path, settings: Mapping[str, Any] | None = None, *, progress: bool = False) -> pd.DataFrame:
    """`bench eval`: the rows of a finished run, evaluated again with other settings ("evaluation.…")."""
    console = TextConsole(quiet=not progress)
    return read_rows(evaluate_again(home_path(folder), _texts(settings), console) / "rows.parquet")


def report(*paths: str | Path) -> pd.DataFrame:
    """`bench report`: runs compared, a line for each setting, configuration (`row`) and metric.

    paths: runs, or folders of them; none: `runs`. `value` and `difference` (to the prior) are centres over the seeds,
    `…_low` and `…_high` the ends of their intervals, 95 %. Raises BenchError where there is nothing to compare.
    """
    try:
        frame, _ = collect([readable(str(path)) for path in paths] or [Path("runs")])
    except (FileNotFoundError, ValueError) as error:
        raise BenchError(str(error)) from None
    tables = {heading: summary(at(rows)[0]) for heading, rows in settings_of(frame)}
    return pd.concat(tables, names=["setting"]).reset_index()


def _texts(settings: Mapping[str, Any] | None) -> list[str]:
    """Assignments as `--set` takes them."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in (settings or {}).items()]
