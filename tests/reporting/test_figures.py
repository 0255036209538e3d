"""Figures can be read: texts apart and inside, legends beside the data, axes filled, what is off the scale named."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from example_rows import PUBLISHED, row
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.path import Path as Outline
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from bench.reporting.figures.drawing import end_names, name_leaving, settle, spread
from bench.reporting.figures.looks import FAMILIES, MARKERS, families, looks
from bench.reporting.figures.methods import ACROSS, plot_methods
from bench.reporting.figures.ranks import plot_ranks
from bench.reporting.figures.scales import Scale, scale_of
from bench.reporting.figures.sheet import plot_sheet
from bench.reporting.figures.steps import plot_profiles
from bench.reporting.figures.trades import _from_zero, checks_of, trades_of
from bench.reporting.plots import plot_curves, plot_samples
from bench.reporting.points import plot_points
from bench.reporting.ranks import ranks
from bench.reporting.report import Question, _figures, sections
from bench.reporting.samples import Samples, samples_of, write_samples
from bench.reporting.selection import collect

Drawn = dict[str, tuple[Figure, list[tuple[Text, Outline]]]]
MANY = [*" ".join(FAMILIES.values()).split()[::2], "nabla_db", "prior"]  # enough for a line of panels per family
RUN = ["reward_over_prior", "loss", "gradient_norm/policy", "gradient_norm/flow"]
RUN += [f"seconds/{phase}" for phase in ("rollout", "losses", "backward", "optimizer")]
LONG = [f"nabla_gfn_published_{i}" for i in range(3)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drawn]:
    """Every kind of figure, of published rows and of made-up numbers, with the texts that it shows."""
    found: Drawn = {}
    texts: list[Text] = []
    with pytest.MonkeyPatch.context() as patch:
        draw = Text.draw

        def keep(text: Text, renderer: Any) -> None:
            draw(text, renderer)
            if text.get_visible() and text.get_text().strip():
                texts.append(text)

        def saved(figure: Figure, path: Path, **options: Any) -> None:
            if path.suffix == ".png":
                texts.clear()
                figure.draw_without_rendering()
                found[f"{path.parent.name}/{path.stem}"] = (
                    figure,
                    [(text, _outline(text)) for text in dict.fromkeys(texts)],
                )

        patch.setattr(Text, "draw", keep)
        patch.setattr(Figure, "savefig", saved)
        out = tmp_path_factory.mktemp("figures")
        for name, rows in {"ring_little_noise": MANY, "emoji_clip": None}.items():
            (out / name).mkdir()
            frame = collect([PUBLISHED / name])[0]
            (section,) = sections(frame[frame["method"].isin(rows or frame["method"])], Question())
            _figures(section, Question(), out / name, 0)
        rng = np.random.default_rng(0)
        plot_profiles({name: {"a": rng.normal(size=9)} for name in (*LONG, "draft")}, out / "profiles.png", "title")
        scores = pd.DataFrame(rng.random((len(MANY), 9)) + 0.1 * np.arange(len(MANY))[:, None], index=MANY)
        plot_ranks(ranks(scores), out / "ranks.png", "title")
        log = pd.DataFrame({name: rng.normal(9, 1, 40) for name in RUN}).assign(update=range(1, 41), round=range(40))
        marks = pd.DataFrame({"updates": [1, 40], "prior": 2.0, "difference": 9.0, "standard_error": 0.2})
        plot_curves(log, out / "curves.png", "title", marks)
        plot_curves(log.rename(columns={RUN[0]: "reward"}), out / "curves_without_prior.png", "title", marks)
        images = rng.integers(0, 255, (3, 4, 8, 8, 3), np.uint8)
        plot_samples(images, images, ["a cat", "long " * 60, "c"], out / "samples.png", "t", *rng.random((2, 3, 9)))
        cloud = {name: rng.normal(size=(50, 2)) for name in ("target", "prior", *(f"{name}\nseed 0" for name in LONG))}
        plot_points(cloud, rng.random((9, 9)), np.array([-3.0, 3, -3, 3]), out / "points.png", "title")
    yield found


def _outline(text: Text) -> Outline:
    """The rectangle that a text fills, turned as it is."""
    box = Text.get_window_extent(text)  # an annotation's own would hold its line
    angle = text.get_rotation()
    text.set_rotation(0)
    flat = Text.get_window_extent(text)
    text.set_rotation(angle)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) * [flat.width / 2 - 1, flat.height / 2 - 1]
    turn = np.deg2rad(angle)
    turned = corners @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
    return Outline(turned + np.mean([box.min, box.max], 0))


def test_every_kind_of_figure_is_drawn(drawn: Drawn) -> None:
    kinds = {name.split("/")[1].removesuffix("-0") for name in drawn}
    assert kinds == {
        "methods", "curves-tilt_sw2", "curves-reward-train", "trades", "path_kl_steps", "reward_prompts", "sheet",
        "profiles", "ranks", "points", "curves", "curves_without_prior", "samples", "checks",
    }  # fmt: skip


def test_texts_lie_inside_and_apart(drawn: Drawn) -> None:
    for name, (figure, texts) in drawn.items():
        width, height = figure.bbox.size
        for text, outline in texts:
            box = outline.get_extents()
            assert box.x0 >= -1 and box.x1 <= width + 1, (name, text.get_text())
            assert box.y0 >= -1 and box.y1 <= height + 1, (name, text.get_text())
        for (one, first), (other, second) in combinations(texts, 2):
            assert not first.intersects_path(second), (name, one.get_text(), other.get_text())


def test_no_legend_lies_over_data(drawn: Drawn) -> None:
    seen = 0
    for name, (figure, _) in drawn.items():
        for legend in figure.findobj(Legend):
            seen += 1
            box = legend.get_window_extent()
            over = [ax for ax in figure.axes if ax.axison and ax.bbox.shrunk(0.999, 0.999).overlaps(box)]
            assert not over, name
    assert seen > 20


def test_lines_to_names_do_not_cross(drawn: Drawn) -> None:
    figure, _ = drawn["emoji_clip/trades-0"]
    for ax in figure.axes:
        names = [text for text in ax.texts if isinstance(text, Annotation)]
        assert not _crossings(ax, names)
    assert sum(len(ax.texts) for ax in figure.axes) >= 4 * 6


def _crossings(ax: Axes, names: list[Annotation]) -> int:
    ends = ax.transData.transform([name.xy for name in names]) if names else []
    starts = ax.transAxes.transform([name.xyann for name in names]) if names else []
    lines = [Outline([end, start]) for end, start in zip(ends, starts, strict=True)]
    return sum(one.intersects_path(other) for one, other in combinations(lines, 2))


@examples(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=14, unique=True))
def test_names_beside_any_ends_neither_cross_nor_overlap(ends: list[tuple[float, float]]) -> None:
    figure = Figure(figsize=(5, 4), dpi=130, layout="constrained")
    ax = figure.subplots()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    names = end_names(ax, {f"method_{i}": (x, y, "#2342c0") for i, (x, y) in enumerate(ends)})
    settle(figure)
    spread(ax, names)
    apart = {(round(x, 3), round(y, 3)) for x, y in ends}
    assert len(apart) < len(ends) or not _crossings(ax, names)
    boxes = [Text.get_window_extent(name) for name in names]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_axes_are_filled_and_what_is_off_the_scale_is_named(drawn: Drawn) -> None:
    """Of the published ring rows one method diverged: to a reward of -3e5 and a KL of up to 1e9."""
    for kind, least in (("trades-0", 0.6), ("curves-reward-train-0", 0.6), ("methods-0", 0.5)):
        figure, _ = drawn[f"ring_little_noise/{kind}"]
        for ax in figure.axes:
            shown = [line.get_xydata() for line in ax.lines if len(line.get_xydata()) > 1]
            shown += [dots.get_offsets() for dots in ax.collections if kind == "methods-0"]
            shares = ax.transAxes.inverted().transform(ax.transData.transform(np.concatenate(shown)))
            inside = shares[((shares >= 0) & (shares <= 1)).all(1)]
            assert (np.ptp(inside, axis=0) >= least).all(), (kind, ax.get_ylabel())
    trades, _ = drawn["ring_little_noise/trades-0"]
    assert max(ax.get_ylim()[1] for ax in trades.axes) < 1e5
    for kind, axes in (
        ("trades-0", trades.axes),
        ("curves-reward-train-0", drawn["ring_little_noise/curves-reward-train-0"][0].axes),
    ):
        named = [[text.get_text() for text in ax.texts] for ax in axes]
        assert [texts for texts in named if texts], kind
        assert {text for texts in named for text in texts} <= {"nabla_db ◂ -296,269", "nabla_db ▾ -296,266"}
    sw2, tv, reward, kl, _ = drawn["ring_little_noise/methods-0"][0].axes
    assert [[text.get_text() for text in ax.texts] for ax in (tv, reward)] == [[], ["◂ -296,269"]]
    assert [len(ax.texts) for ax in (sw2, kl)] == [1, 1]


@pytest.mark.parametrize(
    ("values", "log", "ends"),
    [
        ([-3.0, -2.5, -2.0, -1.0, -1e6], False, (-3.1, -0.9)),
        ([-3.0, -2.5, -2.0, -1.0, 1e6, 1e7, -1e7, *[-1.5] * 20], False, (-3.1, -0.9)),  # several hide one another
        ([-3.4, -3.05, -3.0, -2.95, -2.52], False, None),  # far from close rows, which it hardly squeezes
        ([-3.0, -2.5, -2.0, -1.0, -6.5], False, None),  # left to what is drawn
        ([-3.0, -2.5, -1e6], False, None),  # nobody knows which of so few is off
        ([1.0, 1.0, 1.0, 1.0, 2.0], False, None),
        ([0.1, 1.0, 10.0, 100.0, 1e30], True, (10**-1.15, 10**2.15)),
        ([0.1, 1.0, 10.0, 100.0, 1e4], True, None),
        ([], False, None),
        ([0.2, 0.25, 0.3, 0.4, 60.0], False, (0.19, 0.41)),  # less than a decade is left
    ],
)
def test_a_diverged_row_leaves_the_others_their_scale(values: list[float], log: bool, ends: Any) -> None:
    for drawn in ({str(i): [value] for i, value in enumerate(values)}, {"alone": values}):
        scale = scale_of(drawn)
        assert scale.log == log
        assert scale.ends == (ends and pytest.approx(ends))


def test_a_row_that_diverges_both_ways_is_off_the_scale_and_the_prior_on_it() -> None:
    spans = {"wide": (-1e5, 1e5), "a": (0.0, 1.0), "b": (0.5, 2.0), "c": (1.0, 1.5)}
    assert scale_of(spans) == Scale(False, pytest.approx((-0.1, 2.1)))
    assert scale_of(spans, -2.0, float("nan")) == Scale(False, pytest.approx((-2.2, 2.2)))


def test_what_leaves_a_panel_sideways_does_not_stretch_its_height() -> None:
    rows = []
    for number, name in enumerate("abcde"):
        for budget, gain, kl in ((20, 1.0, 0.01 * 4**number), (40, -1e6 if name == "e" else 2.0, 1e3)):
            kl = kl if budget == 20 or name == "e" else 10.0
            same = {"row": name, "budget": budget, "updates": budget, "nfe": 100.0}
            rows.append(row(value=gain, difference=gain, prior=0.0, **same))
            rows.append(row(metric="path_kl", value=kl, difference=kl, prior=0.0, support="positive", **same))
    (trade,) = trades_of(pd.DataFrame(rows), ["path_kl"], list("abcde"))
    reward, kl = trade.scales
    assert reward.ends == pytest.approx((-0.1, 2.1))
    assert kl.log and kl.ends == pytest.approx((0.01 / 10**0.15, 10 * 10**0.15))


def test_checks_are_all_rewards_against_the_kl() -> None:
    rows = sections(collect([PUBLISHED / "emoji_small_rate"])[0], Question())[0].rows
    names = [name for name in rows["row"].unique() if name != "prior"]
    panels = checks_of(rows, names)
    others = ("emoji_clip", "colorfulness", "jpeg_compressibility")
    assert [panel.metric for panel in panels] == ["reward/train", *(f"reward/{name}/train" for name in others)]
    for panel in panels:
        assert panel.across == "path_kl" and panel.start[0] == 0
        last = panel.lines[names[0]].iloc[-1]
        own = rows[(rows["row"] == names[0]) & (rows["budget"] == last["budget"])]
        for column, metric in {"value_reward": "path_kl", "value": panel.metric}.items():
            values = own.loc[own["metric"] == metric, "value"]
            assert values.min() <= last[column] <= values.max()
    assert not checks_of(rows[~rows["metric"].str.match("reward/.*/")], names)


def test_lines_are_named_at_the_edge_they_leave_by() -> None:
    figure = Figure(dpi=130)
    ax = figure.subplots()
    ax.set(xlim=(0, 1), ylim=(1, 100), yscale="log")
    ways = {"up": (0.5, 1e9), "down": (0.5, -3.0), "left": (-9.0, 10.0), "right": (7.0, 10.0), "in": (0.9, 50.0)}
    lines = {name: (np.array([0.4, x]), np.array([10.0, y]), "#000000") for name, (x, y) in ways.items()}
    again = {f"{name}_again": line for name, line in lines.items()}
    name_leaving(ax, lines | again)
    shown = {text.get_text(): text for text in ax.texts}
    assert set(shown) == {
        f"{name}{more} {end}"
        for more in ("", "_again")
        for name, end in {"up": "▴ 1,000,000,000", "down": "▾ -3", "left": "◂ -9", "right": "▸ 7"}.items()
    }
    boxes = {name.split(" ")[0]: text.get_window_extent() for name, text in shown.items()}
    assert not any(one.overlaps(other) for one, other in combinations(boxes.values(), 2))
    panel = ax.bbox
    close = 3.0 * boxes["up"].height
    assert panel.y1 - boxes["up"].y1 < close and boxes["down"].y0 - panel.y0 < close
    assert boxes["left"].x0 - panel.x0 < 3 and panel.x1 - boxes["right"].x1 < 3
    assert all(Bbox.intersection(panel, box).size == pytest.approx(box.size) for box in boxes.values())


def test_a_family_has_a_hue_and_a_row_a_look_of_its_own() -> None:
    order = [name for names in FAMILIES.values() for name in names.split()] + ["best_of_n", "mine (lr = 1)"]
    found = looks(order)
    assert len({look.color for look in found.values()}) == len(order)
    for names in families(order).values():
        assert len({found[name].marker for name in names}) == min(len(names), len(MARKERS))
    assert families(["mine", "draft (lr = 1)"]) == {"reward gradient": ["draft (lr = 1)"], "others": ["mine"]}


def test_a_sheet_has_mean_rewards_beside_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    images = np.random.default_rng(0).integers(0, 255, (3, 4, 8, 8, 3), np.uint8)
    columns = [("a cat", "0"), ("a cat", "1"), ("a dog", "0"), ("a dog", "1")]
    rewards = np.array([[1.0, 9, 2, 9], [3.25, 9, 4, 9], [np.nan] * 4])
    plot_sheet(Samples(["prior", "draft", "refl"], columns, images, rewards), tmp_path / "x.png")
    axes = kept[0].axes
    assert [ax.get_ylabel() for ax in axes if ax.get_ylabel()] == ["prior\nreward 1.5", "draft\nreward 3.625", "refl"]
    assert [ax.get_title() for ax in axes if ax.get_title()] == ["a cat", "a dog"]
    shown = np.array([ax.images[0].get_array() for ax in axes]).reshape(3, 2, 8, 8, 3)
    assert (shown == images[:, [0, 2]]).all()


def test_a_report_keeps_images_and_reads_them_again(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, 2, 8, 6, 3), np.uint8)
    rewards = np.array([[1.0, np.nan], [2, 3], [4, 5]])
    samples = Samples(["prior", "draft", "refl"], [("a $cat$", "0"), ("a dog", "0")], images, rewards)
    write_samples(samples, "here", tmp_path / "samples-0")
    write_samples(samples._replace(rows=["prior", "a", "b"]), "elsewhere", tmp_path / "samples-1")
    names = ["draft", "refl", "other"]
    rows = pd.DataFrame({"source": str(tmp_path / "rows.parquet"), "row": names, "seed": 0})
    again = samples_of(rows, ["refl", "other", "draft"], "here")
    assert again
    assert again.rows == ["prior", "refl", "draft"]
    assert again.columns == samples.columns
    assert (again.images == images[[0, 2, 1]]).all()
    np.testing.assert_equal(again.rewards, rewards[[0, 2, 1]])
    longer = rows.replace({"row": {"draft": "draft (lr = 1)"}})  # beside draft (lr = 2) of another folder
    again = samples_of(longer, ["draft (lr = 2)", "draft (lr = 1)"], "here")
    assert again and again.rows == ["prior", "draft (lr = 1)"]
    assert (again.images == images[:2]).all()
    assert samples_of(rows, ["draft"], "nowhere") is None


def test_the_least_kl_is_drawn_from_the_prior_on() -> None:
    """Its root is linear there; a straight line from the logarithm of 0 would be vertical."""
    x, kl = _from_zero(pd.Series([1.0, 1.5, 2.0]), pd.Series([0.0, 0.01, 0.04]))
    np.testing.assert_allclose(kl**0.5, 0.2 * (x - 1.0), atol=1e-12)
    assert (x[0], kl[0]) == (1.0, 0.0) and kl[1] < 1e-9
    later = _from_zero(pd.Series([1.5, 2.0]), pd.Series([0.01, 0.04]))  # best of n, from n = 2 on
    assert len(later[0]) == 2


def test_many_metrics_of_methods_take_several_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = collect([PUBLISHED / "emoji_mixture"])[0]
    (section,) = sections(frame[frame["method"] == "draft_1"], Question())
    rows = section.rows[(section.rows["updates"] == 100) & section.rows["value"].notna()]
    shown = [name for name in rows["metric"].unique() if not name.endswith("/floor")]
    metrics = sorted(shown, key=len)[-ACROSS - 1 :]
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_methods(rows, metrics, tmp_path / "methods.png")
    places = {(round(ax.get_position().x0, 2), round(ax.get_position().y0, 2)) for ax in figures[0].axes}
    assert len(metrics) == len(places) == ACROSS + 1
    assert len({x for x, _ in places}) == (ACROSS + 1) // 2 and len({y for _, y in places}) == 2
    lines = [line for ax in figures[0].axes for line in ax.get_title().split("\n")]
    assert len(lines) > len(metrics)  # some are in two
    assert not {"↑", "↓"} & set(lines)


def test_a_cut_axis_has_room_for_the_sampling_floor() -> None:
    (section,) = sections(collect([PUBLISHED / "emoji_mixture_long"])[0], Question())
    name = "target_sw2/train"
    (trade,) = trades_of(section.rows, [name], list(section.rows["row"].unique()))
    assert trade.scales[1].ends
    low, high = trade.scales[1].ends
    assert all(low < one["value"][name] < high for one in (trade.before, trade.least))
