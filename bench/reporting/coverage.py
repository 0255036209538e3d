"""`python -m bench.reporting.coverage > docs/statistics.md`: how often the printed intervals hold, by simulation."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.stats

from bench.environment import ROOT
from bench.reporting.budgets import ENOUGH, NEAR
from bench.reporting.rows import read_rows
from bench.reporting.statistics import CONFIDENCE, FEW, MANY, gaps, holm, improvement, intervals
from bench.reporting.table import is_clear

COUNTS = (3, 5, 10)
DRAWS = 2000
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class Law:
    """A distribution of a metric's values over seeds; values: [n], equally likely, or very many draws."""

    draw: Draw
    support: str
    values: np.ndarray

    def truth(self, support: str, robust: bool) -> float:
        """What an interval is to contain: the mean (of a positive metric geometric), or the interquartile mean."""
        if robust:
            levels = np.linspace(0.25, 0.75, 2001)
            return float(np.quantile(self.values, levels, method="inverted_cdf").mean())
        return float(np.exp(np.log(self.values).mean()) if support == "positive" else self.values.mean())


KINDS: dict[str, tuple[Draw, str]] = {  # of values, with their support
    "normal": (lambda rng, shape: rng.standard_normal(shape), "real"),
    "skewed": (lambda rng, shape: rng.standard_exponential(shape) - 1, "real"),
    "lognormal, σ = 1, positive": (lambda rng, shape: np.exp(rng.standard_normal(shape)), "positive"),
    "beta(20, 2), share": (lambda rng, shape: rng.beta(20, 2, shape), "share"),
    "counts, share": (lambda rng, shape: rng.binomial(144, rng.beta(140, 1.4, shape)) / 144, "share"),
}

