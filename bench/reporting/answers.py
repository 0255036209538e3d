"""Plain sentences below a table, which follow from its numbers alone."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd

from bench.reporting.budgets import GAINS, KL, TRAIN
from bench.reporting.formats import interval, parts
from bench.reporting.leaderboard import Board, Cell, Line
from bench.reporting.statistics import FEW

NAMED = 4  # methods that a list names; of more it says how many
DIVERSITY = "diversity"
DISTANCES = ("tilt_sw2", "target_sw2/test", "target_sw2/train")  # to a known target


class Verdict(NamedTuple):
    """Methods by what a column says of them.

    better: significantly better than the best, which is one of those with the most seeds; they have fewer. untested: no
    interval of the difference to the best is known.
    """

    best: tuple[str, ...]
    ties: tuple[str, ...]
    worse: tuple[str, ...]
    better: tuple[str, ...]
    untested: tuple[str, ...]


def answers(
    board: Board, gain: Board | None = None, limit: float = 0.0, hint: str = "", on: str = ""
) -> tuple[str, ...]:
    """What a table says, in sentences: who gains most, who keeps most diversity, who is first at a gain.

    gain: the table at an equal gain of `limit`, from which the second and the third sentence come; None without one.
    It may be `board` itself, whose first sentence then is on the KL. hint: where a reader finds that table, if it is
    not shown; the second sentence is `board`'s then. on: " on test prompts", where the gain is one of several.
    """
    at_gain = f"At a gain of {limit:+g}{on}"
    sentences = [_least_kl(board, at_gain) if board is gain else _most_gain(board)]
    sentences.append(_diversity(gain, at_gain) if gain and not hint else _diversity(board))
    if gain:
        sentences.append(_first(gain, f"{limit:+g}{on}", hint))
    if board is not gain:
        sentences.insert(0, _closest(board))
    return tuple(filter(None, sentences))


def _cells(board: Board, metric: str) -> dict[str, Cell]:
    """Method → its cell in the metric's column; none without such a column."""
    return {line.name: cell for line, cell in _column(board, metric) if line.n}


def _reward(board: Board) -> str:
    """The reward by which a table ranks: on test prompts if it has that."""
    return next((name for name in GAINS if name in board.columns), TRAIN)


def _prior(board: Board, metric: str) -> Cell:
    return next((cell for line, cell in _column(board, metric) if line.name == "prior"), Cell())


def _floor(board: Board, metric: str) -> Cell:
    return next((cell for line, cell in _column(board, metric) if line.name == "sampling floor"), Cell())


def _column(board: Board, metric: str) -> list[tuple[Line, Cell]]:
    """Lines and cells of a metric's column; of diversity in the first of its feature spaces."""
    names = [name.partition("/")[0] if metric == DIVERSITY else name for name in board.columns]
    columns = [i for i, name in enumerate(names) if name == metric]
    return [(line, line.cells[i]) for i in columns[:1] for line in board.lines]


def _verdict(cells: dict[str, Cell], lower: bool = False) -> Verdict:
    """By the column's marks; where nothing is marked, the best number is the best and all others are untested."""
    known = {name: cell for name, cell in cells.items() if not pd.isna(cell.value)}
    best = tuple(name for name, cell in known.items() if cell.mark == "best")
    sign = -1 if lower else 1
    if known and not best:
        best = (max(known, key=lambda name: sign * known[name].value),)
    others = {name: cell for name, cell in known.items() if name not in best}
    ties = tuple(name for name, cell in others.items() if cell.mark == "tie")
    untested = tuple(name for name, cell in others.items() if not cell.mark and pd.isna(cell.gap_low))
    apart = [name for name in others if name not in ties + untested]
    better = tuple(name for name in apart if sign * others[name].gap > 0)
    return Verdict(best, ties, tuple(name for name in apart if name not in better), better, untested)


