"""The table of one run: numbers that are legible, errors, colours."""

from io import StringIO

import numpy as np
import pytest
from example_rows import fid, floor, row
from rich.console import Console

from bench.reporting.formats import interval
from bench.reporting.table import is_clear, number, run_table, with_error


def test_numbers_are_legible() -> None:
    shown = [number(x) for x in (None, float("nan"), 0.0, -0.0, 1234567.0, 0.012345)]
    assert shown == ["–", "–", "0", "0", "1,234,567", "0.01235"]
    assert with_error(5.25, 0.125, sign=True) == "+5.25 ± 0.12"
    assert with_error(-1234.4, 56.0) == "-1,234 ± 56"
    assert with_error(0.000123, 0.00001) == "0.000123 ± 0.000010"
    assert with_error(2.0, None, sign=True) == "+2"
    assert with_error(0.3164, 0.0) == "0.3164 ± 0"
    assert with_error(0.0, 0.0) == "0 ± 0"


def test_run_table_shows_value_error_floor_and_refusal() -> None:
    refused = row(metric="tilt_gap", value=None, prior=None, direction="lower", unit="nats", note="refused: few")
    console = Console(width=80, record=True, file=StringIO())
    console.print(run_table([row(), fid(), floor(), refused]))
    lines = console.export_text().splitlines()
    names = ("reward/train ↑", "fid_prior/space ↓", "fid_prior/space/floor", "tilt_gap [nats] ↓")
    text = {name: next(line for line in lines if name in line) for name in names}
    assert "+5.25 ± 0.12" in text["reward/train ↑"]
    assert text["fid_prior/space ↓"].split()[2:5] == ["70", "90", "+20"]
    assert "65.0 ± 2.0" in text["fid_prior/space/floor"]
    assert "– " in text["tilt_gap [nats] ↓"]
    assert "tilt_gap: refused: few" in [line.strip() for line in lines]


def test_a_null_effect_is_coloured_in_one_of_twenty() -> None:
    """Differences of mean zero on four prompts: with Student's t for them 5 % are coloured, at two errors 14 %."""
    draws = np.random.default_rng(0).normal(size=(4000, 4))
    means, errors = draws.mean(1), draws.std(1, ddof=1) / 2
    pairs = list(zip(means, errors, strict=True))
    share = np.mean([is_clear(row(difference=mean, standard_error=error, degrees=3.0)) for mean, error in pairs])
    assert share == pytest.approx(0.05, abs=0.012)
    assert (abs(means) > 2 * errors).mean() > 0.12
    assert is_clear(row(difference=9.0, standard_error=1.0, degrees=3.0))
    assert not is_clear(row(difference=9.0, standard_error=1.0, degrees=None))  # nobody knows on how many it rests


def test_an_end_of_an_interval_is_not_rounded_to_zero() -> None:
    assert interval(17.0, 0.4, 700.0) == ("17", "[0.4, 700]")
    assert interval(0.6, 0.04, 0.98) == ("0.6", "[0.04, 1.0]")
    assert interval(5.0, 4.8, 5.2) == ("5.00", "[4.80, 5.20]")
    assert interval(5e18, 1e9, 2e28) == ("5e+18", "[1e+09, 2e+28]")
    assert interval(0.209645, 0.209641, 0.209649) == ("0.2096", "")
