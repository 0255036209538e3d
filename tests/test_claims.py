"""Every sentence of README and docs on results is what published rows say now."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from scaffold import ROOT

from bench.errors import BenchError
from bench.publish.claims import Claim, Estimate, Table, markdown_table, paired, render, significant, tuning, used
from bench.reporting.rows import read_rows, write_rows
from results.claims import CLAIMS, PAGES

PUBLISHED = ROOT / "results" / "published"
TRAIN, HELDOUT, KL = "reward/train", "reward/validation", "path_kl"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_says_what_rows_say(page) -> None:
    text = page.read_text(encoding="utf8")
    verdict = render(text, CLAIMS)
    assert not verdict.faults
    assert verdict.text == text, "run: python -m results.claims"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_wording_begins_a_line_which_markdown_would_show_as_it_is(page) -> None:
    begins = re.compile(r"^ *(?:[-*+] +|\d+\. +|> *)*<!-- /?claim\b[^\n]*?--> *[^\s<].*$", re.M)
    assert not begins.findall(page.read_text(encoding="utf8"))


def test_every_claim_has_a_place() -> None:
    assert set(used([page.read_text(encoding="utf8") for page in PAGES])) == set(CLAIMS)


def test_claim_that_fails_keeps_its_old_wording_and_is_named() -> None:
    claims = {"good": lambda: Claim("new", {"one is one": True}), "bad": lambda: Claim("new", {"pigs fly": False})}
    page = "a <!-- claim: good -->old<!-- /claim --> b <!-- claim: bad -->old\n\nold<!-- /claim --> c"
    text, faults = render(page, claims)
    assert text == page.replace("old<!-- /claim --> b", "new<!-- /claim --> b")
    assert faults == ("bad no longer holds: pigs fly",)
    unknown = render("<!-- claim: god --><!-- /claim -->", claims)
    assert unknown.faults == ("no claim god; did you mean 'good'? Known: bad, good.",)


def test_table_gives_values_paired_differences_and_ratios() -> None:
    ring = Table(("ring_little_noise",))
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
    with pytest.raises(BenchError, match="it has no ratio"):
        ring.ratio("rtb", "dpok", "reward/train")
    cheaper = ring.at("reward/train", 0.8)
    assert cheaper("rtb", "NFE").value < ring("rtb", "NFE").value
    assert ring.since(ring.at("updates", 400), "rtb", "path_kl").value == 0
    with pytest.raises(BenchError, match="did you mean 'tilt_tv'"):
        ring("rtb", "tilt_vt")
    pictures = Table(("emoji_mixture",)), Table(("emoji_mixture",), trained=True).at("updates", 100)
    assert ["best_of_n" in table.column("target_sw2/train") for table in pictures] == [True, False]
    assert pictures[0].methods == pictures[1].methods
    with pytest.raises(BenchError, match="2 settings"):
        Table(("ring_little_noise", "ring_flow"))


def test_runs_are_compared_at_a_gain_of_any_reward() -> None:
    flow = Table(("emoji_flow",)).at(HELDOUT, 1.0)
    assert flow.gain("draft", HELDOUT).value == pytest.approx(1.0)
    assert flow.gain("draft", TRAIN).value > 1.1


def test_what_lies_before_a_first_evaluation_is_not_measured() -> None:
    flow = Table(("emoji_flow",))
    guessed, measured = flow.at("reward/train", 1.3), flow.at("reward/train", 1.3, measured=True)
    assert set(guessed.methods) - set(measured.methods) == {"adjoint_matching"}  # it gains 1.5 by its first evaluation
    assert measured("draft", KL) == guessed("draft", KL)


@pytest.mark.parametrize("metric", [TRAIN, KL, "fid_prior/efficientnet_lite0", "coverage/efficientnet_lite0"])
def test_cells_are_those_of_the_published_table(metric) -> None:
    table = (PUBLISHED / "emoji_flow" / "report.md").read_text(encoding="utf8").split("\n\n")[1]
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    column = Table(("emoji_flow",)).column(metric)
    assert len(column) == 12 - (metric == KL)  # best of n has no path_kl
    assert all(f"| {cell} " in lines[name] for name, cell in column.items())


def test_gains_in_a_column_have_signs() -> None:
    assert Table(("emoji_flow",)).column(TRAIN, gain=True)["refl"].startswith("**+")


def squares(path: Path, factors: dict[str, float]) -> Table:
    """The published gains of methods, with a path_kl of a factor times the gain's square."""
    rows = read_rows(PUBLISHED / "emoji_flow" / "rows.parquet")
    rows = rows[rows["method"].isin(factors) & rows["metric"].isin([TRAIN, KL])].astype(object)
    gains = rows[rows["metric"] == TRAIN].set_index(["run", "budget"])["difference"]
    kl = rows["metric"] == KL
    own = gains[[*zip(rows.loc[kl, "run"], rows.loc[kl, "budget"], strict=True)]].to_numpy()
    rows.loc[kl, "value"] = rows.loc[kl, "method"].map(factors) * own**2
    write_rows(path / "rows.parquet", rows.where(rows.notna(), None).drop(columns="schema").to_dict("records"))
    return Table((str(path),))


def test_path_kl_is_compared_over_all_gains_that_both_reach(tmp_path) -> None:
    table = squares(tmp_path, {"draft": 2.0, "refl": 3.0, "nabla_gfn": 1.0, "nft": 1.0})
    for first, second, expected in (("refl", "draft", 1.5), ("nabla_gfn", "refl", 1 / 3)):
        assert table.over_gains(first, second).ratio[:3] == pytest.approx((expected,) * 3)
    low, high, _ = table.over_gains("nabla_gfn", "draft")
    gains = table.every[table.every["metric"] == TRAIN].sort_values("budget").groupby(["row", "seed"])["difference"]
    assert low == pytest.approx(gains.first()[["nabla_gfn", "draft"]].max())
    assert high == pytest.approx(gains.max()["nabla_gfn"].min())
    assert table.over_gains("nft", "draft") is None  # it ends where draft has its first evaluation
    assert table.over_gains("nft", "nobody") is None


def test_significant_of_a_family_is_what_holms_correction_leaves() -> None:
    """Of three comparisons with p of 0.001, 0.02 and 0.04 all are; with a fourth beside them only the first."""
    seeds = pd.Series(range(5), range(5), float)
    apart = paired(seeds + pd.Series([1.0, 1.1, 0.9, 1.2, 0.8]), seeds, "real")
    assert apart.p == pytest.approx(scipy.stats.ttest_1samp([1.0, 1.1, 0.9, 1.2, 0.8], 0).pvalue)
    ratio = paired(2 * seeds + 2, seeds + 1, "positive").exponential
    assert ratio.value == pytest.approx(2) and ratio.p < 1e-6  # the same in all seeds
    family = {name: Estimate(1.0)._replace(p=p) for name, p in {"a": 0.04, "b": 0.02, "c": 0.001}.items()}
    assert significant(family) == ["a", "b", "c"]
    assert significant(family | {"d": Estimate(1.0)._replace(p=0.5)}) == ["c"]
    assert significant({"one seed": Estimate(1.0)}) == []


def test_tuning_is_read_where_there_was_any() -> None:
    assert tuning("emoji_flow")["cost"]["runs"] == 33
    assert tuning("emoji_small_rate") == {}


def test_table_of_markdown() -> None:
    assert markdown_table(("a", "b"), [("1", "2")]) == "\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n"
