"""Methods as the lower envelopes of their configurations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_rows import row

from bench.reporting.efficiency import BEYOND
from bench.reporting.envelopes import CONFIGURED, common_range, compare, groups, least_kl, over_least, reference, table
from bench.reporting.formats import markdown
from bench.reporting.frontier import EVERY, FILE, setting, trace, write
from bench.reporting.page import write_page
from bench.reporting.report import Question, compared, text, write_report
from bench.reporting.rows import write_rows
from bench.reporting.selection import collect
from bench.reporting.statistics import CONFIDENCE, holm

SEEDS = range(5)


def run(gains: np.ndarray | list[float], kl: np.ndarray | list[float], configuration: int = 0) -> np.ndarray:
    return np.stack([np.array(gains), np.array(kl), np.full(len(gains), configuration)], 1)


def test_the_envelope_is_the_least_kl_that_gains_as_much() -> None:
    points = run([1.0, 2.0, 3.0], [2.0, 1.5, 9.0])
    between = 1.5 * (9 / 1.5) ** (np.log(2.5 / 2) / np.log(3 / 2))
    assert least_kl(points, np.array([0.5, 1.0, 2.0, 2.5, 3.1])) == pytest.approx([1.5, 1.5, 1.5, between, np.inf])
    apart = np.concatenate([points[:2], run([3.0], [9.0], 1)])  # of another configuration: nothing lies between
    assert least_kl(apart, np.array([2.5])).tolist() == [9.0]
    later = run([-0.5, 1.0, 0.8], [0.1, 4.0, 6.0])  # no logarithm of the first; the run passes 0.9 again, farther away
    assert least_kl(later, np.array([0.9])).tolist() == [4.0]
    rising = run([1.0, 2.0, 3.0], [1.0, 2.0, 9.0])
    assert common_range([{0: rising}, {0: rising[:2], 1: rising}])[-1] == 2.0
    assert len(common_range([{0: -rising}])) == 0
    assert common_range([{0: rising}, {0: rising[1:]}])[0] == 2.0  # where both were measured
    assert common_range([{0: points}])[0] == 2.0  # smaller gains cost it more
    assert len(common_range([{0: rising}, {0: rising[2:]}])) == 0


def test_a_comparison_depends_neither_on_where_runs_were_measured_nor_on_a_collapse() -> None:
    one, other = np.linspace(0.5, 4, 5), np.array([0.7, 1.5, 4.0])
    law = {seed: 1 + 0.1 * seed for seed in range(3)}
    found = compare(
        {s: run(one, f * one**2) for s, f in law.items()}, {s: run(other, f * other**2) for s, f in law.items()}
    )
    assert found and np.exp(found.ratio) == pytest.approx(1)
    fell = {s: np.concatenate([run(other, f * other**2), run([-1.0, 0.1], [400.0, 500.0])]) for s, f in law.items()}
    again = compare({s: run(one, f * one**2) for s, f in law.items()}, fell)
    assert again and again.gains[0] == found.gains[0] and np.exp(again.ratio) == pytest.approx(1)


def test_the_reference_has_the_most_seeds_and_failed_runs_are_counted(tmp_path: Path) -> None:
    weights = [{"method.kl": 1.0}, {"method.kl": 0.0}]
    rows = [one for name in ("draft", "refl (ema)", "ddpo") for one in rows_of(name, weights, 2.0 - (name != "draft"))]
    broken = {"metric": "run", "value": None, "difference": None, "status": "failed", "note": "not finite"}
    for one in rows:
        if one["method"] == "ddpo" or (one["method"], one["seed"]) == ("refl (ema)", 2):
            one |= broken | {"updates": 0 if one["method"] == "ddpo" else one["updates"]}
    write_rows(tmp_path / "rows.parquet", rows)
    (group,) = groups(collect([tmp_path])[0])
    assert reference(group) == "draft"
    board = table(group)
    assert [line.n for line in board.lines] == ["3", "2, 2 failed"]
    assert "All 6 runs of ddpo failed." in board.notes


def test_other_priors_and_other_options_of_the_reward_are_no_configurations(tmp_path: Path) -> None:
    weights = [{"method.kl": 1.0}, {"method.kl": 0.0}]
    rows = [
        one
        for method, prior in (("draft", "a"), ("refl", "b"))
        for one in rows_of(method, [own | {"model.fingerprint": prior} for own in weights], 1.0)
    ]
    write_rows(tmp_path / "rows.parquet", rows)
    found = list(groups(collect([tmp_path])[0]))
    assert [list(group.points) for group in found] == [["draft"], ["refl"]]
    assert [group.heading.rpartition("; ")[2] for group in found] == [
        f'model.fingerprint = "{prior}"' for prior in "ab"
    ]


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def curve(kl: np.ndarray) -> np.ndarray:
    return run(np.linspace(0.01, 1, len(kl)), kl)


def drawn(rng: np.random.Generator, shift: float) -> dict[int, np.ndarray]:
    """KL that rises with the gain, times a factor that wanders along the gains of a seed."""
    gains, seeds = np.linspace(0.01, 1, 60), {}
    for seed in SEEDS:
        wander = 0.1 * rng.standard_normal() + 0.02 * rng.standard_normal(60).cumsum()
        seeds[seed] = curve(np.exp(2 * gains + shift) * np.exp(wander - wander.min() + 3 * gains))
    return seeds


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_band_holds_the_whole_curve_in_95_of_100(seeds: int) -> None:
    rng, held, trials = np.random.default_rng(1), 0, 300
    gains = common_range([{0: curve(np.ones(60))}])
    truth = np.sin(gains)
    for _ in range(trials):
        one, other = {}, {}
        for seed in range(seeds):
            noise = 0.2 * rng.standard_normal() + 0.1 * rng.standard_normal(len(gains)).cumsum() / 5
            other[seed] = run(gains, np.exp(10 * gains))
            one[seed] = run(gains, np.exp(10 * gains + truth + noise))
        found = compare(one, other)
        assert found is not None
        held += bool(((found.low <= truth) & (truth <= found.high)).all())
    assert held / trials >= CONFIDENCE - 0.02  # Monte Carlo


def test_a_method_with_twice_the_kl_has_a_ratio_of_two() -> None:
    rng = np.random.default_rng(0)
    one = drawn(rng, 0.0)
    other = {seed: points * [1, np.exp(0.7 + 0.01 * rng.standard_normal()), 1] for seed, points in one.items()}
    found = compare(other, one)
    assert found is not None
    assert np.exp(found.mean) == pytest.approx(np.exp(0.7), rel=0.05)
    assert found.p < 1e-6
    assert (found.low > 0).all()
    assert compare({0: one[0]}, {0: other[0]}) is None


def rows_of(method: str, configurations: list[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    """Of three seeds; each configuration gains more, at a KL of about `factor` times the squared gain."""
    found = []
    for place, own in enumerate(configurations):
        settings = json.dumps({"method.name": method, "sampler.steps": 20} | own)
        for seed in range(3):
            for updates, share in ((10, 0.5), (20, 1.0)):
                gain = share * (place + 1) * (1 + 0.01 * seed)
                same = {"method": method, "settings": settings, "seed": seed, "budget": updates, "updates": updates}
                same |= {"run": f"{method}{place}{seed}", "beta": own.get("reward.beta", 1.0)}
                kl = gain**2 * factor ** (1 + 0.02 * seed)
                found += [row(difference=gain, **same), row(metric="path_kl", value=kl, support="positive", **same)]
    return found


def test_configurations_of_a_method_are_one_line_and_other_settings_are_not(tmp_path: Path) -> None:
    tilts = [{"reward.beta": 0.5, "optimizer.lr": 1e-3}, {"reward.beta": 2.0, "optimizer.lr": 4e-3, "train.updates": 9}]
    weights = [{"method.kl": 1.0}, {"method.kl": 0.0}]
    assert all(key.startswith(CONFIGURED) for one in [*tilts, *weights] for key in one)
    rows = rows_of("adjoint_matching", tilts, 1.0) + rows_of("draft", weights, 2.0)
    write_rows(tmp_path / "rows.parquet", rows)
    (group,) = groups(collect([tmp_path])[0])
    assert set(group.points) == {"adjoint_matching", "draft"}
    assert all(len(points) == 4 for seeds in group.points.values() for points in seeds.values())
    assert reference(group) == "adjoint_matching"
    board = table(group)
    assert [line.name for line in board.lines] == ["adjoint_matching", "draft"]
    ratio, p, *bands = board.lines[1].cells
    assert ratio.value == pytest.approx(2.0 ** (1 + 0.02), rel=1e-6)
    assert float(p.text) < 0.05  # by Holm's method, of one test
    found = compare(group.points["draft"], group.points["adjoint_matching"])
    assert found and [(cell.value, cell.low, cell.high) for cell in bands] == [
        pytest.approx(np.exp([found.ratio[i], found.low[i], found.high[i]])) for i in (0, len(found.gains) // 2, -1)
    ]
    everywhere = compared(collect([tmp_path])[0], Question())
    assert everywhere.boards[-1] == board  # on the terminal, and so in every format
    assert markdown(board) in text(everywhere, [])
    html = write_page(tmp_path / "page.html", *collect([tmp_path]), Question()).read_text()
    title = "Envelopes: emoji_clip on emoji, prompts emoji, the reward on training prompts"
    assert f"<h2>{title}</h2>" in html and "Over all gains of the reward on training prompts:" in html
    page = write_report(tmp_path / "report", *collect([tmp_path]), Question())
    assert "Envelopes: emoji_clip on emoji" in page.read_text()
    assert (page.parent / "envelopes-0.png").is_file()

    other = rows_of("draft", [{"method.kl": 1.0, "sampler.steps": 40}], 2.0)
    write_rows(tmp_path / "more.parquet", [one | {"run": f"x{one['run']}"} for one in other])
    (group,) = groups(collect([tmp_path])[0])
    assert set(group.points) == {"adjoint_matching", "draft (sampler.steps = 20)", "draft (sampler.steps = 40)"}


def test_an_envelope_is_set_against_the_least_kl_of_all() -> None:
    least = trace({"train": np.random.default_rng(0).standard_normal((4, 4096))}, {})
    known = least.curve(EVERY)["gain"].max()
    gains = np.linspace(0.02, known, 400)
    factors = {seed: 3 * np.exp(0.1 * (seed - 1)) for seed in range(3)}
    points = {seed: run(gains, f * least.least(gains)["kl"]) for seed, f in factors.items()}
    cell = over_least(points, least)
    assert cell.value == pytest.approx(3, rel=0.02)
    logs = np.log([cell.low, cell.value, cell.high])
    student_alone = 4.303 * 0.1 / 3**0.5
    assert student_alone < logs[1] - logs[0] < 1.2 * student_alone  # the curve's own error is added
    assert cell.text == f"at {known / 10:+.2g} to {known:+.2g}"
    farther = {seed: one * [2, 1, 1] for seed, one in points.items()}  # half of it beyond what the samples tell
    assert not over_least(farther, least).text.endswith(f"to {known:+.2g}")
    assert over_least({0: run([100 * known, 200 * known], [9.0, 9.0])}, least).text == BEYOND


def test_gains_on_test_on_training_and_on_all_prompts_are_compared(tmp_path: Path) -> None:
    rows = rows_of("draft", [{"method.kl": 1.0}, {"method.kl": 0.0}], 2.0)
    test = [
        one | {"metric": "reward/test", "difference": one["difference"] / 2, "n": 3 * one["n"]} for one in rows[::2]
    ]
    write_rows(tmp_path / "rows.parquet", [*rows, *test])
    assert [group.gained for group in groups(collect([tmp_path])[0])] == [
        "the reward on test prompts",
        "the reward on training prompts",
    ]
    curves = trace(
        {"train": np.random.default_rng(0).standard_normal((4, 4096))}, setting(json.loads(rows[0]["settings"]))
    )
    write(tmp_path / FILE, [curves])
    *_, whole = groups(collect([tmp_path])[0])
    assert whole.gained == "the reward on all prompts"
    train = rows[0]["difference"]
    assert whole.points["draft"][0][:, 0].min() == pytest.approx((train + 3 * train / 2) / 4)
    assert table(whole).columns[-1] == "KL over the least"
    html = write_page(tmp_path / "page.html", *collect([tmp_path]), Question()).read_text()
    assert "least KL of all distributions" in html
    page = write_report(tmp_path / "report", *collect([tmp_path]), Question())
    assert (page.parent / "envelopes-2.png").is_file()


def test_evaluations_without_a_kl_are_no_part_of_it(tmp_path: Path) -> None:
    rows = [row(settings=json.dumps({"optimizer.lr": rate}), run=str(rate)) for rate in (0.1, 0.2)]
    write_rows(tmp_path / "rows.parquet", rows)
    assert not list(groups(collect([tmp_path])[0]))


def test_published_tables_have_one_configuration_of_each_method() -> None:
    assert not list(groups(collect([Path("ring")])[0]))
