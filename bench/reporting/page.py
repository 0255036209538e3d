"""The comparison as one self-contained page: tables that sort and filter, plots with hover, samples side by side."""

import base64
import html
import math
from collections.abc import Sequence
from importlib.resources import files
from itertools import cycle, groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
import seaborn as sns
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from bench.reporting.budgets import AXES, COSTS, GAIN
from bench.reporting.figures import FAMILIES, TRADED, family, lines_of, scale_of
from bench.reporting.formats import interval, parts
from bench.reporting.report import Question, Section, across, scores, sections

IMAGES = 12_000_000  # bytes of samples that a page holds at most, so that a phone opens it
MARKS = ["circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star", "pentagon", "hexagon"]


class Plot(NamedTuple):
    """A figure with several views, of which it shows the first.

    views: label → arguments of `Plotly.update`.
    """

    title: str
    figure: go.Figure
    views: dict[str, list[dict[str, Any]]]


class Shot(NamedTuple):
    """A sample of one model: its name, the picture as a data URL, and its reward."""

    name: str
    url: str
    reward: str


def write_page(out: Path, frame: pd.DataFrame, left_out: Sequence[str], question: Question) -> Path:
    """Write `report.html` to `out`: it asks for nothing from elsewhere, and what is quoted in it is shown as text.

    frame, left_out: of `bench.reporting.selection.collect`.
    """
    all_sections = sections(frame, question, with_gains=True)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    bundle = files("itables") / "html"
    page = environment.get_template("page.html.j2").render(
        sections=[
            {
                "heading": section.heading,
                "boards": section.boards,
                "plots": plots_of(section),
                "shots": _samples(section),
                "runs": _runs(section),
            }
            for section in all_sections
        ],
        over=across(scores(all_sections)),
        left_out=left_out,
        parts=parts,
        gap=lambda cell: " ".join(interval(cell.gap, cell.gap_low, cell.gap_high, sign=True)).strip(),
        order=lambda cell: "" if pd.isna(cell.value) else repr(float(cell.value)),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        tables=base64.b64encode((bundle / "dt_bundle.js").read_bytes()).decode(),
        tables_css=Markup((bundle / "dt_bundle.css").read_text(encoding="utf8").replace("</style", "")),
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    path.write_text(page, encoding="utf8")
    return path


def plots_of(section: Section) -> list[Plot]:
    """The reward against each cost, and each price against the reward, of the table's rows."""
    board = section.boards[0]
    names = [line.name for line in board.lines if line.n]
    rows = section.rows[(section.rows["status"] != "failed") & section.rows["value"].notna()]
    reward = {name: line for name, line in lines_of(rows, GAIN) if name in names}
    traded = [name for name in board.columns if name.startswith(TRADED)]
    if not reward:
        return []
    named = {column: COSTS[column] for column in AXES}
    labels = {column: f"{label} [{unit}]" if unit else label for column, (label, unit) in named.items()}
    curves = {
        label: {n: (line[column], line["value"], line) for n, line in reward.items()}
        for column, label in labels.items()
    }
    trades: dict[str, dict[str, Any]] = {}
    for metric in traded:
        both = {n: reward[n].merge(line, on="budget") for n, line in lines_of(rows, metric) if n in reward}
        trades[metric] = {n: (line["value_x"], line["value_y"], line) for n, line in both.items()}
    gain = _axis(rows, GAIN)
    costs = {label: {"xaxis": {"title": {"text": label}, "type": "log"}, "yaxis": gain} for label in curves}
    prices = {metric: {"xaxis": gain, "yaxis": _axis(rows, metric)} for metric in trades}
    plots = [(f"{GAIN} against", curves, costs), (f"Against {GAIN}:", trades, prices)]
    return [_plot(title, views, axes) for title, views, axes in plots if views]


def _axis(rows: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Plotly's axis of a metric."""
    log, ends = scale_of(rows, metric)
    limits = {"range": [math.log10(end) if log else end for end in ends]} if ends else {}
    unit = rows.loc[rows["metric"] == metric, "unit"].iloc[0]
    return {
        "title": {"text": html.escape(f"{metric} [{unit}]" if unit else metric)},
        "type": "log" if log else "linear",
        **limits,
    }


def _plot(title: str, views: dict[str, dict[str, Any]], axes: dict[str, dict[str, Any]]) -> Plot:
    """Lines by name, and the axes, of every view. Plotly reads texts as HTML."""
    palette = dict(zip([*FAMILIES, "others"], sns.color_palette("colorblind").as_hex(), strict=False))
    names = sorted({name for lines in views.values() for name in lines}, key=lambda name: (family(name), name))
    marks = {name: mark for _, members in groupby(names, family) for name, mark in zip(members, cycle(MARKS))}
    first = next(iter(views))
    figure = go.Figure()
    shown: list[str] = []
    for view, lines in views.items():
        for name in filter(lines.__contains__, names):
            (xs, ys, line), kind = lines[name], family(name)
            figure.add_scatter(
                x=xs.tolist(), y=ys.tolist(), name=html.escape(name), mode="lines+markers", visible=view == first,
                line={"color": palette[kind]}, marker={"symbol": marks[name], "size": 8},
                legendgroup=kind, legendgrouptitle={"text": kind}, text=line["budget"].tolist(),
                hovertemplate="%{fullData.name}<br>%{x:.4g}, %{y:.4g}<br>at update %{text}<extra></extra>",
            )  # fmt: skip
            shown.append(view)
    height = max(480, 60 + 20 * len(names) + 36 * len(set(map(family, names))))  # room for the legend
    figure.update_layout(template="plotly_white", margin={"l": 60, "r": 10, "t": 10, "b": 50}, height=height)
    figure.update_layout(axes[first])
    updates = {view: [{"visible": [name == view for name in shown]}, axes[view]] for view in views}
    return Plot(title, figure, updates)


def _samples(section: Section) -> dict[tuple[str, str], list[Shot]]:
    """(prompt, sample) → the prior's picture and those of the table's rows, as many prompts as a page holds."""
    shots_of: dict[tuple[str, str], list[Shot]] = {}
    size = 0
    for key, shots in section.shots().items():
        encoded = [base64.b64encode(shot.path.read_bytes()).decode() for shot in shots]
        size += sum(map(len, encoded))
        if size > IMAGES:
            break
        urls = [f"data:image/webp;base64,{data}" for data in encoded]
        shots_of[key] = [Shot(shot.row, url, shot.reward) for shot, url in zip(shots, urls, strict=True)]
    return shots_of


def _runs(section: Section) -> pd.DataFrame:
    """Where every row's runs come from: a line a run."""
    columns = ["row", "seed", "run", "config_hash", "updates", "revision", "dirty", "hardware", "status"]
    last = section.rows.sort_values(["row", "seed", "budget"]).drop_duplicates(["row", "seed"], keep="last")
    return last[columns].assign(dirty=last["dirty"].map({True: "yes", False: "no"}).fillna("unknown"))
