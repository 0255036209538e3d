"""Sentences that state results, as code: each is computed from published rows, and holds under stated conditions.

A claim is a function that reads published tables and returns its wording with the numbers filled in, and what must be
true of the rows for the wording to hold. A page has the wording between `<!-- claim: name -->` and `<!-- /claim -->`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from bench import shipped
from bench.errors import BenchError, did_you_mean
from bench.reporting.budgets import KL, TRAIN, at, with_costs
from bench.reporting.formats import interval
from bench.reporting.selection import collect, settings
from bench.reporting.standings import standings
from bench.reporting.statistics import CONFIDENCE, gaps, holm, paired_p
from bench.reporting.summary import floors, is_robust, priors, spreads, summary, without_levels
from bench.runtime import yaml_text

Key = TypeVar("Key")
PLACE = re.compile(r"<!-- claim: (?P<name>\w+) -->(?P<text>.*?)<!-- /claim -->", re.DOTALL)


class Estimate(NamedTuple):
    """A number with its 95 % interval; as text "0.030 [0.022, 0.037]".

    p: of Student's test that a difference over seeds is zero, or a ratio one; NaN of other numbers.
    """

    value: float
    low: float = float("nan")
    high: float = float("nan")
    p: float = float("nan")

    def __str__(self) -> str:
        return " ".join(filter(None, interval(*self[:3])))

    @property
    def signed(self) -> str:
        """The same with a sign."""
        return " ".join(filter(None, interval(*self[:3], sign=True)))

    @property
    def bare(self) -> str:
        """The number alone, rounded as beside its interval."""
        return interval(*self[:3])[0]

    @property
    def exponential(self) -> "Estimate":
        """The ratio whose logarithm this is."""
        return Estimate(*np.exp(self[:3]))._replace(p=self.p)

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


class Range(NamedTuple):
    """The gains that two methods reach, and the first one's path_kl over the second's in this range."""

    low: float
    high: float
    ratio: Estimate


class Claim(NamedTuple):
    """A wording and, in words, the conditions under which it holds → whether they do."""

    text: str
    conditions: Mapping[str, bool]


@dataclass(frozen=True)
class Table:
    """Published runs of one setting: at their ends, or at an equal gain or cost.

    names: of published tables (`bench ls published`) or paths. axis, limit: see `bench.reporting.budgets.at`.
    measured: whether methods are left out of which a run is interpolated between the prior and its first evaluation.
    trained: whether methods that train nothing are left out.
    Raises BenchError where they hold several settings.
    """

    names: Sequence[str]
    axis: str | None = None
    limit: float = 0.0
    measured: bool = False
    trained: bool = False
    every: pd.DataFrame = field(init=False, repr=False, compare=False)  # all rows, of the whole course of training

    def __post_init__(self) -> None:
        every = _read(tuple(self.names))
        every = every[~every["method"].isin(untrained(every))] if self.trained else every
        object.__setattr__(self, "every", every)

    def at(self, axis: str, limit: float, measured: bool = False) -> "Table":
        """The same runs where they first reach so much of a cost, or of the gain of a reward."""
        return replace(self, axis=axis, limit=limit, measured=measured)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The rows that count, costs among them; distances to the prior are what they exceed its own by."""
        rows = at(self.every, self.axis, self.limit)[0]
        if self.measured:
            rows = rows[~rows["row"].isin(rows.loc[rows["from_prior"].eq(True), "row"])]
        return with_costs(without_levels(rows))

    @cached_property
    def cells(self) -> pd.DataFrame:
        """See `bench.reporting.summary.summary`."""
        return summary(self.rows)

    @property
    def methods(self) -> list[str]:
        """Rows that trained and have values here."""
        trained = self.rows[self.rows["updates"] > 0]
        return list(dict.fromkeys(trained["row"]))

    def __call__(self, method: str, metric: str) -> Estimate:
        """A metric, or a cost by its name in tables. Raises BenchError where there is none."""
        return Estimate(*self._cell(method, metric)[["value", "value_low", "value_high"]])

    def gain(self, method: str, metric: str) -> Estimate:
        """The paired difference to the prior."""
        own = self.rows[(self.rows["row"] == method) & (self.rows["metric"] == metric)]
        ends = self._cell(method, metric)[["difference", "difference_low", "difference_high"]]
        return Estimate(*ends)._replace(p=paired_p(own["difference"].dropna().to_numpy()))

    def _cell(self, method: str, metric: str) -> pd.Series:
        if (method, metric) not in self.cells.index:
            known = [name for row, name in self.cells.index if row == method]
            raise BenchError(f"{self}: {method} has no {metric}{did_you_mean(metric, known)}")
        return self.cells.loc[(method, metric)]

    def floor(self, metric: str) -> Estimate:
        """What as many draws of the target, or of the prior, score."""
        return Estimate(*floors(self.rows).loc[metric, ["value", "value_low", "value_high"]])

    def prior(self, metric: str) -> Estimate:
        """The prior's value."""
        return Estimate(*priors(self.rows).loc[metric, ["value", "value_low", "value_high"]])

    def by_seed(self, method: str, metric: str) -> pd.Series:
        """Seed → value."""
        own = self.rows[(self.rows["row"] == method) & (self.rows["metric"] == metric) & self.rows["value"].notna()]
        return own.set_index("seed")["value"].sort_index()

    def difference(self, first: str, second: str, metric: str) -> Estimate:
        """First minus second, within seeds that both have."""
        return paired(self.by_seed(first, metric), self.by_seed(second, metric), "real", self._robust(metric))

    def ratio(self, first: str, second: str, metric: str) -> Estimate:
        """First over second: geometric mean over seeds that both have, with its interval."""
        values = self.by_seed(first, metric), self.by_seed(second, metric)
        if min(one.min() for one in values) <= 0:
            raise BenchError(f"{self}: {metric} is not positive in all seeds of {first} and {second}: it has no ratio")
        return paired(*values, "positive").exponential

    def since(self, earlier: "Table", method: str, metric: str) -> Estimate:
        """What a metric has changed by since another point of the same runs."""
        return paired(self.by_seed(method, metric), earlier.by_seed(method, metric), "real", self._robust(metric))

    def _robust(self, metric: str) -> bool:
        return bool(is_robust(self.rows)[metric])

    def best(self, metric: str) -> list[str]:
        """The best row of a column, then those that do not differ significantly from it."""
        found = self._marks(metric)
        return sorted(found, key=lambda name: (found[name] != "best", name))

    def _marks(self, metric: str) -> dict[str, str]:
        marks = standings(self.rows, self.cells, [metric], spreads(self.rows, self.cells))
        return {name: one.mark for (name, _), one in marks.items() if one.mark}

    def column(self, metric: str, gain: bool = False) -> dict[str, str]:
        """Row → its cell in Markdown: the value, or the gain over the prior, marked as in published tables."""
        marks, found = self._marks(metric), {}
        for name in self.cells.index[self.cells.index.get_level_values("metric") == metric].get_level_values("row"):
            value, ends = interval(*(self.gain if gain else self)(name, metric)[:3], sign=gain)
            marked = {"best": f"**{value}**", "tie": f"{value} ≈"}.get(marks.get(name, ""), value)
            found[name] = f"{marked} {ends}".strip()
        return found

    def over_gains(self, first: str, second: str, reward: str = TRAIN) -> Range | None:
        """Compare path_kl over all gains that both reach between two evaluations, in all seeds that both have.

        The ratio is a geometric mean over these gains, of equal weight on a log scale, and over seeds, whose interval
        it has. Between evaluations log path_kl is linear in log gain: path_kl grows like a power of the gain, with the
        square of a small one, and a straight line would overstate it. None where there is no such gain.
        """
        paths = [_paths(tuple(self.names), reward).get(name, {}) for name in (first, second)]
        seeds = sorted(paths[0].keys() & paths[1].keys())
        gains = [path[seed][0] for path in paths for seed in seeds]
        if not gains or not all(gain.size for gain in gains):
            return None
        low, high = max(gain[0] for gain in gains), min(gain.max() for gain in gains)
        if high <= low:
            return None
        grid = np.linspace(low, high, 101)
        means = [pd.Series({seed: np.exp(_first(*path[seed], grid).mean()) for seed in seeds}) for path in paths]
        ratio = paired(means[0], means[1], "positive").exponential
        return Range(float(np.exp(low)), float(np.exp(high)), ratio)

    def __str__(self) -> str:
        return " and ".join(self.names) + (f" at {self.limit:g} {self.axis}" if self.axis else "")


