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

**Intervals.** Square brackets hold 95 % intervals. Over seeds they stand around the mean, by Student's t; in a column
where every row has at least {many} values, around the interquartile mean (the mean of the middle half), by a
percentile bootstrap over seeds. Every seed has training noise and, unless `evaluation.seed` is set, evaluation noise
of its own, so the interval holds both; where all seeds share one draw of it, the note below the table says that the
interval is of training alone. n is the number of runs; figures show every run as a dot.

**One seed.** The interval is that of the one evaluation: over prompts, over the noise where prompts are given
(`reward/train`), or over the samples of a single prompt, by Student's t for as many. It knows nothing of other seeds.
A metric without an error of its own (`fid_prior`, `kid_prior`) has none.

**Differences to the prior** stand in round brackets. Within a seed all methods and the prior share the evaluation's
noise, so differences are taken within seeds and then summarised. **The best** of a column, of the rows with the most
seeds, is in bold or has a star; ≈ marks what is not told apart from it: the interval of the difference to the best,
within seeds, holds zero. A row of as many seeds without a mark is worse than the best at 95 %, one comparison at a
time: among twenty rows, one is expected to lose its mark by chance. Where no error is known nothing is marked. **A
floor** is a mean over draws: three of every evaluation, over seeds those of all.

**At an equal gain or cost** (`--at-reward-gain`, `--at-updates`, `--at-reward-calls`, `--at-network-rows`,
`--at-seconds`) every run is read off where it reaches the value for the first time, linearly between its evaluations
(`evaluation.at`); it begins as the prior at no cost. Intervals are over the runs that got there, and how many did not
is said. Interpolation over a wide gap between evaluations is a guess: a run that jumps past the gain in its first
evaluation is drawn as if it had gone there in a straight line.

**Over settings**, a gain is divided by the best method's mean gain in the setting. The probability that a run of one
method gains more than one of another counts pairs of runs, settings equally, ties half; its interval is Newcombe's
(2006, method 5), as a bootstrap has no width where one always wins. Performance profiles show the share of runs that
reach a level, settings equally.

The table at the end of a single run prints ± one standard error, and colours a difference whose 95 % interval leaves
out zero.

## How often an interval holds

Share of {draws:,} simulated tables in which the 95 % interval holds the truth. *Skewed* is an exponential law; *ring*
draws seeds from the ten that were published, of every method, so its truth is theirs.

{coverage}

So intervals are honest where values scatter evenly, and too short by up to a tenth of cases where the law is skewed,
as that of `path_kl` is for methods that diverge. A bootstrap over ten seeds is a little too short for any law.

## How often it names a winner where there is none

Two methods of one law, in {draws:,} tables: the share in which the second is told apart from the first (5 % is
right).

{ties}

## The probability of improvement

Share of tables in which the interval holds the true probability (normal values; the first method is ahead by so many
standard deviations), for one setting and for four.

{better}

## How often a null effect is coloured

Differences of mean zero over a few prompts, {draws:,} tables; in brackets, what two standard errors would have
coloured.

{colours}
"""


def held(law: Law, count: int, rng: np.random.Generator, draws: int) -> float:
    """Share of tables over `count` seeds whose interval holds the truth: the law's mean or interquartile mean."""
    draw, truth = law
    ends = over_seeds(list(draw(rng, (draws, count))), count >= MANY)
    return float(np.mean((ends[:, 1] <= truth[count >= MANY]) & (truth[count >= MANY] <= ends[:, 2])))


def told_apart(law: Law, count: int, rng: np.random.Generator, draws: int) -> float:
    """Share of tables in which two methods of one law are not a tie."""
    one, other = law[0](rng, (2, draws, count))
    ends = over_seeds(list(one - other), count >= MANY)
    return float(np.mean((ends[:, 1] > 0) | (ends[:, 2] < 0)))


def improvement_held(ahead: float, count: int, settings: int, rng: np.random.Generator, draws: int = 300) -> float:
    """Share of intervals of the probability of improvement that hold it, for normal values `ahead` by deviations."""
    truth = scipy.stats.norm.cdf(ahead / 2**0.5)
    values = rng.standard_normal((draws, settings, 2, count))
    values[:, :, 0] += ahead
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
    """The whole page; equal on every machine."""
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
        for table, share in ((coverage, held), (ties, told_apart)):
            table.append([name, *(f"{np.mean([share(law, n, rng, draws) for law in methods]):.0%}" for n in COUNTS)])
    better = [["ahead by", *(f"{name}, {k} setting{'s' * (k > 1)}" for k in (1, 4) for name in seeds)]]
    for ahead in (0.0, 1.0, 3.0):
        better.append([f"{ahead:g}", *(f"{improvement_held(ahead, n, k, rng):.0%}" for k in (1, 4) for n in COUNTS)])
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
