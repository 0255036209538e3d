"""A method as the lower envelope of its configurations: the least path_kl at every gain, compared over all gains.

Rows of one method that differ in its options, its optimiser, β or the number of updates are its configurations. Within
a seed the envelope at a gain is the least KL with which one of them has it. Gains are on test prompts, on training
prompts, and on all prompts where the least KL of all distributions is known: path_kl is a mean over all.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bench.reporting.budgets import GAINS as PROMPTS
from bench.reporting.budgets import KL, measured_gains
from bench.reporting.efficiency import BEYOND, SPLIT, mean_gains
from bench.reporting.frontier import Frontier, find
from bench.reporting.leaderboard import Board, Cell, Line
from bench.reporting.rows import FINGERPRINT
from bench.reporting.selection import SETTING, differing
from bench.reporting.statistics import CONFIDENCE, holm, over_seeds, paired_p, student

CONFIGURED = ("method.", "optimizer.", "reward.beta", "train.updates")  # settings in which configurations may differ
FLOOR = 0.1  # of the largest gain: below it, all configurations are near the prior and agree
GAINS = 25  # at which envelopes are compared


class Group(NamedTuple):
    """Methods that are compared.

    gained: what the gain is of, in words. points: method → seed → its evaluations, (gain, KL, number of the
    configuration) [n, 3], those of a run one after another. frontier: the least KL of all distributions, of a gain on
    all prompts. failed: method → its failed runs, which are left out; of some methods these are all.
    """

    heading: str
    gained: str
    points: dict[str, dict[int, np.ndarray]]
    frontier: Frontier | None = None
    failed: Mapping[str, int] = {}


class Comparison(NamedTuple):
    """Two methods over their common range of gains.

    gains: [G]. ratio, low, high: the mean over seeds of the difference of log KL, and a band that holds the whole curve
    in at least 95 of 100. mean: that of the difference over the gains, with its interval (centre, low, high). p: of
    Student's test that it is 0. seeds: those of both.
    """

    gains: np.ndarray
    ratio: np.ndarray
    low: np.ndarray
    high: np.ndarray
    mean: tuple[float, float, float]
    p: float
    seeds: int


def groups(frame: pd.DataFrame) -> Iterator[Group]:
    """What can be compared among the rows that `bench.reporting.selection.collect` gives.

    Only where some method has several configurations; without them the other tables and figures say it all.
    """
    texts = {text: json.loads(text) for text in frame["settings"].unique()}
    apart = {text: json.dumps(_apart(one)) for text, one in texts.items()}
    frame = frame.assign(apart=frame["settings"].map(apart))
    alike = [*(name for name in SETTING if name != "beta"), "apart"]
    found = []
    for _, both in frame[(frame["updates"] > 0) | (frame["status"] == "failed")].groupby(alike, sort=False):
        names = _names(both[both["status"] == "ok"])
        if len(names) > len(set(names.values())):
            found.append((both, names))
    for both, names in found:
        own, first = both[both["status"] == "ok"], both.iloc[0]
        frontier = find(own)
        heading = f"{first['reward']} on {first['model']}, prompts {first['prompts']}"
        parts = [_apart(texts[other["settings"].iloc[0]]) for other, _ in found]
        if other := differing(_apart(texts[first["settings"]]), parts):
            heading += f"; {other}"
        method_of = {line: method for (method, _), line in names.items()}
        broken = both.loc[both["status"] == "failed"].groupby("method")["run"].nunique()
        lost = {method: int(count) for method, count in broken.items() if method not in method_of.values()}
        splits: list[tuple[str, list[str], Frontier | None]]
        splits = [(PROMPTS[metric], [metric], None) for metric in measured_gains(own)]
        if frontier is not None:
            rewards = [name for name in own["metric"].unique() if re.fullmatch(SPLIT, name)]
            splits.append(("all prompts", rewards, frontier))
        for prompts, metrics, least in splits:
            points = _points(own, metrics)
            line = [names[pair] for pair in zip(points["method"], points["settings"], strict=True)]
            by_line: dict[str, dict[int, np.ndarray]] = {}
            for (name, seed), one in points.groupby([line, "seed"], sort=False):
                by_line.setdefault(str(name), {})[int(seed)] = one[["gain", "kl", "configuration"]].to_numpy()
            failed = {name: int(broken[method_of[name]]) for name in by_line if method_of[name] in broken} | lost
            yield Group(heading, f"the reward on {prompts}", by_line, least, failed)


def _apart(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that rows which are compared share, besides `SETTING`: options of the reward, and the very prior."""
    return {k: v for k, v in settings.items() if k.startswith(("reward.", FINGERPRINT)) and k != "reward.beta"}