@cache
def published(*names: str) -> pd.DataFrame:
    """All rows of published tables, or of paths, in whatever settings; read once."""
    return collect([Path(name) for name in names])[0]


def untrained(rows: pd.DataFrame) -> list[str]:
    """Methods that train nothing."""
    updates = rows.groupby("method")["updates"].max()
    return sorted(updates.index[updates == 0].drop("prior", errors="ignore"))


@cache
def _read(names: tuple[str, ...]) -> pd.DataFrame:
    found = list(settings(published(*names)))
    if len(found) != 1:
        raise BenchError(f"{', '.join(names)}: {len(found)} settings, and a claim is about one.")
    return found[0][1]


@cache
def _paths(names: tuple[str, ...], reward: str) -> dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Row → seed → log gain of a reward and log path_kl of its evaluations in order, those without a gain left out."""
    rows = _read(names)
    rows = rows[(rows["updates"] > 0) & (rows["status"] != "failed")]
    gain, kl = (rows[rows["metric"] == name].set_index(["row", "seed", "budget"]) for name in (reward, KL))
    both = pd.DataFrame({"gain": gain["difference"], "kl": kl["value"]}).sort_index()
    found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for (name, seed), path in both.groupby(["row", "seed"]):
        logs = np.log(path[(path > 0).all(axis=1)])
        found.setdefault(name, {})[seed] = (logs["gain"].to_numpy(), logs["kl"].to_numpy())
    return found


@cache
def tuning(name: str) -> dict[str, Any]:
    """How a published table was tuned: the contents of its `tuned.yaml`; {} if it was not."""
    path = shipped.find("published", Path(name)) / "tuned.yaml"
    return yaml_text.parse(path.read_text(encoding="utf8")) if path.is_file() else {}


def markdown_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of Markdown between blank lines."""
    every = [headings, ["---"] * len(headings), *lines]
    return "\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in every) + "\n"