PAGE = """# What tables say, and how sure it is

**Intervals.** Square brackets are 95 % intervals over seeds. They are intervals of the mean, by Student's t. In a
column where every row has at least {many} values they are intervals of the interquartile mean (the mean of the middle
half), by a percentile bootstrap over seeds. Every seed has its own training noise and, unless `evaluation.seed` is set,
its own evaluation noise, so the interval covers both. If all seeds share one draw of the evaluation noise, the note
below the table says that the interval covers training alone. n is the number of runs; figures show every run as a dot.
† marks rows with fewer than {few} runs: too few to show how they scatter, so there the interval rests on the assumed
shape alone.

**Scales.** A metric declares which values it can take (`support`), and no interval leaves them. For *positive* metrics
(distances, KL divergences, diversity) and for costs, means and intervals are taken of logarithms: the value in a table
is the geometric mean. For *shares* (coverage, `tilt_tv`) the mean is that of the shares, and its interval is
symmetric on the scale of logits: a standard error s of the mean m is s / (m (1 − m)) there. Single values of exactly 0
or 1 do no harm then. If all values are 0, or all are 1, there is no interval. Positive values with a zero among
them are treated like shares: arithmetic mean, interval symmetric in its logarithm. From {many} seeds on all values are
taken as they are: a bootstrap never leaves the range. All others (rewards) are *real*, and
so is an estimate that may come out negative, whatever it estimates: `tilt_gap` is never negative in population, but its
Monte Carlo estimate is real. `path_kl` is a mean of squares and never negative. A plugin's metric is real unless it
declares otherwise. If a metric declared positive has a negative value in a row, that row is treated as real.

**One seed.** The interval is that of its single evaluation, by Student's t on the same scale: over prompts, over the
noise where prompts are fixed (`reward/train`), or over the samples of a single prompt. It says nothing about other
seeds. A metric without a standard error of its own (`fid_prior`, `kid_prior`) has no interval.

**Differences to the prior** are in round brackets. Within a seed all methods and the prior share the evaluation's
noise, so differences are taken within seeds and then summarised. Of real metrics and shares, and from {many} seeds on,
they are plain differences; of positive ones, differences of logarithms, applied to the prior's geometric mean and
printed in the metric's unit. The prior's value plus an end of the interval never leaves the metric's range.

**Distances to the prior** (`fid_prior`, `kid_prior`) are printed as what they exceed the prior's own by, on the same
noise. The prior's own samples are at a distance only because there are few of them: with fewer samples than
feature dimensions `fid_prior` is in the hundreds for a perfect copy. `--all` prints the levels.

**The best** value of a column, among the rows with the most seeds, is bold or has a star. ≈ marks values that do not
differ significantly from it: the 95 % interval of the difference to the best, within seeds, contains zero. It is a
difference of logarithms for positive metrics (under {many} seeds) and a plain one for all others: for shares near 1,
three seeds would find differences of logits where there are none. `report.csv` has every tested difference with its
interval (`gap`), and the page shows it on hover. A row with as many seeds and no mark is worse than the best at 95 %,
one comparison at a time: among twenty rows, one is expected to lose its mark by chance. If no error is known, nothing
is marked.

**Doing nothing wins nothing.** At some metrics no model does better than the prior (`prior_is_best`: diversity,
coverage, `vendi`, distances to the prior, `path_kl`). Values beyond the prior's count as equal to it, so that several
rows may have a star; ≈ then means that the printed difference to the prior contains zero. In these columns only
rows that learned are marked: those whose mean gain of the training reward is at least half of the best row's. The note
below the table names them.

**A floor** is the score of fresh samples of the prior itself; for a distance to the target, of samples of the target.
It is a mean over draws: three per evaluation, and over several seeds those of all.

**A floor that scatters** as widely as the rows differ hides what the metric is to show. Where the range of 95 % of a
floor's draws (their mean ± 1.96 standard deviations, over all draws of all seeds) is as wide as the largest difference
between the rows compared, nothing in the column is marked, and a note gives both numbers. Then more samples, or another
metric, are needed. It is so of `fid_prior` at 144 images for methods that stay near the prior.

**At an equal gain or cost** (`--at-reward-gain`, `--at-updates`, `--at-nfe`, `--at-reward-calls`,
`--at-reward-gradients`, `--at-seconds`) every
run is read off where it first reaches the value, by linear interpolation between its evaluations (`evaluation.at`); it
starts as the prior at no cost. Intervals at a gain are over the runs that got there, and the table says how many did
not. A row of which a run ends before {enough} % of a cost has no values there, and a sentence above the table says so;
a run that ends later, but before the cost, counts with its last evaluation. ‡ marks values between the prior and a
run's first evaluation, where a straight line is a guess. If neither evaluation around the value is within a factor of
{near} of it, nothing is interpolated: of a gain the table has bounds of the cost, "< N" where the first evaluation has
passed it already. If one run of a row is refused, so is the row: the runs left would be the slower ones.

**The cost of `best_of_n`** is per finished sample, the NFE and reward calls of its n draws: it trains nothing, and what
it spends grows with the number of samples wanted. All other rows have spent theirs before the first sample, which then
takes a single draw and no reward call. So these costs are not compared, and at an equal cost `best_of_n` stays in the
table. A method that has spent the NFE of C samples on training has the lower NFE in all from C / (n − 1) samples on.

**Sentences below a table** repeat its numbers and marks: "not separated" are the values with ≈, "significantly lower"
those without a mark, "not tested" those of which no error is known. A row of fewer seeds may be significantly better
than the best of those with the most; it is named as that.

**Over settings**, each gain is divided by the best method's mean gain in that setting. The probability that a run of
one method gains more than a run of another counts pairs of runs, with equal weight for each setting and ties as half.
Its interval is Newcombe's (2006, method 5), because a bootstrap has no width where one method always wins. Performance
profiles show the share of runs that reach a level, with equal weight for each setting.

The table at the end of a single run prints ± one standard error, and colours a difference whose 95 % interval excludes
zero.

## How often an interval contains the truth

Share of {draws:,} simulated tables in which the 95 % interval contains the truth, and in brackets that of an interval
which ignores the metric's range. *Skewed* is an exponential distribution; *counts* are shares of 144 samples around
0.99, most of them with a 1 among the seeds; *ring* resamples the ten published seeds of every method, so their
distribution is the truth. `python -m bench.reporting.coverage` makes all tables of this page.

{coverage}

So the intervals are accurate for values that are symmetric on the scale of their metric, and too short for skewed
real values. A bootstrap over ten seeds gives intervals that are slightly too short in all eight cases here.

## How often it names a winner where there is none

Share of {draws:,} tables in which two methods with the same distribution differ significantly (5 % is right).

{ties}

## Among several methods

`bench advise`, the page's first answer and envelopes compare every method with the first, and correct p by Holm's
method. The first is chosen by the same values. So where all methods are equal, one of them is separated from the first
in more than 5 % of tables; but a given one of the best methods is separated in less. Share of {draws:,} tables of equal
methods, normal values, in which any of them is separated from the first, and in brackets a given one:

{several}

So read it as "the best method is the first, or is not separated from it", and not as an order of those behind.

## The probability of improvement

Share of tables in which the interval contains the true probability, for one setting and for four. Values are normal;
the first method's mean is higher by so many standard deviations.

{better}

## How often a null effect is coloured

Differences of mean zero over a few prompts, {draws:,} tables. In brackets: a difference would be coloured beyond two
standard errors.

{colours}
"""


def held(law: Law, count: int, rng: np.random.Generator, draws: int, plain: bool = False) -> float:
    """Share of tables over `count` seeds whose interval contains the truth: the law's (interquartile) mean.

    plain: of intervals as if the metric were real.
    """
    support, robust = "real" if plain else law.support, count >= MANY
    truth = law.truth(support, robust)
    ends = intervals(list(law.draw(rng, (draws, count))), support, robust)
    return float(np.mean((ends[:, 1] <= truth) & (truth <= ends[:, 2])))


def differ(law: Law, count: int, rng: np.random.Generator, draws: int) -> float:
    """Share of tables in which two methods with the same distribution differ significantly."""
    one, other = law.draw(rng, (2, draws, count))
    ends, _ = gaps(list(zip(one, other, strict=True)), law.support, count >= MANY)
    return float(np.mean((ends[:, 1] > 0) | (ends[:, 2] < 0)))


