"""A run's rows beside rows that are there already: which are new, and which contradict."""

from typing import NamedTuple

import pandas as pd

from bench.reporting.agreement import COUNTED, agreement
from bench.reporting.identity import MEASUREMENT, RUN, identified

PLACE = ["metric", "budget"]


class Comparison(NamedTuple):
    """known: whether the run is there; new: its rows that are not; conflicts: a sentence for each contradiction."""

    known: bool
    new: pd.DataFrame
    conflicts: list[str]


def compare(rows: pd.DataFrame, there: pd.DataFrame | None) -> Comparison:
    """The rows of one run beside those that are there. Numbers that agree to rounding are no contradiction."""
    mine = identified(rows)
    twice = mine[mine.duplicated(MEASUREMENT)]
    conflicts = [f"{row.metric} at {row.budget} updates stands in it twice." for row in twice.itertuples()]
    ours = identified(rows[:0] if there is None else there[there["seed"] == rows["seed"].iloc[0]])
    ours = ours[(ours[RUN] == mine[RUN].iloc[0]).all(axis=1)]
    if ours.empty:
        return Comparison(False, rows, conflicts)
    known, asked = (pd.MultiIndex.from_frame(frame[PLACE]) for frame in (ours, mine))
    name = rows["run"].iloc[0]
    before, now = ("failed" if "failed" in set(frame["status"]) else "finished" for frame in (ours, mine))
    if before != now:
        conflicts.append(f"{name} has {before} there and {now} here.")
    compared = agreement(ours[known.isin(asked)], mine[asked.isin(known)], COUNTED)
    conflicts += [
        f"{name} is there with another {row.column} of {row.metric} at {row.budget} updates: "
        f"{row.published} there, {row.again} here."
        for row in compared[~compared["verdict"].isin(["equal", "rounding"])].itertuples()
    ]
    return Comparison(True, rows[~asked.isin(known)], conflicts)