def _first(gain: np.ndarray, kl: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """`kl` where `gain` first reaches `limits`, none of them below its first value."""
    after = np.searchsorted(np.maximum.accumulate(gain), limits)
    before = np.maximum(after - 1, 0)
    way = gain[after] - gain[before]
    share = np.divide(limits - gain[before], way, out=np.ones_like(limits), where=way > 0)
    return kl[before] + share * (kl[after] - kl[before])


def paired(first: pd.Series, second: pd.Series, support: str, robust: bool = False) -> Estimate:
    """First minus second, seed → value, in the seeds that both have; of logarithms if the support is "positive"."""
    both = pd.concat([first, second], axis=1, join="inner").to_numpy().T
    ends, (of_logs,) = gaps([(both[0], both[1])], support, robust)
    x, y = np.log(both) if of_logs else both
    return Estimate(*ends[0])._replace(p=paired_p(x - y))


def significant(estimates: Mapping[Key, Estimate]) -> list[Key]:
    """Those of a family of differences or ratios that are significant after Holm's correction for their number."""
    corrected = holm([one.p for one in estimates.values()])
    return [key for key, p in zip(estimates, corrected, strict=True) if p < 1 - CONFIDENCE]


class Verdict(NamedTuple):
    """What became of a page: its text with every claim's wording, and what is wrong with it."""

    text: str
    faults: tuple[str, ...]


def render(page: str, claims: Mapping[str, Callable[[], Claim]]) -> Verdict:
    """The page's text with every claim computed anew; the wording of a claim that fails stays as it is."""
    faults: list[str] = []

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in claims:
            faults.append(f"no claim {name}{did_you_mean(name, claims)}")
            return match[0]
        claim = claims[name]()
        failed = [words for words, holds in claim.conditions.items() if not holds]
        faults.extend(f"{name} no longer holds: {words}" for words in failed)
        return match[0] if failed else f"<!-- claim: {name} -->{claim.text}<!-- /claim -->"

    text = PLACE.sub(replaced, page)
    return Verdict(text, tuple(faults))


def used(pages: Sequence[str]) -> Iterator[str]:
    """The names of the claims that pages have."""
    for page in pages:
        yield from (match["name"] for match in PLACE.finditer(page))
