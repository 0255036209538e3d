"""`bench compare`: two configurations, metric by metric, within seeds: at the end, at equal cost and at equal gain."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import scipy.stats

from bench.errors import BenchError, did_you_mean
from bench.reporting.budgets import GAINS, KL, at, measured_gains, spelled, with_costs
from bench.reporting.formats import interval
from bench.reporting.leaderboard import COST_NAMES, Board, Cell, Line, heading, selected
from bench.reporting.selection import SETTING, differing, failures, settings
from bench.reporting.statistics import CONFIDENCE, gaps, holm
from bench.reporting.summary import summary, without_levels

SIDES = ("A", "B")


class Point(NamedTuple):
    """Where both are compared: at the end, at a cost, or at a gain; axis, limit: see `bench.reporting.budgets.at`."""

    axis: str | None
    limit: float

    @property
    def title(self) -> str:
        """What stands above the column."""
        if self.axis is None:
            return "at the end"
        if self.axis.startswith("reward/"):
            return f"at a gain of {self.limit:+.3g} in {self.axis}"
        return f"at {spelled(self.limit, self.axis)}"


class Difference(NamedTuple):
    """A − B of a metric at a point, over seeds that both have; p: two-sided, by Student's t, before any correction."""

    value: float
    low: float
    high: float
    seeds: int
    p: float
    clear: bool = False  # after Holm's correction over all of the comparison


@dataclass(frozen=True)
class Comparison:
    """A table and a sentence."""

    board: Board
    sentence: str


def one_configuration(frame: pd.DataFrame, name: str | None, given: str) -> pd.DataFrame:
    """The rows of the configuration `name` among those of `frame`, or of the only one.

    Raises BenchError, with the names that there are, where it is not one.
    """
    tables = [rows for _, rows in settings(frame)]
    rows = pd.concat(tables)
    names = list(rows.loc[rows["method"] != "prior", "row"].unique())
    wanted = [one for one in names if name in (None, one)] or [one for one in names if one.split(" (")[0] == name]
    if name is not None and not wanted:
        raise BenchError(f"{given}: no row {name!r}{did_you_mean(name, names)}")
    if len(wanted) > 1:
        raise BenchError(f"{given} holds {len(wanted)} configurations ({', '.join(wanted)}): name one, {given}/NAME.")
    rows = rows[rows["row"].isin(wanted)]
    if rows.groupby(list(SETTING)).ngroups > 1:
        raise BenchError(f"{given} holds runs of {wanted[0]} in several settings: give one setting's folder.")
    return rows


def compare(first: pd.DataFrame, second: pd.DataFrame, names: tuple[str, str]) -> Comparison:
    """A − B in paired seeds. first, second: rows of `one_configuration`. names: what tables call A and B.

    Raises BenchError where they are of different settings or share no seed.
    """
    both = pd.concat([first.assign(side="A"), second.assign(side="B")])
    tables = list(settings(both.drop(columns=["row", "nfe", "apart"], errors="ignore")))
    if len(tables) > 1:
        raise BenchError(f"A and B cannot be compared: {_unlike(first, second)}.")
    heading_of, rows = tables[0]
    rows = without_levels(rows.assign(row=rows["side"]))
    failed = failures(rows)
    rows = rows[rows["status"] != "failed"]
    seeds = [set(rows.loc[rows["row"] == side, "seed"]) for side in SIDES]
    if not (shared := seeds[0] & seeds[1]):
        raise BenchError(f"A has seeds {sorted(seeds[0])} and B {sorted(seeds[1])}: they share none to be paired by.")
    rows = rows[rows["seed"].isin(shared)]
    columns, reasons = {}, [f"{side}: failed runs are left out, {count}." for side, count in failed.items()]
    for point in _points(rows):
        chosen, missing, _ = at(rows, point.axis, point.limit)
        columns[point] = with_costs(chosen)
        reasons += [f"{point.title.capitalize()}: {side} {one.why}." for side, one in missing.items()]
    metrics = list(dict.fromkeys(name for chosen in columns.values() for name in selected(chosen)))
    found = {
        (metric, point): difference
        for point, chosen in columns.items()
        for metric in metrics
        if (difference := _difference(chosen, metric)) and not _given(metric, point)
    }
    found = _corrected(found)
    board = _board(f"A = {names[0]}, B = {names[1]}: {heading_of}", rows, columns, metrics, found, reasons)
    return Comparison(board, _sentence(found, list(columns), names))


def _unlike(first: pd.DataFrame, second: pd.DataFrame) -> str:
    """In what the settings of two configurations differ, method and seed apart."""
    own = [json.loads(rows["settings"].iloc[0]) | {k: rows[k].iloc[0] for k in SETTING} for rows in (first, second)]
    keys = ("reward", "model", "prompts", "evaluation", "sampler", "beta", "budget_unit")
    parts = [{k: str(v) for k, v in one.items() if k.startswith(keys)} for one in own]
    return f"A has {differing(parts[0], parts)}; B has {differing(parts[1], parts)}"