def _names(rows: pd.DataFrame) -> dict[tuple[str, str], str]:
    """(method, settings) → the name of its line, for rows with a KL; configurations of a method share it."""
    rows = rows[(rows["metric"] == KL) & (rows["value"] > 0)]
    texts = rows["settings"].unique()
    shared = {text: {k: v for k, v in json.loads(text).items() if not k.startswith(CONFIGURED)} for text in texts}
    names: dict[tuple[str, str], str] = {}
    for method, several in rows.groupby("method")["settings"].unique().items():
        for text in several:
            other = differing(shared[text], [shared[one] for one in several])
            names[str(method), text] = f"{method} ({other})" if other else str(method)
    return names


def _points(rows: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """`method`, `settings`, `seed`, `gain` and `kl` of every evaluation that has both; of a KL of 0 there is no log.

    The gain is that of all samples of these metrics together. `configuration` numbers the settings, and the evaluations
    of a run follow one another.
    """
    run = ["method", "settings", "seed", "budget"]
    gain = mean_gains(rows[rows["metric"].isin(metrics)], run)[[*run, "gain"]]
    kl = rows.loc[(rows["metric"] == KL) & (rows["value"] > 0), [*run, "value"]].rename(columns={"value": "kl"})
    both = gain.merge(kl, on=run).dropna().sort_values(run)
    return both.assign(configuration=both.groupby("settings").ngroup())


def least_kl(points: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """The envelope [G] of points (gain, KL, configuration) [n, 3] at gains [G]; infinite where none gains as much.

    Between two evaluations of a run log KL is linear in log gain: path_kl grows like a power of the gain, with the
    square of a small one. Before its first gain a run has the KL of that.
    """
    least = np.where(points[:, 0] >= gains[:, None], points[:, 1], np.inf).min(1, initial=np.inf)
    for one, other in pairwise(points):
        low, high = sorted((one, other), key=lambda point: point[0])
        if one[2] == other[2] and 0 < low[0] < high[0]:
            inside = (low[0] <= gains) & (gains <= high[0])
            way = np.log(gains[inside] / low[0]) / np.log(high[0] / low[0])
            least[inside] = np.minimum(least[inside], low[1] ** (1 - way) * high[1] ** way)
    return least


def common_range(several: Sequence[Mapping[int, np.ndarray]]) -> np.ndarray:
    """Gains [GAINS] that every seed of these methods reaches, [0] if none.

    They begin at `FLOOR` of the largest of them, or at the gain that each seed has at its least KL: below that an
    envelope would have the KL of a larger gain.
    """
    gaining = [points[points[:, 0] > 0] for seeds in several for points in seeds.values()]
    if not all(map(len, gaining)):
        return np.empty(0)
    top = min(points[:, 0].max() for points in gaining)
    low = max(FLOOR * top, *(points[points[:, 1].argmin(), 0] for points in gaining))
    return np.linspace(low, top, GAINS) if low < top else np.empty(0)


def compare(one: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray]) -> Comparison | None:
    """The log of the KL of one over that of the other, within seeds; None without three seeds or a common gain.

    The band is Student's interval at each gain, corrected for the number of gains (Bonferroni). It holds however the
    gains are correlated; a few seeds cannot tell how.
    """
    seeds = sorted(one.keys() & other.keys())
    gains = common_range([{seed: m[seed] for seed in seeds} for m in (one, other)]) if seeds else np.empty(0)
    if len(seeds) < 3 or not len(gains):
        return None
    logs = [np.log(np.stack([least_kl(m[seed], gains) for seed in seeds])) for m in (one, other)]
    ratio = logs[0] - logs[1]  # [n, G]
    n, centre = len(seeds), ratio.mean(0)
    reach = student(n - 1, len(gains)) * ratio.std(0, ddof=1) / np.sqrt(n)
    means = ratio.mean(1)
    interval = tuple(map(float, over_seeds([means])[0]))
    return Comparison(
        gains, centre, centre - reach, centre + reach, (interval[0], interval[1], interval[2]), paired_p(means), n
    )


def reference(group: Group) -> str:
    """The method that the others are compared with: the least mean log KL over the gains that all reach.

    Where no gain is common to all, the one that reaches most. It is one of those with the most seeds: others may have
    lost their bad ones.
    """
    most = max(map(len, group.points.values()))
    gains = common_range(list(group.points.values()))

    def cost(name: str) -> float:
        seeds = group.points[name].values()
        if not len(gains):
            return -max(float(points[:, 0].max()) for points in seeds)
        return float(np.mean([np.log(least_kl(points, gains)).mean() for points in seeds]))

    return min((name for name, seeds in group.points.items() if len(seeds) == most), key=cost)


def comparisons(group: Group) -> dict[str, Comparison | None]:
    """Every other method against the `reference`."""
    best = reference(group)
    return {name: compare(points, group.points[best]) for name, points in group.points.items() if name != best}


def curves(group: Group) -> dict[str, pd.DataFrame]:
    """Every method's envelope over the gains that all its seeds reach: `gain`, `value`, `low`, `high` [nats].

    The mean of log KL over seeds with Student's interval at each gain; methods without a gain are left out.
    """
    found = {}
    for name, seeds in group.points.items():
        gains = common_range([seeds])
        if len(gains):
            logs = np.log(np.stack([least_kl(points, gains) for points in seeds.values()]))
            ends = np.exp(over_seeds(list(logs.T)))
            found[name] = pd.DataFrame(ends, columns=["value", "low", "high"]).assign(gain=gains)
    return found


def ratios(group: Group) -> dict[str, pd.DataFrame]:
    """The others' KL over that of the `reference`: `gain`, `value`, `low`, `high`, a band for the whole curve."""
    return {
        name: pd.DataFrame(np.exp([one.ratio, one.low, one.high]).T, columns=["value", "low", "high"]).assign(
            gain=one.gains
        )
        for name, one in comparisons(group).items()
        if one
    }


def over_least(points: Mapping[int, np.ndarray], frontier: Frontier) -> Cell:
    """The envelope over the least KL of all distributions, over the gains that all seeds reach and the curve knows.

    The exponential of the mean difference of logarithms, with Student's interval over seeds, to which the curve's own
    error is added in squares.
    """
    gains = common_range([points])
    if not len(gains):
        return Cell(text="–")
    least = frontier.least(gains)
    known = least["kl"].notna().to_numpy()
    if not known.any():
        return Cell(text=BEYOND)
    gains, least = gains[known], least[known]
    logs = [(np.log(least_kl(one, gains)) - np.log(least["kl"])).mean() for one in points.values()]
    centre, low, high = over_seeds([np.array(logs)])[0]
    error = student(np.inf) * least["error"].mean()
    ends = centre - np.hypot(centre - low, error), centre + np.hypot(high - centre, error)
    value, low, high = np.exp([centre, *ends])
    return Cell(value, low, high, text=f"at {gains[0]:+.2g} to {gains[-1]:+.2g}")


def table(group: Group) -> Board:
    """The table: the ratio of KL to the reference's over the common gains, p by Holm's method, and the band.

    With the curve of the least KL, the ratio to it too.
    """
    best, found = reference(group), comparisons(group)
    known = {name: one.p for name, one in found.items() if one}
    corrected = dict(zip(known, holm(list(known.values())), strict=True))
    places = {"at the least gain": 0, "in the middle": GAINS // 2, "at the largest": GAINS - 1}

    def line(name: str, cells: Sequence[Cell], n: int) -> Line:
        least = [over_least(group.points[name], group.frontier)] if group.frontier else []
        failed = f", {group.failed[name]} failed" if name in group.failed else ""
        return Line(name, (*cells, *least), f"{n}{failed}")

    lines = [line(best, (Cell(1.0), *[Cell(text="–")] * (1 + len(places))), len(group.points[best]))]
    for name, one in found.items():
        cells = (Cell(text="–"),) * (2 + len(places))
        if one:
            mark = "" if corrected[name] < 1 - CONFIDENCE else "not separated"
            mean = Cell(*np.exp(one.mean)), Cell(text=f"{corrected[name]:.2g} {mark}".strip())
            shown = np.stack([one.gains, *np.exp([one.ratio, one.low, one.high])])[:, list(places.values())].T
            cells = (*mean, *(Cell(value, low, high, text=f"at {at:+.2g}") for at, value, low, high in shown))
        lines.append(line(name, cells, one.seeds if one else len(group.points[name])))
    columns = (f"KL over that of {best}", "p (Holm)", *places, *(["KL over the least"] if group.frontier else []))
    notes = [
        f"The lower envelope of every method over its configurations: the least {KL} with which one of them gains as "
        f"much of {group.gained}; between evaluations of a run log {KL} is linear in log gain. The ratio is the "
        "exponential of the mean difference of log KL over the gains that both reach in every seed, from "
        f"{FLOOR:g} of the largest and both first evaluations on, paired by seed; Student's interval over seeds, 95 %. "
        f"At single gains the brackets are of a band that holds the whole curve in at least 95 of 100: Student's "
        f"intervals, corrected for {GAINS} gains (Bonferroni)."
    ]
    notes += [f"All {n} runs of {name} failed." for name, n in group.failed.items() if name not in group.points]
    if group.frontier is not None:
        notes.append(
            "KL over the least: the same mean, over the least KL of all distributions with this gain, from "
            f"{group.frontier.samples:,} prior samples a prompt, over the gains in the cell: those that the method "
            "reaches in every seed and these samples tell."
        )
    return Board(f"Envelopes: {group.heading}, {group.gained}", columns, columns, tuple(lines), tuple(notes))
