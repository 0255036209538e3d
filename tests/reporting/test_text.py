"""Names that a user chooses stand in every output as they are: nothing in them is markup, mathematics or HTML."""

import html
import itertools
import re
import warnings
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from example_rows import chosen, row
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from bench.reporting.formats import TEX, latex, latex_text, markdown, terminal
from bench.reporting.leaderboard import leaderboard
from bench.reporting.page import write_page
from bench.reporting.page_plots import plots_of
from bench.reporting.plots import plot_curves as plot_log
from bench.reporting.plots import plot_samples, shortened
from bench.reporting.points import plot_points
from bench.reporting.report import Question, compared, sections, text, write_report
from bench.reporting.rows import write_rows
from bench.reporting.selection import collect
from bench.reporting.selection import settings as settings_of
from bench.reporting.table import markdown_text, run_markdown
from bench.runtime.console import TextConsole

SIGNS = r"x[/y]z [red]r[/red] <b>b</b> |%_$a_b$#&amp;\\ \$ **c** `d` ~~e~~ [f](g) '' -- :smile: 🍎"
NAMES = [f"_{SIGNS}", f"[{'long ' * 60}]", "l" * 300, "*a", "# a", "1. a", "- a", "a]b", "{x", "%{y}"]
LETTERS = st.text(st.sampled_from(list(r"ab1 _*`~[]()<>|$#&;\!+-.={}%^:'🍎é")), min_size=1, max_size=20)
markdown_reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def read_markdown(source: str, kind: str) -> list[str]:
    """Texts of all blocks of a kind; a failure if anything in them is more than text."""
    tokens = markdown_reader.parse(source)
    inline = [after for before, after in itertools.pairwise(tokens) if before.type == f"{kind}_open"]
    kinds = {child.type for token in inline for child in token.children or ()}
    assert kinds <= {"text", "softbreak", "strong_open", "strong_close"}  # the best of a column is bold
    return ["".join(child.content for child in token.children or ()) for token in inline]


def read_latex(source: str) -> str:
    """What TeX would show; a failure if a sign remains that it interprets."""
    signs = {tex: letter for letter, tex in TEX.items() if letter != "\n"}
    found = re.sub("|".join(map(re.escape, sorted(signs, key=len, reverse=True))), "", source.replace("{}", ""))
    plain = re.sub(r"\\(?:text|ast)?\w*", "", found)
    assert not set(plain) & set(r"\{}$&#%_^~<>|`"), plain
    shown = re.sub(r"(?<=[-',])\{\}", "", source)
    return re.sub("|".join(map(re.escape, sorted(signs, key=len, reverse=True))), lambda sign: signs[sign[0]], shown)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LETTERS)
def test_markdown_and_latex_show_any_text(name: str) -> None:
    def words(texts: list[str]) -> list[str]:
        return [" ".join(one.split()) for one in texts]

    shown, said = " ".join(name.split()), markdown_text(name)
    assert words(read_markdown(f"| {said} | 1 |\n| --- | --- |\n| 1 | 2 |", "th"))[0] == shown
    assert words(read_markdown(said, "paragraph")) == [shown] * bool(shown)
    assert words(read_markdown(f"### {said}", "heading")) == [shown]
    assert read_latex(latex_text(name)) == name


def nasty_rows(name: str) -> list[dict]:
    """Two rows of a table that share every name a user can choose."""
    same = {"reward": name, "model": name, "prompts": name, "note": name}
    rows = []
    for method, seed, update in itertools.product((name, "ddpo"), (0, 1), (10, 20)):
        at = {"budget": update, "updates": update, "reward_calls": update, "run": f"{method} {seed}", "seed": seed}
        at |= {"method": method, "settings": chosen(model__name=name), **same}
        for metric in (name.replace("/", ":"), "reward/train", "path_kl"):
            value = 1 + 0.1 * seed + update
            rows.append(row(metric=metric, value=value, prior=0.5, difference=value - 0.5, **at))
        for k in (1.0, 2.0):
            rows.append(row(metric=f"path_kl_steps/{k:02.0f}", value=k, prior=0.0, difference=k, **at))
        rows.append(row(metric=f"reward_prompts/train/{name}", **at))
    return rows


def frame_of(name: str) -> pd.DataFrame:
    return pd.DataFrame([{"schema": 2, "source": "x/rows.parquet"} | one for one in nasty_rows(name)])