def separated(count: int, methods: int, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    """Shares of tables of equal methods in which any is separated from the first, and in which a given one is."""
    values = rng.standard_normal((draws, methods, count))
    first = values.mean(2).argmax(1)
    others = np.stack([np.delete(one, place, 0) for one, place in zip(values, first, strict=True)])
    p = scipy.stats.ttest_rel(others, values[np.arange(draws), first][:, None], axis=2).pvalue
    corrected = np.array([holm(one) for one in p])
    apart = corrected < 1 - CONFIDENCE
    given = apart[:, 0] & (first != 0)  # the first of the others is method 0, unless that is the first itself
    return float(apart.any(1).mean()), float(given.mean())


def improvement_held(shift: float, count: int, settings: int, rng: np.random.Generator, draws: int = 300) -> float:
    """Share of intervals of the probability of improvement that contain it.

    Values are normal, and the means of the two methods differ by `shift` standard deviations.
    """
    truth = scipy.stats.norm.cdf(shift / 2**0.5)
    values = rng.standard_normal((draws, settings, 2, count))
    values[:, :, 0] += shift
    ends = [improvement([(x, y) for x, y in tasks])[1:] for tasks in values]
    return float(np.mean([low <= truth <= high for low, high in ends]))


def coloured(draw: Draw, count: int, rng: np.random.Generator) -> str:
    """Share of null effects over `count` prompts that are coloured, and in brackets by two standard errors."""
    values = draw(rng, (DRAWS, count))
    rows = pd.DataFrame({"difference": values.mean(1), "standard_error": values.std(1, ddof=1) / count**0.5})
    clear = [is_clear(row) for row in rows.assign(degrees=count - 1).to_dict("records")]
    two = (rows["difference"].abs() > 2 * rows["standard_error"]).mean()
    return f"{np.mean(clear):.1%} ({two:.1%})"


def page() -> str:
    """The whole page, from the published rows; equal on every machine."""
    rng = np.random.default_rng(0)
    laws = {name: [_law(draw, support, rng)] for name, (draw, support) in KINDS.items()}
    ring = read_rows(ROOT / "results" / "published" / "ring" / "rows.parquet")
    last = ring[ring["budget"] == ring.groupby("run")["budget"].transform("max")]
    for metric in ("reward/train", "tilt_tv", "path_kl"):
        values_of = last[(last["metric"] == metric) & (last["updates"] > 0)].groupby("method")["value"]
        support = last.loc[last["metric"] == metric, "support"].iloc[0]
        laws[f"ring, `{metric}`, {support}"] = [_resampled(values.to_numpy(), support) for _, values in values_of]
    seeds = [f"{n} seeds" for n in COUNTS]
    kinds = [f"{n} seeds, {'interquartile mean' if n >= MANY else 'mean'}" for n in COUNTS]
    coverage, ties = [["values", *kinds]], [["values", *seeds]]
    for name, methods in laws.items():
        draws = DRAWS // min(len(methods), 10)
        coverage.append([name])
        for n in COUNTS:
            own, plain = (np.mean([held(law, n, rng, draws, real) for law in methods]) for real in (False, True))
            scaled = n < MANY and methods[0].support != "real"
            coverage[-1].append(f"{own:.0%} ({plain:.0%})" if scaled else f"{own:.0%}")
        ties.append([name, *(f"{np.mean([differ(law, n, rng, draws) for law in methods]):.0%}" for n in COUNTS)])
    better = [["higher by", *(f"{name}, {k} setting{'s' * (k > 1)}" for k in (1, 4) for name in seeds)]]
    for shift in (0.0, 1.0, 3.0):
        better.append([f"{shift:g}", *(f"{improvement_held(shift, n, k, rng):.0%}" for k in (1, 4) for n in COUNTS)])
    prompts = (4, 6, 12, 24)
    colours = [["values", *(f"{n} prompts" for n in prompts)]]
    colours += [[name, *(coloured(KINDS[name][0], n, rng) for n in prompts)] for name in ("normal", "skewed")]
    several = [["methods", *seeds]]
    for k in (2, 3, 7, 14, 30):
        shares = [separated(n, k, rng, DRAWS) for n in COUNTS]
        several.append([str(k), *(f"{one:.0%} ({given:.1%})" for one, given in shares)])
    tables = {"coverage": coverage, "ties": ties, "better": better, "colours": colours, "several": several}
    numbers = {"draws": DRAWS, "many": MANY, "few": FEW, "near": NEAR, "enough": f"{100 * ENOUGH:.0f}"}
    return PAGE.format(**numbers, **{name: _table(lines) for name, lines in tables.items()})


def _law(draw: Draw, support: str, rng: np.random.Generator) -> Law:
    return Law(draw, support, draw(rng, (400_000,)))


def _resampled(values: np.ndarray, support: str) -> Law:
    return Law(lambda rng, shape: rng.choice(values, shape), support, values)


def _table(lines: list[list[str]]) -> str:
    text = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in text)


if __name__ == "__main__":
    print(page(), end="")
