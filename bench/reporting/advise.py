"""Which methods do best within a budget and a KL bound, as far as rows tell."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from bench.errors import BenchError, did_you_mean
from bench.reporting.answers import DISTANCES, DIVERSITY, answers
from bench.reporting.budgets import (
    ENOUGH,
    GAINS,
    KL,
    NEAR,
    TEST,
    VALIDATION,
    Draws,
    amount,
    draws,
    measured_gains,
    spelled,
    within,
)
from bench.reporting.formats import interval
from bench.reporting.leaderboard import COST_NAMES, Board, Cell, Line, tabulate
from bench.reporting.ranking import Rank, ranking
from bench.reporting.selection import failures, settings
from bench.reporting.summary import has_seeds, summary

MOST = 4  # methods whose command is shown


@dataclass(frozen=True)
class Ask:
    """What may be spent: `budget` of `axis` (see `bench.reporting.budgets.AXES`), a path_kl of `most_kl` [nats].

    gradient: whether the reward's gradient may be used.
    """

    budget: float
    axis: str
    most_kl: float | None = None
    gradient: bool = True

    def __str__(self) -> str:
        bound = "" if self.most_kl is None else f" and {self.most_kl:g} nats"
        return f"{spelled(self.budget, self.axis)}{bound}"


@dataclass(frozen=True)
class Advice:
    """The table of a setting, best first, and of the rows to try their settings (JSON) and updates; 0: nothing trained.

    What is not known stands in the table's `lead` and `notes`.
    """

    board: Board
    tries: dict[str, tuple[str, int]]


def of_setting(frame: pd.DataFrame, prior: str | None, reward: str | None) -> pd.DataFrame:
    """The rows of a prior and a reward; None: any. Raises BenchError where there are none, with those there are."""
    for column, name, kind in (("model", prior, "prior"), ("reward", reward, "reward")):
        if name is not None and name not in set(frame[column]):
            here = f" with the prior {prior}" if column == "reward" and prior else ""
            raise BenchError(f"no rows{here} have the {kind} {name!r}{did_you_mean(name, set(frame[column]))}")
        frame = frame if name is None else frame[frame[column] == name]
    return frame


def advise(frame: pd.DataFrame, ask: Ask) -> list[Advice]:
    """Advice for every setting of `frame` (see `bench.reporting.selection.collect`) in which something was trained."""
    found = [_advice(title, rows, ask) for title, rows in settings(frame)]
    return [advice for advice in found if advice.board.lines]


def _advice(title: str, rows: pd.DataFrame, ask: Ask) -> Advice:
    failed = failures(rows)
    rows = rows[rows["status"] != "failed"]
    if not ask.gradient:
        rows = rows[rows.groupby("row")["reward_gradients"].transform("max") == 0]
    chosen, missing, stops = within(rows, ask.axis, ask.budget, ask.most_kl)
    trained = chosen[chosen["updates"] > 0]
    metrics = [name for name in trained["metric"].unique() if not name.endswith("/floor")]
    target = [name for name in DISTANCES if name in metrics][:1]
    spaces = [name for name in metrics if name.partition("/")[0] == DIVERSITY][:1]
    rewards = measured_gains(rows)
    others = [KL] if TEST in rewards else [VALIDATION, KL]
    names = [*target, *rewards, *(name for name in others if name in metrics)]
    names += [*spaces, *COST_NAMES]
    notes = _notes(stops[~stops["row"].isin(missing)], ask)
    if failed:
        notes.append(f"Failed runs are left out: {', '.join(f'{count} of {name}' for name, count in failed.items())}.")
    if ask.axis == "train_seconds":
        notes.append(f"Seconds on: {'; '.join(sorted(trained['hardware'].unique()))}.")
    board = tabulate(trained, names, missing, notes, f"{title}, within {ask}", _unknown(rows, trained, ask))
    if names[0] in set(trained["metric"]) and has_seeds(trained):
        board = _ranked(board, ranking(trained, names[0]))
    free = _free(chosen[chosen["updates"] == 0], ask)
    board = replace(board, answers=(*answers(board), *free.values()))
    return Advice(board, {name: _settings(chosen, name) for name in [*_worth_a_try(board), *free]})


def _ranked(board: Board, ranks: Mapping[str, Rank]) -> Board:
    """The table in the order of `ranks`, with their intervals, marks and p in the place of its first column's own."""
    places = {name: place for place, name in enumerate(ranks)}
    lines = [_tested(line, ranks.get(line.name), board.columns[0] in GAINS) for line in board.lines]
    lines.sort(key=lambda line: places.get(line.name, len(places)) if line.n else -1)
    tests = sum(not math.isnan(rank.p) for rank in ranks.values())
    note = (
        f"By {board.columns[0]}: centres with Student's intervals over seeds. p: of Student's test of the difference "
        f"to the first within seeds, corrected for {tests} tests by Holm's method; ≈: not separated from the first."
    )
    columns, headings = ((one[0], "p (Holm)", *one[1:]) for one in (board.columns, board.headings))
    return replace(board, columns=columns, headings=headings, lines=tuple(lines), notes=(note, *board.notes))


