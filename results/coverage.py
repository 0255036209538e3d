"""`python -m results.coverage > docs/statistics.md`: how often the printed intervals hold, by simulation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

from results.rows import read_rows
from results.selection import summary
from results.table import CONFIDENCE, is_clear

COUNTS = (3, 5, 10)
DRAWS = 2000
Law = tuple[Callable[[np.random.Generator, int], np.ndarray], float]  # (draws of n values [DRAWS, n], their mean)

PAGE = """# What the errors in tables mean

Several seeds: a cell is the mean over seeds ± its standard error over seeds. Every seed has training noise and,
unless `evaluation.seed` is set, evaluation noise of its own, so the error holds both. Within a seed all methods and
the prior share that noise, so a difference to the prior (in brackets) is paired. With `evaluation.seed` set, all
seeds share one draw of it, and the caption says that the error is of training alone.

One seed: ± is the error within the one evaluation, over prompts, over the noise where prompts are given
(`reward/train`), or over the samples of a single prompt. The table at the end of a run colours a difference whose 95
% interval, by Student's t for that number of prompts or samples, leaves out zero.

A floor is a mean over draws: three of every evaluation, in a table of several seeds those of all of them.

## How often an interval holds

Share of {draws:,} simulated tables in which the interval around the printed mean holds the true one. Of normal values
68 % is what many seeds would give for ± 1 standard error. *Skewed* is an exponential law; *ring* draws seeds from the
ten that were published, of every method, so its truth is their mean.

{coverage}

So ± 1 standard error over three seeds is an interval of little more than a half; for 95 % multiply it by {factors}
for {counts} seeds, and by more where the law is skewed, as that of `path_kl` is for methods that diverge.

## How often a null effect is coloured

Differences of mean zero over a few prompts, {draws:,} tables; in brackets, what two standard errors would have
coloured.

{colours}
"""


def intervals(law: Law, count: int, rng: np.random.Generator) -> tuple[float, float]:
    """Shares of simulated tables over `count` seeds whose ± 1 s.e. and 95 % intervals hold the mean."""
    draw, truth = law
    names = np.repeat(np.arange(DRAWS), count)
    rows = pd.DataFrame({"row": names, "seed": np.tile(np.arange(count), DRAWS), "value": draw(rng, count).ravel()})
    found = summary(rows.assign(metric="m", prior=0.0, difference=rows["value"], standard_error=np.nan))
    away = (found["value"] - truth).abs() / found["value_error"]
    return float((away <= 1).mean()), float((away <= _quantile(count)).mean())


def coloured(draw: Callable[[np.random.Generator, int], np.ndarray], count: int, rng: np.random.Generator) -> str:
    """Share of null effects over `count` prompts that are coloured, and in brackets by two standard errors."""
    values = draw(rng, count)
    rows = pd.DataFrame({"difference": values.mean(1), "standard_error": values.std(1, ddof=1) / count**0.5})
    clear = [is_clear(row) for row in rows.assign(degrees=count - 1).to_dict("records")]
    two = (rows["difference"].abs() > 2 * rows["standard_error"]).mean()
    return f"{np.mean(clear):.1%} ({two:.1%})"


def page() -> str:
    """The whole page; equal on every machine."""
    rng = np.random.default_rng(0)
    laws: dict[str, list[Law]] = {"normal": [(_normal, 0.0)], "skewed": [(_skewed, 0.0)]}
    ring = read_rows(Path(__file__).parent / "published" / "ring" / "rows.parquet")
    last = ring[ring["budget"] == ring.groupby("run")["budget"].transform("max")]
    for metric in ("tilt_tv", "path_kl"):
        own = last[(last["metric"] == metric) & (last["updates"] > 0)].groupby("method")["value"]
        laws[f"ring, `{metric}`"] = [_resampled(values.to_numpy()) for _, values in own]
    lines = [["values", *(f"{n} seeds, {kind}" for n in COUNTS for kind in ("± 1 s.e.", "95 %"))]]
    for name, own in laws.items():
        shares = np.mean([[intervals(law, n, rng) for n in COUNTS] for law in own], axis=0)
        lines.append([name, *(f"{share:.0%}" for share in shares.ravel())])
    prompts = (4, 6, 12, 24)
    colours = [["values", *(f"{n} prompts" for n in prompts)]]
    colours += [[name, *(coloured(law[0][0], n, rng) for n in prompts)] for name, law in list(laws.items())[:2]]
    factors = [f"{_quantile(n):.1f}" for n in COUNTS]
    return PAGE.format(
        draws=DRAWS, coverage=_table(lines), colours=_table(colours), factors=_listed(factors), counts=_listed(COUNTS)
    )


def _quantile(count: int) -> float:
    return float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))


def _normal(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_normal((DRAWS, count))


def _skewed(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_exponential((DRAWS, count)) - 1


def _resampled(values: np.ndarray) -> Law:
    return lambda rng, count: rng.choice(values, (DRAWS, count)), float(values.mean())


def _table(lines: list[list[str]]) -> str:
    text = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in text)


def _listed(values: object) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}"


if __name__ == "__main__":
    print(page(), end="")
