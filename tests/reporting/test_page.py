"""The page in a browser: it sorts, filters, shows samples and settings, quotes what it was given, asks for nothing."""

import csv
import html
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from example_rows import PUBLISHED, chosen, fid, floor, row
from PIL import Image
from rich.console import Console

from bench.reporting.budgets import within
from bench.reporting.chooser import choices
from bench.reporting.formats import latex, markdown, terminal, to_csv
from bench.reporting.frontier import ENOUGH
from bench.reporting.leaderboard import leaderboard
from bench.reporting.page import write_page
from bench.reporting.page_plots import plots_of
from bench.reporting.ranking import ranking
from bench.reporting.report import Question, compared, sections, write_report
from bench.reporting.rows import write_rows
from bench.reporting.selection import collect, settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
EVIL = '<img src=x onerror="window.hacked=1"> "a" & \'b\''


def runs(folder: Path) -> Path:
    """Two settings of two methods of three seeds and evaluations, with pictures of two prompts, one of them HTML."""
    for reward in ("emoji_clip", "emoji_style"):
        for number, method in enumerate(("draft", "ddpo")):
            for seed in range(3):
                run = folder / reward / f"{method}{seed}"
                (run / "images").mkdir(parents=True)
                rng = np.random.default_rng([number, seed])
                for update in (20, 40, 60):
                    gain = (number + 1) * update / 30 + 0.1 * rng.normal()
                    cost = {"budget": update, "updates": update, "reward_calls": 16 * update, "seed": seed}
                    cost |= {"method": method, "run": run.name, "reward": reward}
                    cost["settings"] = chosen(reward__name=reward)
                    kl = row(metric="path_kl", value=gain**2, prior=0.0, difference=gain**2, direction="lower", **cost)
                    rows = [
                        row(value=30 + gain, difference=gain, **cost),
                        kl,
                        fid(value=70 + gain, **cost),
                        floor(**cost),
                    ]
                    write_rows(run / ("rows.parquet" if update == 60 else f"rows-at-{update}.parquet"), rows)
                with (run / "images" / "index.csv").open("w", newline="") as file:
                    table = csv.writer(file)
                    table.writerow(
                        [
                            "prompt",
                            "split",
                            "sample",
                            "noise",
                            "prior",
                            f"{reward}/prior",
                            "finetuned",
                            f"{reward}/finetuned",
                        ]
                    )
                    for i, prompt in enumerate(("a cat", EVIL)):
                        table.writerow([prompt, "train", 0, "0x1", f"{i}-p.webp", "1", f"{i}-f.webp", "2"])
                        for kind in "pf":
                            Image.new("RGB", (8, 8), (90 * i, 99, 50 * number)).save(
                                run / "images" / f"{i}-{kind}.webp"
                            )
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("there is no Chromium")
    folder = tmp_path_factory.mktemp("page")
    path = write_page(folder / "report.html", *collect([runs(folder / "runs")]), Question())
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened(browser, path, **PHONE)
        browser.close()


def opened(browser: Any, path: Path, **device: Any) -> Any:
    """A page that remembers what it told the console and what it asked for."""
    page = browser.new_context(**device).new_page()
    page.told, page.asked = [], []
    page.on("console", lambda message: page.told.append(message.text))
    page.on("pageerror", lambda error: page.told.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]", state="attached")
    return page


