"""Whether a run that was done again differs from the published one as training amplifies rounding.

Two processors round differently, and training at a high rate is chaotic: differences grow from update to update until
the two runs are as unlike as two seeds. So they agree at first, later differ in nearly everything, and by no more than
seeds do. Another setting shows at the first evaluation; a changed number stands alone. docs/submit.md has what was
measured.
"""

import numpy as np
import pandas as pd
import scipy.stats

AMPLIFIED = "amplified"
START = 1  # standard errors at the first evaluation: rounding gave 0.1 at most, a learning rate 0.1 % off at least 2
BY_CHANCE = 0.01  # how often two seeds are farther apart than is allowed
SEEDS = 3  # that a spread takes


def amplified(compared: pd.DataFrame, seeds: pd.DataFrame) -> pd.DataFrame:
    """The comparison (see `bench.reporting.agreement`), with "amplified" for "differs" where that may be the reason.

    seeds: the published rows of this run and of those that differ from it in the seed alone. A value may have been
    amplified if the first evaluation agrees, within `START` standard errors or to rounding; if at its own evaluation
    most values of the finetuned model differ by more than rounding; and if it is as near to the published one as two
    seeds are, by Student's t with the deviation over seeds: of logarithms where all seeds are positive.
    """
    if not began_alike(compared):
        return compared
    trained = ~compared["metric"].str.endswith("/floor")
    values = compared[trained & (compared["column"] == "value")]
    apart = ~values["verdict"].isin(["equal", "rounding"])
    diverged = apart.groupby(values["budget"]).mean().reindex(compared["budget"]).to_numpy() > 0.5
    near = np.zeros(len(compared), dtype=bool)
    for column, lines in compared[compared["difference"].notna()].groupby("column"):
        near[compared.index.get_indexer(lines.index)] = _near(lines, seeds, column)
    found = (compared["verdict"] == "differs") & trained & diverged & near
    return compared.assign(verdict=compared["verdict"].mask(found, AMPLIFIED))


def began_alike(compared: pd.DataFrame) -> bool:
    """Whether everything that the first evaluation of a run measured agrees, as it does whatever rounds."""
    first = compared[compared["budget"] == compared["budget"].min()]
    return bool((first["verdict"].isin(["equal", "rounding"]) | (first["errors"] <= START)).all())


def _near(lines: pd.DataFrame, seeds: pd.DataFrame, column: str) -> np.ndarray:
    """Of each line, whether two seeds may be as far apart: bool [n]."""
    values = seeds.pivot_table(column, ["budget", "metric"], "seed")
    values = values.reindex(pd.MultiIndex.from_frame(lines[["budget", "metric"]]))
    numbers = np.column_stack([lines["published"], lines["again"], values]).astype(float)
    positive = ((numbers > 0) | np.isnan(numbers)).all(1, keepdims=True)
    numbers = np.where(positive, np.log(np.where(numbers > 0, numbers, np.nan)), numbers)
    apart, values = np.abs(numbers[:, 1] - numbers[:, 0]), pd.DataFrame(numbers[:, 2:])
    count = values.count(axis=1)
    limit = scipy.stats.t.ppf(1 - BY_CHANCE / 2, count - 1) * 2**0.5 * values.std(axis=1)
    return ((count >= SEEDS) & (apart <= limit)).to_numpy()