def _listed(names: Sequence[str], show: Callable[[str], str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(show, names[:NAMED])) + more


def _compared(verdict: Verdict, show: Callable[[str], str], better: str, worse: str) -> str:
    """What is beside the best, with a semicolon before each: those significantly better, ties, worse, untested ones."""
    said = [""]
    if verdict.better:
        said.append(f"significantly {better}, but of fewer seeds: {_listed(verdict.better, show)}")
    if verdict.ties:
        said.append(f"not separated: {_listed(verdict.ties, show)}")
    if verdict.worse:
        said.append(f"significantly {worse}: {_listed(verdict.worse, show)}")
    if verdict.untested:
        said.append(f"not tested: {_listed(verdict.untested, show)}")
    return "; ".join(said)


def _value(cell: Cell) -> str:
    """As the table prints it, without its sign of interpolation."""
    return parts(cell)[0].removesuffix(" ‡")


def _gain(board: Board, cell: Cell) -> tuple[float, str, str]:
    """A reward's gain over the prior, and as text with its interval: paired, or from the prior's one value."""
    ends = cell.difference, cell.difference_low, cell.difference_high
    if pd.isna(cell.difference):
        prior = _prior(board, _reward(board)).value
        ends = cell.value - prior, cell.low - prior, cell.high - prior
    return (ends[0], *interval(*ends, sign=True))


def _seeds(board: Board, names: Sequence[str]) -> str:
    """What a reader must know where few seeds are behind the best rows; "" if there are enough."""
    count = min(int(line.n.partition(",")[0]) for line in board.lines if line.name in names)
    if count == 1:
        return " This is from one seed and says nothing about others."
    return f" This rests on {count} seeds." if count < FEW else ""


def _most_gain(board: Board) -> str:
    """Which methods gain most, at what KL, and which are not separated from them."""
    reward = _reward(board)
    cells, kl = _cells(board, reward), _cells(board, KL)
    verdict = _verdict(cells)
    if not verdict.best:
        return ""

    def at(name: str) -> str:
        return f"KL {_value(kl[name])}" if name in kl and pd.notna(kl[name].value) else ""

    def show(name: str) -> str:
        return f"{name} ({', '.join(filter(None, [_gain(board, cells[name])[1], at(name)]))})"

    best = verdict.best[0]
    gain, *text = _gain(board, cells[best])
    amount, seeds = " ".join(filter(None, text)), _seeds(board, verdict.best)
    if gain <= 0:
        return f"No method gains reward: the best is {best} with {amount}.{seeds}"
    where = f", at a KL of {_value(kl[best])} nats" if at(best) else ""
    scattered = tuple(name for name in verdict.ties if _gain(board, cells[name])[0] <= 0)
    ties = tuple(name for name in verdict.ties if name not in scattered)
    behind = _compared(verdict._replace(ties=ties, worse=()), show, "more", "")
    if scattered:
        behind += f"; too scattered to separate: {_listed(scattered, show)}"
    if count := len(verdict.worse):
        behind += f"; {count} other{'s gain' if count > 1 else ' gains'} significantly less"
    return f"{best} gains {'most reward, ' * (len(cells) > 1)}{amount}{where}{behind}.{seeds}"


def _least_kl(board: Board, at_gain: str) -> str:
    """At an equal gain: who is closest to the prior."""
    cells = _cells(board, KL)
    verdict = _verdict(cells, lower=True)
    if not verdict.best:
        return ""
    best = " and ".join(f"{name}, {' '.join(filter(None, parts(cells[name])[:2]))}" for name in verdict.best)
    behind = _compared(verdict, lambda name: f"{name} ({_value(cells[name])})", "lower", "higher")
    return f"{at_gain} the KL is lowest with {best} nats{behind}.{_seeds(board, verdict.best)}"


def _closest(board: Board) -> str:
    """Where the target is known: who is nearest to it."""
    metric = next((name for name in DISTANCES if _cells(board, name)), "")
    cells = _cells(board, metric)
    verdict = _verdict(cells, lower=True)
    if not verdict.best:
        return ""

    def show(name: str) -> str:
        return f"{name} ({_value(cells[name])})"

    best, floor = verdict.best[0], _floor(board, metric)
    behind = _compared(verdict._replace(worse=()), show, "nearer", "")
    least = f"; as many draws of it have {_value(floor)}" if pd.notna(floor.value) else ""
    text = " ".join(filter(None, parts(cells[best])[:2]))
    return f"{best} comes closest to the target, {metric} {text}{behind}{least}.{_seeds(board, verdict.best)}"


def _diversity(board: Board, at_gain: str = "") -> str:
    """Who keeps most diversity; without an equal gain, with the gain of each beside it."""
    cells, gains = _cells(board, DIVERSITY), {} if at_gain else _cells(board, _reward(board))
    learned = {name: cell for name, cell in cells.items() if cell.mark or pd.notna(cell.gap_low)}
    verdict = _verdict(learned or cells)
    if not verdict.best:
        return ""

    def show(name: str) -> str:
        gain = f", gain {_gain(board, gains[name])[1]}" if name in gains else ""
        return f"{name} ({_value(cells[name])}{gain})"

    start = f"{at_gain} diversity is" if at_gain else "Diversity is"
    prior = f"; the prior has {_value(_prior(board, DIVERSITY))}"
    return f"{start} highest with {_listed(verdict.best, show)}{_compared(verdict, show, 'higher', 'lower')}{prior}."


def _first(board: Board, gain: str, hint: str) -> str:
    """What reaches the gain first, by NFE and by reward calls, and what never does."""
    never = [line.name for line in board.lines if line.n and line.cells[0].text.startswith("never")]
    first = [text for name in ("NFE", "reward calls") if (text := _fewest(board, name))]
    if not first:
        return board.lead
    missed = f"; never by {_listed(never, str)}" if never else ""
    return f"A gain of {gain} is reached first {'; '.join(first)}{missed}{f' ({hint})' if hint else ''}."


def _fewest(board: Board, cost: str) -> str:
    """Who spends least of a cost; where of some only bounds are known, those too."""
    cells = _cells(board, cost)
    verdict = _verdict(cells, lower=True)
    least = cells[verdict.best[0]].value if verdict.best else math.inf
    bounds = [name for name, cell in cells.items() if pd.isna(cell.value) and cell.text and _lowest(cell) < least]

    def show(name: str) -> str:
        return f"{name} ({_value(cells[name])})"

    if not verdict.best:
        return f"in {cost} by one of {_listed(bounds, show)}" if bounds else ""
    text = f"in {cost} by {_listed(verdict.best, show)}"
    if verdict.better:
        text += f" (earlier, but of fewer seeds: {_listed(verdict.better, show)})"
    if bounds:
        return f"{text}, unless by {_listed(bounds, show)}"
    if verdict.untested and not cells[verdict.best[0]].mark:
        return f"{text}, not tested against others"
    return f"{text}, not separated from {_listed(verdict.ties, show)}" if verdict.ties else text


def _lowest(bound: Cell) -> float:
    """The lower end of bounds of a cost: of "< 120" it is 0."""
    low, _, high = bound.text.partition(" – ")
    return float(low.replace(",", "")) if high else 0.0