@pytest.mark.slow
def test_the_page_of_all_published_rows_is_small(tmp_path: Path) -> None:
    path = write_page(tmp_path / "index.html", *collect([PUBLISHED]), Question())  # what `make page` builds
    assert path.stat().st_size < 5_000_000


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of points and pictures."""
    rows = collect([PUBLISHED / name for name in ("ring_little_noise", "emoji")])
    return write_page(tmp_path_factory.mktemp("published") / "index.html", *rows, Question())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_published_tables_fit_a_screen_of_1280_pixels(published: Path, scheme: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = opened(browser, published, viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        room = "t => [t.offsetWidth, t.parentElement.clientWidth, t.tHead.rows[0].cells.length]"
        widths = page.locator("table.board").evaluate_all(f"tables => tables.map({room})")
        assert len(widths) >= 4
        assert all(width <= parent and columns >= 4 for width, parent, columns in widths)
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        names = page.locator(".shots figcaption").all_inner_texts()
        assert [name.split("\n")[0] for name in names][:2] == ["prior", "draft"]
        light, ink = (
            sum(map(int, page.evaluate(f"getComputedStyle(document.documentElement).{part}").strip("rgb()").split(",")))
            for part in ("backgroundColor", "color")
        )
        assert (light > 3 * ink) if scheme == "light" else (ink > 3 * light)
        bar, legend = (
            page.locator(f".plot {part}").first.bounding_box() for part in (".modebar-container > div", ".legend")
        )
        assert bar["y"] + bar["height"] <= legend["y"]
        assert page.told == []
        browser.close()


def test_the_page_works_in_a_browser(page: Any) -> None:
    from playwright.sync_api import expect  # which waits, up to a limit

    methods = page.locator("table.board").first.locator("tbody th")
    expect(methods).to_have_text(["prior", "sampling floor", "ddpo", "draft"])
    page.locator("table.board").first.locator("thead [role=button]").first.press("Enter")  # by keyboard
    expect(methods).to_have_text(["ddpo", "draft", "prior", "sampling floor"])
    region = page.get_by_role("region", name="emoji_clip (β = 1) on emoji, prompts emoji", exact=True)
    region.focus()
    page.keyboard.press("ArrowRight")  # to the columns that a phone has no room for
    page.wait_for_function("region => region.scrollLeft > 0", arg=region.element_handle())
    reward = page.locator("table.board").first.locator("thead th").nth(1)
    reward.click()
    expect(methods).to_have_text(["sampling floor", "prior", "draft", "ddpo"])  # by number
    page.get_by_label("Filter").first.fill("draft")
    expect(methods).to_have_text(["draft"])
    assert page.locator("section[data-setting]:visible").count() == 2
    page.locator("#setting").select_option("1")
    assert page.locator("section[data-setting]:visible h2").all_inner_texts() == [
        "emoji_style (β = 1) on emoji, prompts emoji"
    ]
    section = page.locator("section[data-setting='1']")
    captions, samples = section.locator("figcaption"), section.get_by_label("Samples of", exact=False).first
    assert captions.all_inner_texts() == ["prior\nreward 1", "ddpo\nreward 2", "draft\nreward 2"]
    samples.select_option(f"{EVIL} · 0")
    shown = section.locator("figure [role=img]")
    assert shown.evaluate_all("all => all.map(one => one.style.getPropertyValue('--x'))") == ["1"] * 3
    samples.select_option("draft")  # before the prior, on all prompts
    assert captions.all_inner_texts() == [
        f"{row}\n{prompt} · 0\nreward {reward}"
        for row, reward in (("prior", 1), ("draft", 2))
        for prompt in ("a cat", EVIL)
    ]
    section.get_by_role("button", name="Columns").first.click()
    page.locator("button.buttons-columnVisibility", has_text="path_kl").click()
    expect(section.locator("table.board").first.locator("thead")).not_to_contain_text("path_kl")
    page.keyboard.press("Escape")
    section.get_by_text("Where the rows come from").click()
    expect(section.locator("table.runs tbody tr")).to_have_count(6)
    price = page.locator("section[data-setting='1'] .plot").nth(1)
    page.get_by_label("Against reward/train").nth(1).select_option("path_kl")
    expect(price.locator(".ytitle")).to_have_text("path_kl")
    expect(price.locator(".scatterlayer .trace .lines path.js-line")).to_have_count(2)  # a line a method
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize(
    ("table", "axis", "share", "most_kl", "place"),
    [
        ("ring_little_noise", "reward_calls", 1.0, None, 0),  # by the distance, of ten seeds
        ("ring_little_noise", "nfe", 0.3, 0.5, 1),
        ("emoji_flow", "reward_calls", 0.5, 20.0, 0),  # of three
        ("emoji_flow", "train_seconds", 0.2, None, 0),
        ("emoji_flow", "reward_gradients", 0.02, 3.0, 0),
    ],
)
def test_the_page_chooses_as_the_command_does(
    page: Any, table: str, axis: str, share: float, most_kl: float | None, place: int
) -> None:
    """Order, intervals, p by Holm's method, and which rows are not ranked, for any budget and bound."""
    ((_, rows),) = settings(collect([PUBLISHED / table])[0])
    budget = share * rows[axis].max()
    chosen_rows, missing, _ = within(rows[rows["status"] != "failed"], axis, budget, most_kl)
    data = choices(rows)
    assert data
    measure = data["measures"][place]
    expected = ranking(chosen_rows[chosen_rows["updates"] > 0], measure["name"])
    script = (files("bench.reporting") / "chooser.js").read_text().replace("export ", "")
    found = page.evaluate(
        "([script, ...given]) => { const { rows, first, missing } = eval(`${script}; choose`)(...given, true);"
        "return [rows.map(row => [row.name, ...row.ends, row === first ? null : row.p]), Object.keys(missing)]; }",
        [script, data, measure, axis, budget, most_kl],
    )
    assert set(found[1]) == set(missing)
    assert [name for name, *_ in found[0]] == list(expected)
    for name, *ends, p in found[0]:
        rank = expected[name]
        assert ends == pytest.approx(rank[:3], rel=2e-4, abs=1e-4), name
        assert rank.first if p is None else p == pytest.approx(rank.p, rel=0.02, abs=1e-6), name


