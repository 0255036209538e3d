"""Rounding that training amplifies, told from other reasons on published rows of a chaotic method."""

from collections.abc import Callable

import pandas as pd
import pytest

from bench.environment import ROOT
from bench.reporting.agreement import agreement
from bench.reporting.amplified import AMPLIFIED, amplified
from bench.reporting.rows import read_rows

PUBLISHED = ROOT / "results" / "published"


@pytest.fixture(scope="module")
def chaotic() -> pd.DataFrame:
    """Published rows of a method whose training is chaotic, ten seeds."""
    rows = read_rows(PUBLISHED / "ring_little_noise")
    return rows[rows["method"] == "adjoint_matching"]


def test_a_distance_near_zero_is_held_against_the_deviation_of_its_floor() -> None:
    rows = read_rows(PUBLISHED / "emoji")
    rows = rows[(rows["method"] == "nabla_gfn") & (rows["seed"] == 0) & (rows["budget"] == 25)]
    kid = rows["metric"].str.startswith("kid_prior") & rows["standard_error"].isna()
    floor = rows.loc[rows["metric"].str.fullmatch("kid_prior.*/floor"), "standard_error"].item()
    for deviations, verdict in ((2, "noise"), (4, "differs")):
        again = rows.assign(value=rows["value"] + deviations * floor * kid)
        compared = agreement(rows, again)
        found = compared[compared["metric"].isin(rows.loc[kid, "metric"]) & (compared["column"] == "value")]
        assert list(found["verdict"]) == [verdict]


def verdicts(rows: pd.DataFrame, change: Callable[[pd.DataFrame], pd.Series], places: pd.Series) -> set[str]:
    """The verdicts on seed 0 if it is done again and has other values in these places."""
    one = rows[rows["seed"] == 0]
    again = one.assign(value=one["value"].mask(places, change(one)))
    return set(amplified(agreement(one, again), rows)["verdict"])


def test_rounding_that_training_amplified_is_told_from_what_it_cannot_be(chaotic: pd.DataFrame) -> None:
    places = ["budget", "metric"]
    one = chaotic[chaotic["seed"] == 0]
    seed = chaotic[chaotic["seed"] == 4].set_index(places)["value"]
    first, last = one["budget"] == one["budget"].min(), one["budget"] == one["budget"].max()
    trained = ~one["metric"].str.endswith("/floor")

    def another(rows: pd.DataFrame) -> pd.Series:  # as unlike as another seed
        return pd.Series(seed.reindex(pd.MultiIndex.from_frame(rows[places])).to_numpy(), rows.index)

    def shifted(rows: pd.DataFrame) -> pd.Series:  # the same, and at first a little too much for rounding
        return another(rows).mask(first, rows["value"] + 1.5 * rows["standard_error"])

    def floor_too(rows: pd.DataFrame) -> pd.Series:  # what training does not touch
        return another(rows).where(trained, rows["value"] + 4 * rows["standard_error"])

    found = verdicts(chaotic, another, trained & ~first)
    assert AMPLIFIED in found
    assert found <= {"equal", "rounding", "noise", AMPLIFIED}
    excused = [
        verdicts(chaotic, another, trained),
        verdicts(chaotic, shifted, trained),
        verdicts(chaotic, lambda rows: 30 * another(rows), trained & ~first),  # farther than seeds are
        verdicts(chaotic, lambda rows: 0.9 * rows["value"], last & (one["metric"] == "path_kl")),  # one number alone
        verdicts(chaotic, floor_too, ~first),
        verdicts(chaotic[chaotic["seed"].isin([0, 4])], another, trained & ~first),  # a spread of two seeds
    ]
    assert ["differs" in found for found in excused] == [True] * 6
    assert [AMPLIFIED in found for found in excused] == [False, False, True, False, True, False]
