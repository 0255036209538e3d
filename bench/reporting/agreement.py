"""How far a run that was done again agrees with its published rows."""

import numpy as np
import pandas as pd

from bench.reporting.amplified import AMPLIFIED

ROUNDING = 1e-4  # relative; what another batch size or processor leaves of float32
NOISE = 3  # standard errors
VERDICTS = ("equal", "rounding", "noise", AMPLIFIED, "differs", "missing", "other version")


def agreement(published: pd.DataFrame, again: pd.DataFrame) -> pd.DataFrame:
    """Every value of a published run beside that of the same metric and budget done again.

    Columns: `budget`, `metric`, `column` (of the rows), `published`, `again`, `difference`, `errors` (the difference in
    published standard errors), `verdict`: equal; rounding, within `ROUNDING` of the value; noise, within `NOISE`
    standard errors; differs; missing, measured by one only; other version of the metric. Values that both refused are
    equal. A distance without an error of its own has the deviation of its floor's draws: near zero no rounding is
    small beside the value.
    """
    columns = ["budget", "metric", "value", "metric_version", "standard_error"]
    both = published[columns].merge(again[columns[:4]], "left", ["budget", "metric"], suffixes=("", "_again"))
    one, two = both["value"], both["value_again"]
    difference = two - one
    floors = pd.MultiIndex.from_arrays([both["budget"], both["metric"] + "/floor"])
    scatter = both.set_index(["budget", "metric"])["standard_error"].reindex(floors).to_numpy()
    error = both["standard_error"].fillna(pd.Series(scatter, both.index))
    errors = difference.abs() / error.where(error > 0)
    size = np.maximum(one.abs(), two.abs())
    conditions = [
        both["metric_version_again"].notna() & (both["metric_version_again"] != both["metric_version"]),
        both["metric_version_again"].isna() | (one.isna() != two.isna()),
        (one == two) | (one.isna() & two.isna()),
        difference.abs() <= ROUNDING * size,
        errors <= NOISE,
    ]
    verdict = np.select(conditions, ["other version", "missing", "equal", "rounding", "noise"], "differs")
    table = {"published": one, "again": two, "difference": difference, "errors": errors, "verdict": verdict}
    return both[["budget", "metric"]].assign(column="value", **table)


def sentence(compared: pd.DataFrame) -> str:
    """The verdicts counted, and the largest difference."""
    counts = compared["verdict"].value_counts()
    text = ", ".join(f"{counts[name]} {name}" for name in VERDICTS if name in counts)
    compared = compared[compared["verdict"] != "other version"]
    total = counts.sum()
    size = np.maximum(compared["published"].abs(), compared["again"].abs())
    relative = (compared["difference"].abs() / size.where(size > 0)).max()
    largest = f"; largest relative difference {relative:.1g}" if relative > 0 else ""
    errors = f", {compared['errors'].max():.1g} standard errors" if compared["errors"].max() > 0 else ""
    return f"{total} values: {text}{largest}{errors}."