def test_the_page_answers_for_a_budget(page: Any) -> None:
    """What a reader asks for: ddpo gains twice as much as draft, at four times the KL."""
    section = page.locator("section[data-setting='0']")
    page.locator("#setting").select_option("0")
    section.get_by_role("spinbutton", name="Budget").fill("960")
    lead = section.locator(".chosen .lead")
    assert lead.inner_text().startswith("Within 960 reward calls, ddpo gains most: +4")
    assert "1 significantly less. This rests on 3 seeds." in lead.inner_text()
    section.get_by_label("path_kl at most").fill("2")
    assert "Within 960 reward calls and 2 nats, " in lead.inner_text()
    assert section.locator(".chosen tbody td:last-child").all_inner_texts() == ["the KL"] * 2
    section.get_by_label("without the reward's gradient").check()
    assert "Nothing is known of training" in lead.inner_text()  # all of these rows have spent gradients
    section.get_by_label("without the reward's gradient").uncheck()
    page.locator("#setting").select_option("")


def test_the_page_quotes_and_asks_for_nothing(page: Any) -> None:
    assert f"{EVIL} · 0" in page.locator("select.samples option").all_text_contents()
    assert page.evaluate("window.hacked") is None
    assert page.told == []
    assert [url for url in page.asked if not url.startswith(("data:", "blob:"))] == [page.url]


def test_a_diverged_run_leaves_the_plots_their_scale(tmp_path: Path) -> None:
    frame, _ = collect([runs(tmp_path)])
    frame.loc[(frame["metric"] == "reward/train") & (frame["run"] == "ddpo0") & (frame["budget"] == 40), "value"] = -1e6
    rewards, prices = plots_of(sections(frame, Question(), with_gains=True)[0])
    low, high = prices.layout["xaxis"]["range"]
    assert 29 < low < high < 36
    for seen, axes in prices.views.values():  # what is within these ends is within the other ones too
        drawn = [trace for trace, state in zip(prices.data, seen["visible"], strict=True) if state and "text" in trace]
        inside = [y for trace in drawn for x, y in zip(trace["x"], trace["y"], strict=True) if low < x < high]
        ends = [10**end if axes["yaxis"]["type"] == "log" else end for end in axes["yaxis"]["range"]]
        assert len(inside) == 5 and ends[0] < min(inside) < max(inside) < ends[1]
    bands = [trace for trace in rewards.data if trace.get("fill")]
    assert len(bands) == len(rewards.data) / 2 == 10  # of two methods at five costs
    assert all(len(band["y"]) == 6 and band["y"][0] > band["y"][-1] for band in bands)


def test_what_is_known_without_training_stands_beside_the_kl_alone() -> None:
    """The least KL to where it is known, and best of n, whose points with few effective samples are hollow."""
    (section,) = sections(collect([PUBLISHED / "emoji_clip"])[0], Question())
    assert section.frontier
    plot = plots_of(section)[1]
    own = {metric: plot.views[metric][0]["visible"] for metric in plot.views}
    stills = {
        metric: [trace for trace, state in zip(plot.data, seen, strict=True) if state is True and "meta" in trace]
        for metric, seen in own.items()
    }
    assert {metric: len(traces) for metric, traces in stills.items() if len(traces) > 1} == {"path_kl": 4}
    prior, least, best, _ = stills["path_kl"]
    curve, draws = section.frontier.curve("train"), section.frontier.curve("train", "best_of_n")
    assert least["y"][-1] == pytest.approx(curve["kl"].max(), rel=1e-4)
    assert least["x"][-1] == pytest.approx(prior["x"][0] + curve["gain"].max(), rel=1e-4)
    assert best["x"] == pytest.approx(list(prior["x"][0] + draws["gain"]), rel=1e-4)
    hollow = [symbol.endswith("open") for symbol in best["marker"]["symbol"]]
    assert hollow == list(draws["effective"] < ENOUGH) and set(hollow) == {True, False}


def test_a_page_of_the_reward_alone_has_no_prices(tmp_path: Path) -> None:
    (section, _) = sections(collect([runs(tmp_path)])[0], Question(("reward/train",)), with_gains=True)
    assert [plot.title for plot in plots_of(section)] == ["Gain of reward/train against"]


def test_the_page_says_it_in_words(tmp_path: Path) -> None:
    """The sentences below every table, and above it what a reader must know first."""
    frame, _ = collect([runs(tmp_path)])
    page = html.unescape(write_page(tmp_path / "page.html", frame, [], Question()).read_text())
    for section in sections(frame, Question(), with_gains=True):
        for board in section.boards:
            assert board.answers
            assert all(f"<li>{sentence}</li>" in page for sentence in board.answers)
    page = write_page(tmp_path / "page.html", frame, [], Question(axis="updates", limits=(1e6,))).read_text()
    assert page.count('<p class="lead">No run here reaches 1,000,000 updates: the most is 60, of ddpo.</p>') == 2


