"""How far a run that was evaluated or done again agrees with its published rows."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bench.reporting.amplified import AMPLIFIED
from bench.reporting.identity import identified
from bench.reporting.rows import COLUMNS

ROUNDING = 1e-4  # relative; what another batch size or processor leaves of float32
ERROR_ROUNDING = 1e-2  # of a standard error and its degrees of freedom: intervals are printed with two digits
NOISE = 3  # standard errors
VERDICTS = ("equal", "rounding", "noise", AMPLIFIED, "differs", "missing", "other version")  # the worst last
AGREE = VERDICTS[:4]
PLACE = ["budget", "metric"]
SAME, NEAR, COUNTED, NAMED, TOLD = (
    [name for name, column in COLUMNS.items() if column.check == check]
    for check in ("same", "near", "counted", "named", "reported")
)


def agreement(
    published: pd.DataFrame, again: pd.DataFrame, further: Sequence[str] = (), same_noise: bool = False
) -> pd.DataFrame:
    """A line for every measurement and column of a run beside what it is again.

    further: columns that must be equal besides those that always must (see `bench.reporting.rows.Column`). same_noise:
    both come from the same weights and noise, so that a standard error has no sampling error of its own.
    Columns: `budget`, `metric`, `column`, `published`, `again`, `difference`, `errors` (the difference in standard
    errors) and `verdict`: equal; rounding, within `ROUNDING` of the number; noise, within `NOISE` standard errors;
    differs; missing, in one only; other version of the metric. All tolerances come from `again`.
    """
    both = identified(published).merge(identified(again), "outer", PLACE, suffixes=("", "_again"), indicator=True)
    missing, versions = both.pop("_merge") != "both", both["metric_version"] != both["metric_version_again"]
    lines = []
    for name in [name for name in (*SAME, *further, *NEAR) if name not in PLACE]:
        one, two = both[name], both[f"{name}_again"]
        same = (one == two) | (one.isna() & two.isna())
        line = {"column": name, "published": one.astype(object), "again": two.astype(object)}
        verdict = np.where(same, "equal", "differs")
        if name in NEAR:
            difference, absent = two.astype(float) - one.astype(float), one.isna() != two.isna()
            size, error = _tolerances(name, both, same_noise)
            errors = difference.abs() / error.where(error > 0)
            line |= {"difference": difference, "errors": errors}
            conditions = [same, difference.abs() <= size, errors <= NOISE, absent & (name == "value")]
            verdict = np.select(conditions, ["equal", "rounding", "noise", "missing"], "differs")
        line["verdict"] = np.select([missing, versions], ["missing", "other version"], verdict)
        lines.append(pd.DataFrame({place: both[place] for place in PLACE} | line))
    return pd.concat(lines, ignore_index=True)


def _tolerances(name: str, both: pd.DataFrame, same_noise: bool) -> tuple[pd.Series, pd.Series]:
    """How much rounding may change a number, and its standard error, NaN where it has none."""
    again, error, degrees = (both[f"{column}_again"].astype(float) for column in (name, "standard_error", "degrees"))
    if name in ("standard_error", "degrees"):  # of normal samples: its relative error is 1 / √(2 degrees)
        noise = again / (2 * degrees) ** 0.5
        return ERROR_ROUNDING * again.abs(), noise * np.nan if same_noise else noise
    scatter = both.set_index(PLACE)["standard_error_again"].astype(float)
    floors = pd.MultiIndex.from_arrays([both["budget"], both["metric"] + "/floor"])
    # a distance without an error of its own has that of its floor's draws: near zero no rounding is small beside it
    error = error.fillna(pd.Series(scatter[~scatter.index.duplicated()].reindex(floors).to_numpy(), both.index))
    size = again.abs()
    if name == "difference":  # without an error of its own it has the rounding of what it is the difference of
        size = size.where(error.notna(), both["value_again"].abs() + both["prior_again"].abs())
    return ROUNDING * size, error


def measurements(compared: pd.DataFrame) -> pd.DataFrame:
    """A line for every measurement: that of its value, with the worst verdict of all its columns."""
    rank = {verdict: number for number, verdict in enumerate(VERDICTS)}
    worst = compared["verdict"].map(rank).groupby([compared[name] for name in PLACE], sort=False).transform("max")
    values = compared["column"] == "value"
    return compared[values].assign(verdict=worst[values].map(dict(enumerate(VERDICTS))))


def sentence(compared: pd.DataFrame) -> str:
    """The verdicts of the measurements counted, and the largest difference of a value."""
    values = measurements(compared)
    counts = values["verdict"].value_counts()
    text = ", ".join(f"{counts[name]} {name}" for name in VERDICTS if name in counts)
    total = counts.sum()
    values = values[values["verdict"] != "other version"]
    numbers = values[["published", "again"]].astype(float).abs()
    relative = (values["difference"].abs() / numbers.max(axis=1).where(lambda size: size > 0)).max()
    largest = f"; largest relative difference {relative:.1g}" if relative > 0 else ""
    errors = f", {values['errors'].max():.1g} standard errors" if values["errors"].max() > 0 else ""
    return f"{total} values: {text}{largest}{errors}."
