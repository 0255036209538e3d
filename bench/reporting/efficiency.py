"""How near a run comes to the least KL at its gain: `efficiency`, one where it is least."""

import numpy as np
import pandas as pd

from bench.reporting.budgets import KL, draws
from bench.reporting.frontier import Frontier
from bench.reporting.statistics import student

EFFICIENCY = "efficiency"
BEYOND, NO_GAIN = "beyond the curve", "no clear gain"
SPLIT = r"reward/[^/]+"  # the training reward on one split of the prompts


def with_efficiency(rows: pd.DataFrame, frontier: Frontier | None) -> tuple[pd.DataFrame, dict[tuple[str, str], str]]:
    """The rows and, as a metric, `path_kl` over the least KL at the same gain; (row, metric) → a text for it.

    rows: that `bench.reporting.budgets.at` chose. Gain and KL are means over all prompts of the evaluation. A row whose
    mean gain may be none, or of which a run gains more than the curve knows, has no value. The column `shared_error` is
    the curve's relative standard error, which all seeds share. Methods that select among draws have a bound of the KL.
    """
    texts = _bounds(rows, frontier)
    if frontier is None:
        return rows, texts
    runs = rows[(rows["metric"] == KL) & rows["value"].notna() & (rows["status"] == "ok")]
    runs = runs.merge(mean_gains(rows, ["row", "seed"]), on=["row", "seed"])
    runs = runs[(runs["value"] > 0) & runs["gain"].notna()].reset_index(drop=True)
    least = frontier.least(runs["gain"].to_numpy())
    ratio = runs["value"] / least["kl"]
    error = ratio * np.hypot(runs["standard_error"] / runs["value"], least["beta"] * runs["gain_error"] / least["kl"])
    blank = {"prior": np.nan, "difference": np.nan, "unit": "", "note": "", "metric_version": 1}
    blank |= {"direction": "lower", "support": "positive", "prior_is_best": False}
    own = runs.assign(metric=EFFICIENCY, value=ratio, standard_error=error, shared_error=least["error"], **blank)
    for name, row in own.groupby("row"):
        if not _is_clear(row["gain"], row["gain_error"], row["degrees"]):
            texts[str(name), EFFICIENCY] = NO_GAIN
        elif row["value"].isna().any():
            texts[str(name), EFFICIENCY] = BEYOND
    own = own[~own["row"].isin([name for name, metric in texts if metric == EFFICIENCY])]
    return pd.concat([rows, own[[*rows.columns, "shared_error"]]], ignore_index=True), texts


def mean_gains(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """`gain` on all prompts and `gain_error`, for each value of the columns `by`: splits count by their samples."""
    splits = rows[rows["metric"].str.fullmatch(SPLIT) & rows["difference"].notna()]
    error = splits["standard_error"] * splits["n"]
    splits = splits.assign(gain=splits["difference"] * splits["n"], square=error**2)
    sums = splits.groupby(by, sort=False)[["gain", "square", "n"]].sum(min_count=1)
    gains = pd.DataFrame({"gain": sums["gain"] / sums["n"], "gain_error": sums["square"] ** 0.5 / sums["n"]})
    return gains.reset_index()


def _is_clear(gains: pd.Series, errors: pd.Series, degrees: pd.Series) -> bool:
    """Whether the interval of a row's mean gain, over seeds or of its one evaluation, lies above zero."""
    if len(gains) > 1:
        return bool(gains.mean() > student(len(gains) - 1) * gains.std() / len(gains) ** 0.5 and gains.min() > 0)
    reach = student(degrees.iloc[0]) * errors.iloc[0]
    return bool(gains.iloc[0] > (0 if np.isnan(reach) else reach))


def _bounds(rows: pd.DataFrame, frontier: Frontier | None) -> dict[tuple[str, str], str]:
    texts, gains = {}, mean_gains(rows, ["row", "seed"]).groupby("row")["gain"].mean()
    for name, cost in draws(rows).items():
        kl = cost.kl
        if frontier is not None and not np.isnan(cost.beta):
            kl = np.fmin(kl, frontier.soft_kl(cost.n, cost.beta)) if not np.isnan(kl) else kl
        if np.isnan(kl):
            continue
        texts[name, KL] = f"≤ {kl:.3g}"
        if frontier is not None and name in gains.index:
            least = frontier.least(gains[[name]].to_numpy())["kl"].iloc[0]
            texts[name, EFFICIENCY] = BEYOND if np.isnan(least) else f"≤ {kl / least:.3g}"
    return texts


def widened(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The table of `bench.reporting.summary.summary` with the curve's own error in its intervals, on a log scale."""
    if "shared_error" not in rows:
        return table
    table = table.copy()
    for name, error in rows[rows["metric"] == EFFICIENCY].groupby("row")["shared_error"].mean().items():
        centre, *ends = table.loc[(name, EFFICIENCY), ["value", "value_low", "value_high"]]
        for column, end in zip(("value_low", "value_high"), ends, strict=True):
            reach = np.hypot(np.log(end / centre), student(np.inf) * error)
            table.loc[(name, EFFICIENCY), column] = centre * np.exp(reach if column == "value_high" else -reach)
    return table


def note(frontier: Frontier) -> str:
    """What the column says, for below a table."""
    return (
        f"{EFFICIENCY}: {KL} over the least KL at the same gain, both over all prompts, from {frontier.samples:,} "
        f"prior samples a prompt; 1 is the least. {BEYOND.capitalize()}: these samples do not tell it there."
    )