def _tested(line: Line, rank: Rank | None, gained: bool) -> Line:
    """gained: whether the rank is by the difference to the prior."""
    first, *rest = line.cells
    if rank is None:
        return line._replace(cells=(first, Cell(), *rest))
    names = () if gained and pd.isna(first.difference) else Cell._fields[3:6] if gained else Cell._fields[:3]
    tested = not math.isnan(rank.p)
    mark = "best" if rank.first else "tie" if tested and not rank.separated else ""
    own: dict[str, Any] = dict(zip(names, rank, strict=False)) | {"mark": mark}
    own |= {"gap": rank.gap, "gap_low": rank.gap_low, "gap_high": rank.gap_high}
    return line._replace(cells=(first._replace(**own), Cell(text=f"{rank.p:.2g}" if tested else "–"), *rest))


def selections(rows: pd.DataFrame) -> dict[str, tuple[Draws, str]]:
    """Methods that train nothing but select among draws → what a finished sample costs, and what they gain in words."""
    table, reward = summary(rows), measured_gains(rows)[0]
    found = {}
    for name, cost in draws(rows).items():
        if (name, reward) not in table.index:
            continue
        gain = table.loc[(name, reward)]
        ends = interval(gain["difference"], gain["difference_low"], gain["difference_high"], sign=True)
        kl = "" if math.isnan(cost.kl) else f" at a KL between samples of at most {cost.kl:.2g} nats"
        spent = f"{cost.nfe:,} NFE and {cost.calls} reward calls per finished sample"
        found[name] = cost, f"Without training {name} gains {' '.join(filter(None, ends))}{kl}, for {spent}"
    return found


def _free(rows: pd.DataFrame, ask: Ask) -> dict[str, str]:
    """Those of `selections` that the bounds allow → the sentence, with how many samples the budget makes."""
    found = {}
    for name, (cost, said) in selections(rows).items():
        each = cost.of(ask.axis)
        if each <= ask.budget and (ask.most_kl is None or cost.kl <= ask.most_kl):
            samples = f"; {spelled(ask.budget, ask.axis)} make {ask.budget // each:,.0f} samples" if each else ""
            found[name] = f"{said}{samples}."
    return found


def _unknown(rows: pd.DataFrame, trained: pd.DataFrame, ask: Ask) -> str:
    """What stands above the table: that nothing is known within the budget and the bound, or nothing of as much."""
    if trained.empty:
        return f"Nothing is known of training within {ask}."
    spent = rows.groupby("row")[ask.axis].max()
    if spent.max() >= ENOUGH * ask.budget:
        return ""
    return (
        f"No run here reaches {spelled(ask.budget, ask.axis)}: the most is {amount(spent.max())}, of "
        f"{spent.idxmax()}. These are gains for less; what more would give is not known."
    )


def _notes(stops: pd.DataFrame, ask: Ask) -> list[str]:
    notes = []
    bounded = sorted(stops.loc[stops["bound"] == KL, "row"].unique())
    ended = stops[(stops["bound"] == "end") & (stops["spent"] < ENOUGH * ask.budget)].groupby("row")["spent"].max()
    if bounded:
        notes.append(f"Stopped where path_kl reaches {ask.most_kl:g} nats, some runs or all: {', '.join(bounded)}.")
    if len(ended):
        ends = ", ".join(f"{name} (at {amount(spent)})" for name, spent in ended.items())
        notes.append(f"Ended before the budget, so what more would give is not known: {ends}.")
    notes.append(
        "Between evaluations values are interpolated; a row is refused where neither evaluation around the budget or "
        f"the bound is within a factor of {NEAR} of it."
    )
    return notes


def _worth_a_try(board: Board) -> Sequence[str]:
    """The best and what is not separated from it, as far as a list goes; where nothing is tested, the first ones."""
    gains = {line.name: line.cells[0] for line in board.lines if line.n and not math.isnan(line.cells[0].value)}
    marked = [name for name, cell in gains.items() if cell.mark]
    return (marked or list(gains))[:MOST]


def _settings(chosen: pd.DataFrame, name: str) -> tuple[str, int]:
    """A row's settings, and the updates to make: as many as its runs had made on average, whole ones."""
    own = chosen[chosen["row"] == name].drop_duplicates("seed")
    updates = own["updates"].mean()
    return own["settings"].iloc[0], max(1, int(updates)) if updates else 0
