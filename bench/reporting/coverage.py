"""`python -m bench.reporting.coverage > docs/statistics.md`: how often the printed intervals hold, by simulation."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import scipy.stats

from bench.environment import ROOT
from bench.reporting.rows import read_rows
from bench.reporting.statistics import MANY, improvement, over_seeds
from bench.reporting.table import is_clear

COUNTS = (3, 5, 10)
DRAWS = 2000
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
Law = tuple[Draw, tuple[float, float]]  # with its mean and interquartile mean

PAGE = """# What tables say, and how sure it is

**Intervals.** Square brackets are 95 % intervals over seeds. They are intervals of the mean, by Student's t. In a
column where every row has at least {many} values they are intervals of the interquartile mean (the mean of the middle
half), by a percentile bootstrap over seeds. Every seed has its own training noise and, unless `evaluation.seed` is set,
its own evaluation noise, so the interval covers both. If all seeds share one draw of the evaluation noise, the note
below the table says that the interval covers training alone. n is the number of runs; figures show every run as a dot.

**One seed.** The interval is that of its single evaluation, by Student's t: over prompts, over the noise where prompts
are fixed (`reward/train`), or over the samples of a single prompt. It says nothing about other seeds. A metric without
a standard error of its own (`fid_prior`, `kid_prior`) has no interval.

**Differences to the prior** are in round brackets. Within a seed all methods and the prior share the evaluation's
noise, so differences are taken within seeds and then summarised.

**The best** value of a column, among the rows with the most seeds, is bold or has a star. ≈ marks values that do not
differ significantly from it: the 95 % interval of the difference to the best, within seeds, contains zero. A row with
as many seeds and no mark is worse than the best at 95 %, one comparison at a time: among twenty rows, one is expected
to lose its mark by chance. If no error is known, nothing is marked.

**A floor** is a mean over draws: three per evaluation, and over seeds those of all.

**At an equal gain or cost** (`--at-reward-gain`, `--at-updates`, `--at-reward-calls`, `--at-network-rows`,
`--at-seconds`) every run is read off where it first reaches the value, by linear interpolation between its evaluations
(`evaluation.at`); it starts as the prior at no cost. Intervals are over the runs that got there, and the table says how
many did not. Interpolation over a wide gap between evaluations is a guess: a run that passes the gain before its first
evaluation is treated as if it had gone there in a straight line.

**Over settings**, each gain is divided by the best method's mean gain in that setting. The probability that a run of
one method gains more than a run of another counts pairs of runs, with equal weight for each setting and ties as half.
Its interval is Newcombe's (2006, method 5), because a bootstrap has no width where one method always wins. Performance
profiles show the share of runs that reach a level, with equal weight for each setting.

The table at the end of a single run prints ± one standard error, and colours a difference whose 95 % interval excludes
zero.

## How often an interval contains the truth

Share of {draws:,} simulated tables in which the 95 % interval contains the truth. *Skewed* is an exponential
distribution; *ring* resamples the ten published seeds of every method, so their distribution is the truth.

{coverage}

So the intervals are accurate for symmetric values. For skewed distributions, such as that of `path_kl` for methods that
diverge, they are too short and contain the truth in up to a tenth fewer tables. A bootstrap over ten seeds gives
intervals that are slightly too short for any distribution.

## How often it names a winner where there is none

Share of {draws:,} tables in which two methods with the same distribution differ significantly (5 % is right).

{ties}

## The probability of improvement

Share of tables in which the interval contains the true probability, for one setting and for four. Values are normal;
the first method's mean is higher by so many standard deviations.

{better}

## How often a null effect is coloured

Differences of mean zero over a few prompts, {draws:,} tables. In brackets: a difference would be coloured beyond two
standard errors.

{colours}
"""


def held(law: Law, count: int, rng: np.random.Generator, draws: int) -> float:
    """Share of tables over `count` seeds whose interval contains the truth: the law's (interquartile) mean."""
    draw, truth = law
    ends = over_seeds(list(draw(rng, (draws, count))), count >= MANY)
    return float(np.mean((ends[:, 1] <= truth[count >= MANY]) & (truth[count >= MANY] <= ends[:, 2])))


def differ(law: Law, count: int, rng: np.random.Generator, draws: int) -> float:
    """Share of tables in which two methods with the same distribution differ significantly."""
    one, other = law[0](rng, (2, draws, count))
    ends = over_seeds(list(one - other), count >= MANY)
    return float(np.mean((ends[:, 1] > 0) | (ends[:, 2] < 0)))


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
    even, skewed = (_normal, (0.0, 0.0)), (_skewed, (0.0, _middle(_skewed(rng, (1, 400_000))[0])))
    laws: dict[str, list[Law]] = {"normal": [even], "skewed": [skewed]}
    ring = read_rows(ROOT / "results" / "published" / "ring" / "rows.parquet")
    last = ring[ring["budget"] == ring.groupby("run")["budget"].transform("max")]
    for metric in ("reward/train", "tilt_tv", "path_kl"):
        values_of = last[(last["metric"] == metric) & (last["updates"] > 0)].groupby("method")["value"]
        laws[f"ring, `{metric}`"] = [_resampled(values.to_numpy()) for _, values in values_of]
    seeds = [f"{n} seeds" for n in COUNTS]
    kinds = [f"{n} seeds, {'interquartile mean' if n >= MANY else 'mean'}" for n in COUNTS]
    coverage, ties = [["values", *kinds]], [["values", *seeds]]
    for name, methods in laws.items():
        draws = DRAWS // min(len(methods), 10)
        for table, share in ((coverage, held), (ties, differ)):
            table.append([name, *(f"{np.mean([share(law, n, rng, draws) for law in methods]):.0%}" for n in COUNTS)])
    better = [["higher by", *(f"{name}, {k} setting{'s' * (k > 1)}" for k in (1, 4) for name in seeds)]]
    for shift in (0.0, 1.0, 3.0):
        better.append([f"{shift:g}", *(f"{improvement_held(shift, n, k, rng):.0%}" for k in (1, 4) for n in COUNTS)])
    prompts = (4, 6, 12, 24)
    colours = [["values", *(f"{n} prompts" for n in prompts)]]
    colours += [[name, *(coloured(laws[name][0][0], n, rng) for n in prompts)] for name in ("normal", "skewed")]
    tables = {"coverage": coverage, "ties": ties, "better": better, "colours": colours}
    return PAGE.format(draws=DRAWS, many=MANY, **{name: _table(lines) for name, lines in tables.items()})


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def _skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_exponential(shape) - 1


def _resampled(values: np.ndarray) -> Law:
    return lambda rng, shape: rng.choice(values, shape), (float(values.mean()), _middle(values))


def _middle(values: np.ndarray) -> float:
    """The interquartile mean of a law that has these values, equally likely."""
    return float(np.quantile(values, np.linspace(0.25, 0.75, 2001), method="inverted_cdf").mean())


def _table(lines: list[list[str]]) -> str:
    text = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in text)


if __name__ == "__main__":
    print(page(), end="")
