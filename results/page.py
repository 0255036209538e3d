"""The comparison as one self-contained page: tables that sort and filter, plots with hover, samples side by side."""

import base64
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
import seaborn as sns
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from results.budgets import COSTS, GAIN
from results.figures import FAMILIES, TRADED, family, lines_of
from results.formats import parts
from results.report import Question, Section, across, scores, sections

IMAGES = 12_000_000  # bytes of samples that a page holds at most, so that a phone opens it
MARKS = ["circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star", "pentagon", "hexagon"]


class Shot(NamedTuple):
    """A sample of one model: its name, the picture as a data URL, and its reward."""

    name: str
    url: str
    reward: str


def write_page(out: Path, frame: pd.DataFrame, left_out: Sequence[str], question: Question) -> Path:
    """Write `report.html` to `out`: it asks for nothing from elsewhere, and what is quoted in it is shown as text.

    frame, left_out: of `results.selection.collect`.
    """
    found = sections(frame, question, with_gains=True)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    bundle = files("itables") / "html"
    page = environment.get_template("page.html.j2").render(
        sections=[
            {
                "heading": section.heading,
                "boards": section.boards,
                "figures": [figure.to_json() for figure in _figures(section)],
                "shots": _samples(section),
                "runs": _runs(section),
            }
            for section in found
        ],
        over=across(scores(found)),
        left_out=left_out,
        parts=parts,
        order=lambda cell: "" if pd.isna(cell.value) else repr(float(cell.value)),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        tables=base64.b64encode((bundle / "dt_bundle.js").read_bytes()).decode(),
        tables_css=Markup((bundle / "dt_bundle.css").read_text(encoding="utf8").replace("</style", "")),
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    path.write_text(page, encoding="utf8")
    return path


def _figures(section: Section) -> list[go.Figure]:
    """The reward against each cost, and each price against the reward: of the table's rows, one shown at a time."""
    board = section.boards[0]
    names = [line.name for line in board.lines if line.n]
    rows = section.rows[(section.rows["status"] != "failed") & section.rows["value"].notna()]
    reward = {name: line for name, line in lines_of(rows, GAIN) if name in names}
    traded = [name for name in board.columns if name.startswith(TRADED)]
    if not reward:
        return []
    labels = {column: f"{label} [{unit}]" if unit else label for column, (label, unit) in COSTS.items()}
    curves = {
        label: {n: (line[column], line["value"], line) for n, line in reward.items()}
        for column, label in labels.items()
    }
    trades: dict[str, dict[str, Any]] = {}
    for metric in traded:
        both = {n: reward[n].merge(line, on="budget") for n, line in lines_of(rows, metric) if n in reward}
        trades[metric] = {n: (line["value_x"], line["value_y"], line) for n, line in both.items()}
    found = [_chooser(curves, f"{GAIN} against", "", GAIN, log=True)]
    return found + ([_chooser(trades, "Against the reward:", GAIN, "", log=False)] if trades else [])


def _chooser(views: dict[str, dict[str, Any]], title: str, x: str, y: str, log: bool) -> go.Figure:
    """A figure of lines by name with a menu of its views; x, y: titles of axes, "" for the view's name."""
    palette = dict(zip([*FAMILIES, "others"], sns.color_palette("colorblind").as_hex(), strict=False))
    figure = go.Figure()
    shown: list[str] = []
    for view, lines in views.items():
        for i, (name, (xs, ys, line)) in enumerate(sorted(lines.items(), key=lambda item: family(item[0]))):
            kind = family(name)
            figure.add_scatter(
                x=xs.tolist(), y=ys.tolist(), name=name, mode="lines+markers", visible=view == next(iter(views)),
                line={"color": palette[kind]}, marker={"symbol": MARKS[i % len(MARKS)], "size": 8},
                legendgroup=kind, legendgrouptitle={"text": kind}, text=line["budget"].tolist(),
                hovertemplate="%{fullData.name}<br>%{x:.4g}, %{y:.4g}<br>at update %{text}<extra></extra>",
            )  # fmt: skip
            shown.append(view)
    buttons = [
        {
            "label": view,
            "method": "update",
            "args": [
                {"visible": [own == view for own in shown]},
                {"xaxis.title.text": x or view, "yaxis.title.text": y or view},
            ],
        }
        for view in views
    ]
    first = next(iter(views))
    figure.update_layout(
        template="plotly_white", height=520, margin={"l": 60, "r": 10, "t": 70, "b": 50}, title={"text": title, "x": 0},
        updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.16}],
        xaxis={"title": {"text": x or first}, "type": "log" if log else "linear"},
        yaxis={"title": {"text": y or first}},
    )  # fmt: skip
    return figure


def _samples(section: Section) -> dict[tuple[str, str], list[Shot]]:
    """(prompt, sample) → the prior's picture and those of the table's rows, as many prompts as a page holds."""
    found: dict[tuple[str, str], list[Shot]] = {}
    size = 0
    for key, shots in section.shots().items():
        encoded = [base64.b64encode(shot.path.read_bytes()).decode() for shot in shots]
        size += sum(map(len, encoded))
        if size > IMAGES:
            break
        urls = [f"data:image/webp;base64,{data}" for data in encoded]
        found[key] = [Shot(shot.row, url, shot.reward) for shot, url in zip(shots, urls, strict=True)]
    return found


def _runs(section: Section) -> pd.DataFrame:
    """Where every row's runs come from: a line a run."""
    columns = ["row", "seed", "run", "config_hash", "updates", "revision", "dirty", "hardware", "status"]
    last = section.rows.sort_values(["row", "seed", "budget"]).drop_duplicates(["row", "seed"], keep="last")
    return last[columns].assign(dirty=last["dirty"].map({True: "yes", False: "no"}).fillna("unknown"))
