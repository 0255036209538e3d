"""How far rows agree with those made again."""

import pandas as pd
import pytest
from example_rows import row

from bench.reporting.agreement import agreement, measurements, sentence
from bench.reporting.rows import SCHEMA


def frame(*changes: dict[str, object]) -> pd.DataFrame:
    """Rows m0, m1, … of one evaluation."""
    return pd.DataFrame([row(schema=SCHEMA, metric=f"m{i}", **one) for i, one in enumerate(changes)])


def values(*numbers: float | None) -> list[dict[str, object]]:
    return [{"value": one, "prior": 1.0, "difference": 0.5, "standard_error": 0.1} for one in numbers]


def test_the_verdicts_of_agreement() -> None:
    published = frame(*values(1.0, 1.0, 1.0, 1.0, None, None, 1.0, 1.0))
    again = frame(*values(1.0, 1.00001, 1.25, 1.4, None, 2.0, 1.0)).assign(metric_version=[1] * 6 + [2])
    compared = agreement(published, again)
    found = measurements(compared).set_index("metric")
    expected = ["equal", "rounding", "noise", "differs", "equal", "missing", "other version", "missing"]
    assert list(found["verdict"]) == expected
    assert found["errors"]["m3"] == pytest.approx(4)
    assert sentence(compared).startswith(
        "8 values: 2 equal, 1 rounding, 1 noise, 1 differs, 2 missing, 1 other version;"
    )
    assert list(measurements(agreement(again, published))["verdict"]) == expected  # a row too many is missing too


def verdicts(published: dict[str, object], again: dict[str, object], same_noise: bool = False) -> dict[str, str]:
    compared = agreement(frame(published), frame(again), same_noise=same_noise)
    return dict(zip(compared["column"], compared["verdict"], strict=True))


def test_tolerances_are_those_of_the_second_evaluation() -> None:
    """A row cannot widen what it is held to by the errors that it states itself."""
    (again,) = values(1.0)
    assert verdicts(again | {"value": 2.0, "standard_error": 9.0}, again)["value"] == "differs"
    assert verdicts(again | {"difference": 0.9}, again)["difference"] == "differs"
    assert verdicts(again | {"difference": 0.6}, again)["difference"] == "noise"
    # a tiny difference of large numbers is held to its own error, or without one to the numbers' rounding
    large = {"value": 100.0, "prior": 100.0, "difference": 1e-4, "standard_error": 1e-4}
    assert verdicts(large | {"difference": 5e-3}, large)["difference"] == "differs"
    assert verdicts(large | {"difference": 5e-3}, large | {"standard_error": None})["difference"] == "rounding"


def test_an_error_has_noise_of_its_own_where_the_samples_are_others() -> None:
    again = {"standard_error": 0.1, "degrees": 8.0}  # whose relative error is 1 / √16
    for error, new, same in ((0.1005, "rounding", "rounding"), (0.15, "noise", "differs"), (0.2, "differs", "differs")):
        assert verdicts(again | {"standard_error": error}, again)["standard_error"] == new
        assert verdicts(again | {"standard_error": error}, again, same_noise=True)["standard_error"] == same