@pytest.mark.parametrize("name", NAMES)
def test_tables_show_names(name: str) -> None:
    ((heading, rows),) = settings_of(frame_of(name))
    metric = name.replace("/", ":")  # behind a slash stands a feature space
    board = leaderboard(rows, [metric, "reward/train"], title=heading)
    flat = " ".join(name.split())
    found = read_markdown(text(compared(frame_of(name), Question((metric,))), [name]), "td")
    assert flat in [" ".join(one.split()) for one in found]
    assert any(metric in one for one in read_markdown(markdown(board), "th"))
    assert flat in " ".join(read_markdown(f"### {markdown_text(heading)}", "heading")[0].split())
    assert latex_text(name) in latex(board)
    assert not re.search(r"\\\\\n[\[*]", latex(board))  # would be an option of the line break
    assert read_markdown(run_markdown(nasty_rows(name)[:1]), "td")[0].startswith(metric)
    console = TextConsole(width=100, file=StringIO(), record=True)
    console.print(terminal(board, 100))
    letters = re.sub(r"\s", "", console.export_text())
    assert re.sub(r"\s", "", heading) in letters


class Reader(HTMLParser):
    """Texts and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("name", NAMES[:3])
def test_the_page_shows_names(name: str, tmp_path: Path) -> None:
    question = Question(("reward/train", "path_kl"))
    page = Reader(write_page(tmp_path / "page.html", frame_of(name), [name], question).read_text(encoding="utf8"))
    assert name in page.texts
    assert not page.tags & {"b", "red"}
    (section,) = sections(frame_of(name), question, with_gains=True)
    traces = plots_of(section)[0].data
    assert {trace["name"] for trace in traces if "name" in trace} == {html.escape(name), "ddpo"}  # Plotly reads HTML


def svg_texts(path: Path) -> list[str]:
    return ["".join(one.itertext()) for one in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", [NAMES[0], NAMES[2]])
def test_figures_show_names(name: str, tmp_path: Path) -> None:
    """Whole, or cut with an ellipsis; the font's missing letters and a collapsed layout would warn."""
    metric = name.replace("/", ":")
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none"}):
        warnings.simplefilter("error")
        write_report(tmp_path, frame_of(name), [name], Question((metric, "path_kl")))
        drawn = {path.stem.split("-")[0]: svg_texts(path) for path in tmp_path.glob("*-0.svg")}
        assert drawn.keys() == {"methods", "curves", "trades", "path_kl_steps", "reward_prompts"}
        assert [kind for kind, texts in drawn.items() if shortened(name) not in texts] == []
        assert shortened(name, 32) in drawn["reward_prompts"]
        log = pd.DataFrame({"update": [1, 2], "gradient_norm/a": [1.0, 2.0], f"gradient_norm/{name}": [1.0, 2.0]})
        plot_log(log, tmp_path / "log.svg", name)
        assert shortened(name) in svg_texts(tmp_path / "log.svg")
        images = np.zeros((1, 1, 8, 8, 3), np.uint8)
        plot_samples(images, images, [name], tmp_path / "samples.svg", name, np.ones((1, 1)), np.ones((1, 1)))
        plot_points({name: np.zeros((3, 2))}, np.eye(8), np.array([-1, 1, -1, 1]), tmp_path / "points.svg", name)
        for file in ("samples", "points"):
            assert any(name[:16] in one for one in svg_texts(tmp_path / f"{file}.svg"))


def test_the_sheet_shows_names(tmp_path: Path) -> None:
    name = NAMES[0]
    for number, one in enumerate(nasty_rows(name)[::12]):
        folder = tmp_path / f"r{number}"
        (folder / "images").mkdir(parents=True)
        write_rows(folder / "rows.parquet", [{key: value for key, value in one.items() if key != "schema"}])
        table = {"prompt": [name], "sample": [0], "prior": ["p.webp"], "finetuned": ["f.webp"]}
        pd.DataFrame(table).to_csv(folder / "images" / "index.csv", index=False)
        for file in ("p", "f"):
            Image.new("RGB", (8, 8)).save(folder / "images" / f"{file}.webp")
    write_report(tmp_path / "out", *collect([tmp_path]), Question())
    assert any(name[:16] in one for one in svg_texts(tmp_path / "out" / "sheet-0.svg"))


def test_a_file_is_named_after_a_metric_of_any_name(tmp_path: Path) -> None:
    name = "reward_prompts/train/a b](c)/" + "d" * 300
    rows = frame_of("x").assign(metric=name)
    write_report(tmp_path, rows[rows["budget"].notna()].drop_duplicates(["run", "budget"]), [], Question((name,)))
    (path,) = tmp_path.glob("curves-*.png")
    assert re.fullmatch(r"[\w.-]+", path.name)
    assert f"({path.name})" in (tmp_path / "report.md").read_text(encoding="utf8")
