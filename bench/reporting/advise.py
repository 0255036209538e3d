"""Which methods do best within a budget and a KL bound, as far as rows tell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from bench.errors import BenchError, did_you_mean
from bench.reporting.answers import DIVERSITY, answers
from bench.reporting.budgets import ENOUGH, KL, NEAR, TEST, VALIDATION, amount, draws, measured_gains, spelled, within
from bench.reporting.formats import interval
from bench.reporting.leaderboard import COST_NAMES, Board, tabulate
from bench.reporting.selection import settings, summary

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
    rows = rows[rows["status"] != "failed"]
    if not ask.gradient:
        rows = rows[rows.groupby("row")["reward_gradients"].transform("max") == 0]
    chosen, missing, stops = within(rows, ask.axis, ask.budget, ask.most_kl)
    trained = chosen[chosen["updates"] > 0]
    metrics = [name for name in trained["metric"].unique() if not name.endswith("/floor")]
    spaces = [name for name in metrics if name.partition("/")[0] == DIVERSITY][:1]
    rewards = measured_gains(rows)
    others = [KL] if TEST in rewards else [VALIDATION, KL]
    names = [*rewards, *(name for name in others if name in metrics)]
    names += [*spaces, *(name for name in COST_NAMES if name != "training time")]
    notes = _notes(stops[~stops["row"].isin(missing)], ask)
    board = tabulate(trained, names, missing, notes, f"{title}, within {ask}", _unknown(rows, trained, ask))
    free = _free(chosen[chosen["updates"] == 0], ask)
    board = replace(board, answers=(*answers(board), *free.values()))
    return Advice(board, {name: _settings(chosen, name) for name in [*_worth_a_try(board), *free]})


def _free(rows: pd.DataFrame, ask: Ask) -> dict[str, str]:
    """Methods that train nothing but select among draws, if the bounds let them → a sentence on what they gain."""
    table, reward, found = summary(rows), measured_gains(rows)[0], dict[str, str]()
    for name, cost in draws(rows).items():
        each = cost.of(ask.axis)
        too_far = ask.most_kl is not None and not cost.kl <= ask.most_kl
        if each > ask.budget or too_far or (name, reward) not in table.index:
            continue
        gain = table.loc[(name, reward)]
        ends = interval(gain["difference"], gain["difference_low"], gain["difference_high"], sign=True)
        samples = f"; {spelled(ask.budget, ask.axis)} make {ask.budget // each:,.0f} samples" if each else ""
        kl = "" if math.isnan(cost.kl) else f" at a KL between samples of at most {cost.kl:.2g} nats"
        found[name] = (
            f"Without training {name} gains {' '.join(filter(None, ends))}{kl}, for {cost.nfe:,} NFE and {cost.calls} "
            f"reward calls per finished sample{samples}."
        )
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
