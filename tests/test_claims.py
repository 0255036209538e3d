"""Every sentence of README and docs on results is what published rows say now."""

import numpy as np
import pytest

from bench.errors import BenchError
from bench.publish.claims import Claim, Table, render, used
from results.claims import CLAIMS, PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_says_what_rows_say(page) -> None:
    text = page.read_text(encoding="utf8")
    verdict = render(text, CLAIMS)
    assert not verdict.faults
    assert verdict.text == text, "run: python -m results.claims"


def test_every_claim_has_a_place() -> None:
    assert set(used([page.read_text(encoding="utf8") for page in PAGES])) == set(CLAIMS)


def test_claim_that_fails_keeps_its_old_wording_and_is_named() -> None:
    claims = {"good": lambda: Claim("new", {"one is one": True}), "bad": lambda: Claim("new", {"pigs fly": False})}
    page = "a <!-- claim: good -->old<!-- /claim --> b <!-- claim: bad -->old\n\nold<!-- /claim --> c"
    text, faults = render(page, claims)
    assert text == page.replace("old<!-- /claim --> b", "new<!-- /claim --> b")
    assert faults == ("bad no longer holds: pigs fly",)
    assert render("<!-- claim: god --><!-- /claim -->", claims).faults == (
        "no claim god; did you mean 'good'? Known: bad, good.",
    )


def test_table_gives_values_paired_differences_and_ratios() -> None:
    ring = Table(("ring",))
    first, second = ring.by_seed("rtb", "path_kl"), ring.by_seed("dpok", "path_kl")
    assert len(first) == 10
    logs = np.log(first / second)
    assert ring.ratio("rtb", "dpok", "path_kl").value == pytest.approx(np.exp(logs.mean()))
    middle = np.sort((first - second).to_numpy())[2:8].mean()  # ten seeds: the interquartile mean
    assert ring.difference("rtb", "dpok", "path_kl").value == pytest.approx(middle, rel=0.2)
    assert ring.difference("rtb", "dpok", "path_kl").clear
    assert ring.gain("rtb", "reward/train").value == pytest.approx(
        ring("rtb", "reward/train").value - ring.prior("reward/train").value, rel=0.05
    )
    cheaper = ring.at("gain", 0.8)
    assert cheaper("rtb", "NFE").value < ring("rtb", "NFE").value
    assert ring.since(ring.at("updates", 400), "rtb", "path_kl").value == 0
    with pytest.raises(BenchError, match="rtb tilt_tv"):
        ring("rtb", "tilt_vt")
    with pytest.raises(BenchError, match="2 settings"):
        Table(("ring", "ring_flow"))