def _points(rows: pd.DataFrame) -> list[Point]:
    """The end, and the largest NFE, reward calls and gains that all runs of both have."""
    points = [Point(None, 0.0)]
    if rows.groupby("row")["updates"].max().min() == 0:  # one that trains nothing is a point, no curve
        return points
    for axis in ("nfe", "reward_calls"):
        most = rows.groupby(["row", "seed"])[axis].max().min()
        points += [Point(axis, float(most))] if most > 0 else []
    for reward in measured_gains(rows):
        gains = rows[rows["metric"] == reward].groupby(["row", "seed"])["difference"].max()
        if len(gains) and (most := gains.min()) > 0:
            unit = 10.0 ** (math.floor(math.log10(most)) - 1)
            points.append(Point(reward, math.floor(most / unit) * unit))
    return points


def _given(metric: str, point: Point) -> bool:
    """Whether the metric is what is held equal."""
    return {"nfe": "NFE", "reward_calls": "reward calls"}.get(point.axis or "", point.axis) == metric


def _difference(rows: pd.DataFrame, metric: str) -> Difference | None:
    own = rows[(rows["metric"] == metric) & rows["value"].notna()]
    pairs = own.pivot(index="seed", columns="row", values="value").reindex(columns=list(SIDES)).dropna()
    if pairs.empty:
        return None
    centre, low, high = gaps([(pairs["A"].to_numpy(), pairs["B"].to_numpy())], "real")[0][0]
    n = len(pairs)
    p = math.nan
    if n > 1 and high > low:
        error = (high - low) / 2 / scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
        p = float(2 * scipy.stats.t.sf(abs(centre) / error, n - 1))
    return Difference(centre, low, high, n, p)


def _corrected(found: dict[tuple[str, Point], Difference]) -> dict[tuple[str, Point], Difference]:
    """Which differences are left after Holm's correction, costs apart: they are chosen, not measured."""
    tested = [key for key, one in found.items() if not math.isnan(one.p) and key[0] not in COST_NAMES]
    corrected = dict(zip(tested, holm([found[key].p for key in tested]), strict=True))
    return {key: one._replace(clear=corrected.get(key, 1.0) < 1 - CONFIDENCE) for key, one in found.items()}


def _board(
    title: str,
    rows: pd.DataFrame,
    columns: dict[Point, pd.DataFrame],
    metrics: Sequence[str],
    found: dict[tuple[str, Point], Difference],
    reasons: Sequence[str],
) -> Board:
    """Metrics as lines; A and B at their ends, and A − B at every point."""
    ends = summary(columns[Point(None, 0.0)])
    titles = {row["metric"]: heading(row) for row in with_costs(rows).drop_duplicates("metric").to_dict("records")}

    def cell(side: str, metric: str) -> Cell:
        if (side, metric) not in ends.index:
            return Cell()
        return Cell(*ends.loc[(side, metric), ["value", "value_low", "value_high"]])

    def difference(metric: str, point: Point) -> Cell:
        if _given(metric, point):
            return Cell(text="equal")
        if (one := found.get((metric, point))) is None:
            return Cell()
        return Cell(text=" ".join(filter(None, interval(*one[:3], sign=True))) + " *" * one.clear)

    lines = []
    for metric in metrics:
        n = max((one.seeds for (name, _), one in found.items() if name == metric), default=0)
        cells = *(cell(side, metric) for side in SIDES), *(difference(metric, point) for point in columns)
        lines.append(Line(titles[metric], cells, str(n)))
    headings = ("A", "B", *(f"A − B {point.title}" for point in columns))
    notes = [
        "A and B: over the seeds that both have, at the end of training; of positive metrics geometric means, from ten "
        "seeds on interquartile means. A − B: the arithmetic mean of the differences, paired by seed; square brackets: "
        "95 %, Student's t.",
        f"* Differs from zero after Holm's correction over the {_tested(found)} differences tested here (costs are "
        "not).",
        *reasons,
    ]
    return Board(title, headings, headings, tuple(lines), tuple(notes), of="metric")


def _tested(found: dict[tuple[str, Point], Difference]) -> int:
    return sum(not math.isnan(one.p) and metric not in COST_NAMES for (metric, _), one in found.items())


def _sentence(found: dict[tuple[str, Point], Difference], points: Sequence[Point], names: tuple[str, str]) -> str:
    """Reward at equal cost and KL at equal gain, as far as they were measured, and how sure they are."""
    said = []
    reward = next((metric for metric, _ in found if metric in GAINS), "")  # the headline's is first
    for point in points[1:] or points:
        metric = KL if (point.axis or "").startswith("reward/") else reward
        if (one := found.get((metric, point))) is None:
            continue
        size = " ".join(filter(None, interval(*one[:3], sign=True)))
        unit = " nats" if metric == KL else ""
        what = f"{point.title} A's {metric} differs from B's by {size}{unit}"
        sure = "" if one.clear else ", which is not separated from zero" if one.seeds > 1 else ", from one seed"
        said.append(f"{what}{sure}")
    text = "; ".join(said)
    return f"A = {names[0]}, B = {names[1]}: {text}." if said else "Neither reward nor KL was measured for both."
