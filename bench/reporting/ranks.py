"""Mean ranks of methods over settings, and which of them are separated (Demšar, 2006)."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

from bench.reporting.leaderboard import Board, Cell, Line
from bench.reporting.statistics import CONFIDENCE

FEWEST = 3  # methods, for Friedman's test


class Ranks(NamedTuple):
    """Methods over settings that all of them are in.

    table: method × setting → rank, 1 the best, the least mean first. distance: Nemenyi's critical one, of mean ranks.
    p: of Friedman's test that all mean ranks are equal.
    """

    table: pd.DataFrame
    distance: float
    p: float

    @property
    def means(self) -> pd.Series:
        """Method → its mean rank."""
        return self.table.mean(axis=1)

    def groups(self) -> list[list[str]]:
        """The largest sets of neighbours that are not separated from one another, the best first."""
        means, found = self.means, list[list[str]]()
        for start in means:
            group = [str(name) for name in means.index[(means >= start) & (means < start + self.distance)]]
            if len(group) > 1 and (not found or group[-1] != found[-1][-1]):
                found.append(group)
        return found


def ranks(scores: pd.DataFrame) -> Ranks:
    """Ranks of scores, method × setting, of which the larger is better; equal ones share their mean rank.

    Raises ValueError for fewer than `FEWEST` methods or two settings.
    """
    methods, settings = scores.shape
    if methods < FEWEST or settings < 2:
        raise ValueError(f"{methods} methods in {settings} settings: ranks take {FEWEST} and two")
    table = scores.rank(ascending=False)
    table = table.loc[table.mean(axis=1).sort_values(kind="stable").index]
    quantile = scipy.stats.studentized_range.ppf(CONFIDENCE, methods, np.inf) / 2**0.5
    distance = quantile * (methods * (methods + 1) / (6 * settings)) ** 0.5
    return Ranks(table, float(distance), float(scipy.stats.friedmanchisquare(*scores.to_numpy()).pvalue))


def ranks_table(found: Ranks, measures: dict[str, str], partly: dict[str, int]) -> Board:
    """The table; measures: setting → what it is ranked by; partly: method → the settings it is in, not all of them."""
    means, count = found.means, found.table.shape[1]
    best = str(means.index[0])
    near = [str(name) for name in means.index[1:] if means[name] - means.iloc[0] < found.distance]
    lines = [
        Line(str(name), (Cell(means[name]), *(Cell(rank) for rank in found.table.loc[name])), str(count))
        for name in means.index
    ]
    columns = ("mean rank ↓", *(f"in setting {number}" for number in range(1, count + 1)))
    shown = ", ".join(near[:6]) + (f" and {len(near) - 6} more" if len(near) > 6 else "")
    behind = f"not separated from it: {shown}" if near else "all others are separated from it"
    answers = [f"{best} has the least mean rank, {means.iloc[0]:.3g}; {behind}."]
    if found.p >= 1 - CONFIDENCE:
        answers.append(f"The ranks do not show that methods differ at all (Friedman's test, p = {found.p:.2g}).")
    notes = [
        "Ranks by the last evaluations' means over seeds, 1 the best; a failed run counts as the prior. Mean ranks "
        f"{found.distance:.3g} or more apart are separated (Nemenyi's test, 95 %, for all pairs of {len(means)} "
        f"methods; Demšar, 2006). Friedman's test that none differ: p = {found.p:.2g}. Settings count as independent."
    ]
    notes += [f"Setting {i}: {one}, by {measures[one]}." for i, one in enumerate(found.table, 1)]
    if partly:
        missing = ", ".join(f"{name} (in {n} of {count})" for name, n in partly.items())
        notes.append(f"Not ranked, as they are not in all settings: {missing}.")
    return Board("Mean ranks over all settings", columns, columns, tuple(lines), tuple(notes), answers=tuple(answers))