def test_formats_say_what_the_table_says(tmp_path: Path) -> None:
    ((_, rows), _) = settings(collect([runs(tmp_path)])[0])
    said = {"lead": "Read this first.", "answers": ("ddpo gains most.",)}
    board = replace(leaderboard(rows, title="100 % & more_of_it"), **said)
    cells = {line.name: dict(zip(board.columns, line.cells, strict=True)) for line in board.lines}
    assert cells["ddpo"]["reward/train"].mark == "best"
    table = pd.read_csv(StringIO(to_csv([board]))).set_index(["row", "metric"])
    assert table.loc[("ddpo", "path_kl"), "value"] == pytest.approx(cells["ddpo"]["path_kl"].value, rel=1e-8)
    assert table.loc[("ddpo", "reward/train"), "mark"] == "best"
    text = latex(board)
    assert r"100 \% \& more\_of\_it" in text
    assert text.count(r"\midrule") == 2
    assert "more\\_of\\_it. Read this first. Means" in text and "ddpo gains" not in text
    assert markdown(board).startswith("Read this first.\n\n| method ")
    assert "|\n\n- ddpo gains most.\n\nMeans" in markdown(board)
    assert text.index(r"\toprule") < text.index(r"reward/train $\uparrow$") < text.index(r"\bottomrule")
    assert r"\textbf{" in text.split("ddpo & ")[1].split(" & ")[0]
    for width in (50, 80, 200):
        console = Console(width=width, record=True, file=StringIO())
        console.print(terminal(board, width), highlight=False)
        shown = console.export_text()
        assert max(map(len, shown.splitlines())) <= width
        assert "★" in shown
        assert shown.index("Read this first.") < shown.index("★") < shown.index("• ddpo gains most.")
        assert "…" not in shown


SHORT = ("emoji_mixture", "verdict_emoji_flow")


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(path.parent, id=path.parent.name, marks=() if path.parent.name in SHORT else pytest.mark.slow)
        for path in sorted(PUBLISHED.glob("*/report.csv"))
    ],
)
def test_published_tables_come_from_their_rows_byte_by_byte(folder: Path) -> None:
    """`bench report results/published/NAME --out results/published/NAME` wrote them."""
    found = compared(collect([folder])[0], Question(), with_gains=True).boards
    assert to_csv(found).encode() == (folder / "report.csv").read_bytes()
    for name, form in (("report.tex", latex), ("report.md", markdown)):
        if (folder / name).is_file():
            published = (folder / name).read_text(encoding="utf8")
            assert all(form(board) in published for board in found)


@pytest.mark.slow
def test_a_report_is_written_twice_with_the_same_bytes(tmp_path: Path) -> None:
    rows = collect([runs(tmp_path / "runs")])
    for out in ("one", "two"):
        write_report(tmp_path / out, *rows, Question())
    first = sorted((tmp_path / "one").iterdir())
    assert {path.name for path in first} >= {"sheet-0.png", "sheet-1.svg", "curves-reward-train-0.png", "profiles.png"}
    assert all(path.read_bytes() == (tmp_path / "two" / path.name).read_bytes() for path in first)


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_seconds(tmp_path: Path) -> None:
    """50 methods, 10 seeds, 10 evaluations, 20 metrics: the tables in 10 s of an idle core and 1 GB."""
    rng = np.random.default_rng(0)
    names = ["reward/train", "reward/test", "path_kl", *(f"metric{i}" for i in range(17))]
    rows = []
    options = chosen(**{f"section.option_number_{i}": "of some length" for i in range(60)})  # 2.5 kB, as real ones
    for m, seed, b in np.ndindex(50, 10, 10):
        cost = {"budget": 10 * b + 10, "updates": 10 * b + 10, "reward_calls": 100 * b + 100, "seed": seed}
        gains = b / 5 + rng.normal(size=len(names))
        own = {"method": f"method{m}", "settings": options, "run": f"{m}-{seed}", **cost}
        rows += [row(metric=n, value=30 + x, difference=x, **own) for n, x in zip(names, gains.tolist(), strict=True)]
    write_rows(tmp_path / "rows.parquet", rows)
    assert len(rows) == 100_000
    code = (
        "import sys, re, time; from bench.cli.app import application; application(sys.argv[1:], standalone_mode=False);"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1];"
        "print(time.process_time(), peak, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "report", str(tmp_path), "--format", "md"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("| method") == 51
    seconds, kilobytes = map(float, done.stderr.split()[-2:])
    print(f"{seconds:.1f} s, {kilobytes / 2**20:.2f} GiB")
    assert seconds < 20  # 10 on an idle core, more beside other jobs
    assert kilobytes < 2**20
