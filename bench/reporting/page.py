"""The comparison as one self-contained page: tables that sort and filter, plots with hover, samples side by side."""

import base64
import gzip
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from bench.reporting.budgets import AXES, COSTS, KL, measured_gains
from bench.reporting.chooser import choices
from bench.reporting.envelopes import Group, curves, ratios, reference
from bench.reporting.figures.looks import Look, families, looks
from bench.reporting.figures.scales import Scale, gains, is_positive, lines_of, scale_of
from bench.reporting.figures.trades import SHOWN as NEEDED
from bench.reporting.figures.trades import SOFT, Trade, curve_of, trades_of
from bench.reporting.formats import interval, parts
from bench.reporting.frontier import ENOUGH
from bench.reporting.leaderboard import Board, narrow
from bench.reporting.ranks import Ranks
from bench.reporting.report import Question, Section, compared
from bench.reporting.samples import Samples, mosaic
from bench.reporting.statistics import student

PIXELS = 16_000_000  # of the samples of a setting, so that a phone opens the page
SHOWN = 10  # rows of the table whose lines are shown before a reader asks for others
SYMBOLS = {  # matplotlib's marker → Plotly's
    "o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross", "X": "x",
    "*": "star", "<": "triangle-left", ">": "triangle-right",
}  # fmt: skip
Line: TypeAlias = tuple[pd.Series, pd.Series, pd.DataFrame]  # x, y, and where they are from


class Plot(NamedTuple):
    """A figure with several views, of which it shows the first.

    data, layout: Plotly's. views: label → arguments of `Plotly.update`.
    """

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    views: dict[str, list[dict[str, Any]]]


def write_page(path: Path, frame: pd.DataFrame, left_out: Sequence[str], question: Question) -> Path:
    """Write the page to `path`: it asks for nothing from elsewhere, and what is quoted in it is shown as text.

    frame, left_out: of `bench.reporting.selection.collect`.
    """
    report = compared(frame, question, with_gains=True)
    plots = [plots_of(section) for section in report.sections]
    over_gains = [[envelope_plot(group)] for group, _ in report.envelopes]
    over_settings = [ranks_plot(report.ranked[0])] if report.ranked else []
    runs = [_runs(section) for section in report.sections]
    known = [choices(section.rows) for section in report.sections]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    numbers = {
        "plots": json.dumps(
            [
                [(plot.data, plot.layout, list(plot.views.values())) for plot in own]
                for own in (*plots, *over_gains, over_settings)
            ]
        ),
        "choices": json.dumps(known, separators=(",", ":")),
        "runs": json.dumps([own.astype(str).to_numpy().tolist() for own in runs]),
    }
    page = environment.get_template("page.html.j2").render(
        sections=[
            {
                "heading": section.heading,
                "verdict": section.boards[0].answers,
                "boards": section.boards,
                "plots": own,
                "samples": _samples(section),
                "runs": origin,
                "choices": choice,
            }
            for section, own, origin, choice in zip(report.sections, plots, runs, known, strict=True)
        ],
        envelopes=[
            {"board": board, "plots": own} for (_, board), own in zip(report.envelopes, over_gains, strict=True)
        ],
        over=report.over,
        ranks=over_settings,
        left_out=left_out,
        parts=parts,
        later=_later,
        gap=lambda cell: " ".join(interval(cell.gap, cell.gap_low, cell.gap_high, sign=True)).strip(),
        order=lambda cell: "" if pd.isna(cell.value) else f"{cell.value:.9g}",
        packed=_libraries() | {name: _packed(text) for name, text in numbers.items()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf8")
    return path


@cache
def _libraries() -> dict[str, str]:
    """What draws and sorts, packed, which takes longer than all the rest of a small page."""
    bundle = files("itables") / "html"
    sources = {
        "plotly": get_plotlyjs(),
        "tables": (bundle / "dt_bundle.js").read_text(encoding="utf8"),
        "styles": (bundle / "dt_bundle.css").read_text(encoding="utf8"),
    }
    return {name: _packed(text) for name, text in sources.items()}


def _packed(text: str) -> str:
    """What the page unpacks, at a third of the size."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _later(board: Board) -> list[int]:
    """Columns of a table in the order in which they are hidden where it is too wide; the method's is 0."""
    first = narrow(board.columns)
    return [i + 1 for i in reversed(range(len(board.columns))) if i not in first]


def plots_of(section: Section) -> list[Plot]:
    """The reward's gain against each cost with bands, and each price against the reward, of the table's rows."""
    board = section.boards[0]
    names = [line.name for line in board.lines if line.n]
    rows = section.rows[(section.rows["status"] != "failed") & section.rows["value"].notna()]
    of = measured_gains(rows)[0]
    gained = {name: line for name, line in lines_of(gains(rows), of) if name in names}
    if not gained:
        return []
    labels = {column: f"{label} [{unit}]" if unit else label for column in AXES for label, unit in [COSTS[column]]}
    spent = {
        column: {name: line[line[column] > 0] for name, line in gained.items() if (line[column] > 0).any()}
        for column in AXES
    }
    curves = {
        labels[column]: {name: (line[column], line["value"], line) for name, line in lines.items()}
        for column, lines in spent.items()
        if lines
    }
    values = {name: line["value"] for name, line in gained.items()}
    gain = _axis(rows, of, scale_of(values, positive=is_positive(rows, of)), " less the prior's on the same noise")
    costs = {label: {"xaxis": {"title": {"text": label}, "type": "log"}, "yaxis": gain} for label in curves}
    trades = {trade.metric: trade for trade in trades_of(rows, board.columns, names, section.frontier)}
    prices = {
        metric: {
            axis: _axis(rows, name, scale)
            for axis, name, scale in zip(("xaxis", "yaxis"), (of, metric), trade.scales, strict=True)
        }
        for metric, trade in trades.items()
    }
    lines = {
        metric: {name: (line["value_reward"], line["value"], line[["budget"]]) for name, line in trade.lines.items()}
        for metric, trade in trades.items()
    }
    known = {metric: _known(trade) for metric, trade in trades.items()}
    order = [name for name in names if name in gained]
    plots = [_plot(f"Gain of {of} against", curves, costs, order)]
    return plots + ([_plot(f"Against {of}:", lines, prices, order, known)] if lines else [])


def envelope_plot(group: Group) -> Plot:
    """The least KL of every method at every gain, and its ratio to the least of them."""
    lines = {"the KL": curves(group), "its ratio": ratios(group)}
    views = {
        view: {name: (line["gain"], line["value"], line) for name, line in own.items()}
        for view, own in lines.items()
        if own
    }
    titles = {"the KL": f"least {KL} [nats]", "its ratio": f"{KL} over that of {reference(group)}"}
    gain = {"title": {"text": html.escape(f"gain of {group.reward}")}, "type": "linear"}
    axes = {
        view: {"xaxis": gain, "yaxis": {"title": {"text": html.escape(titles[view])}, "type": "log"}} for view in views
    }
    return _plot("Over all gains:", views, axes, list(group.points))


def ranks_plot(found: Ranks) -> Plot:
    """Mean ranks with bars half of the critical distance long on either side, which overlap where not separated."""
    means, styles = found.means, looks([str(name) for name in found.means.index])
    names = [html.escape(str(name)) for name in means.index]
    trace = {
        "x": _short(means), "y": names, "mode": "markers", "showlegend": False,
        "marker": {"size": 9, "color": [styles[str(name)].color for name in means.index]},
        "error_x": {"type": "constant", "value": found.distance / 2, "thickness": 1, "color": "#888888"},
        "hovertemplate": "%{y}: %{x:.3g}<extra></extra>",
    }  # fmt: skip
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "mean rank"}},
        "yaxis": {"autorange": "reversed", "automargin": True},
    }
    layout |= {"height": 160 + 22 * len(names), "margin": {"l": 60, "r": 10, "t": 40, "b": 50}}
    label = "bars: half the critical distance; apart where they do not overlap"
    return Plot("Mean ranks,", [trace], layout, {label: [{}, {}]})


def _known(trade: Trade) -> list[dict[str, Any]]:
    """The prior and, against the KL, what is known without training: the least KL and the selections among draws."""
    start = trade.start
    traces: list[dict[str, Any]] = [
        _still("prior", [start[0]], [start[1]], marker={"symbol": "diamond", "size": 10}, mode="markers")
    ]
    if trade.frontier is None:
        return traces
    least, best, soft = (
        curve_of(trade.frontier, trade.across, kind, n)
        for kind, n in (("tilt", None), ("best_of_n", None), ("soft_best_of_n", SOFT))
    )
    drawn = [line["value"].min() for line in trade.lines.values()]
    shown = min([NEEDED * least["kl"].max(), *drawn]) if trade.scales[1].log else 0.0  # less would stretch the axis
    least, soft = (curve[curve["kl"] >= shown] for curve in (least, soft))
    reach = np.exp(student(np.inf) * (least["kl_error"] / least["kl"]).fillna(0.0))
    x, ends = _short(start[0] + least["gain"]), [_short(least["kl"] * reach), _short(least["kl"] / reach)]
    band = {"x": x + x[::-1], "y": ends[0] + ends[1][::-1], "fill": "toself", "fillcolor": "#88888840"}
    names = "least KL, to where samples run out", "best of n, at most", f"soft best of {SOFT}"
    end = {"symbol": "line-ns", "size": [0] * (len(x) - 1) + [14], "line": {"width": 2}}
    few = ["circle-open" if effective < ENOUGH else "circle" for effective in best["effective"]]
    tilts, draws = ([f"{tilt:.3g}" for tilt in least["beta"]], [f"{n:.0f}" for n in best["n"]])
    return [
        *traces,
        _still(names[0], x, _short(least["kl"]), marker=end, text=tilts, hovertemplate=_hover("β' = %{text}")),
        {**band, "legendgroup": names[0], "showlegend": False, "hoverinfo": "skip", "mode": "none"},
        _still(
            names[1], _short(start[0] + best["gain"]), _short(best["kl"]), line={"dash": "dash", "width": 1},
            marker={"symbol": few}, text=draws, hovertemplate=_hover("n = %{text}"),
        ),
        _still(
            names[2], _short(start[0] + soft["gain"]), _short(soft["kl"]), line={"dash": "dot", "width": 1},
            mode="lines",
        ),
    ]  # fmt: skip


def _still(name: str, x: list[float], y: list[float], **look: Any) -> dict[str, Any]:
    """A trace in the colour of the text, which the page knows."""
    own = {"x": x, "y": y, "name": name, "legendgroup": name, "mode": "lines+markers", "meta": "ink"}
    return own | {"hovertemplate": _hover()} | look


def _hover(more: str = "") -> str:
    return "<br>".join(filter(None, ["%{fullData.name}", "%{x:.4g}, %{y:.4g}", more])) + "<extra></extra>"


def _axis(rows: pd.DataFrame, metric: str, scale: Scale, more: str = "") -> dict[str, Any]:
    """Plotly's axis of a metric."""
    limits = {"range": [math.log10(end) if scale.log else end for end in scale.ends]} if scale.ends else {}
    unit = rows.loc[rows["metric"] == metric, "unit"].iloc[0]
    title = {"text": html.escape(f"{metric} [{unit}]" if unit else metric + more)}
    return {"title": title, "type": "log" if scale.log else "linear", **limits}


def _plot(
    title: str,
    views: dict[str, dict[str, Line]],
    axes: dict[str, dict[str, Any]],
    order: Sequence[str],
    known: Mapping[str, list[dict[str, Any]]] | None = None,
) -> Plot:
    """Lines by name, and the axes, of every view; order: rows of the table, of which the first are shown unasked.

    known: traces of a view that are shown beside the rows.
    """
    first, styles = next(iter(views)), looks(order)
    data: list[dict[str, Any]] = []
    shown: list[tuple[str, bool | str]] = []
    for view, lines in views.items():
        for kind, members in families(order).items():
            for i, name in enumerate(filter(lines.__contains__, members)):
                traces = _traces(name, lines[name], styles[name])
                traces[0] |= {"legendgrouptitle": {"text": kind}} if i == 0 else {}
                data += traces
                shown += [(view, order.index(name) < SHOWN or "legendonly")] * len(traces)
        others = (known or {}).get(view, [])
        data += [
            trace | {"legendgrouptitle": {"text": "nothing trained"} if i == 0 else {}}
            for i, trace in enumerate(others)
        ]
        shown += [(view, True)] * len(others)
    visible = {view: [state if own == view else False for own, state in shown] for view in views}
    for trace, state in zip(data, visible[first], strict=True):
        trace["visible"] = state
    layout = {"margin": {"l": 60, "r": 10, "t": 40, "b": 50}, "height": 560, "legend": {"tracegroupgap": 3}}
    return Plot(title, data, layout | axes[first], {view: [{"visible": visible[view]}, axes[view]] for view in views})


def _traces(name: str, line: Line, look: Look) -> list[dict[str, Any]]:
    """A line and, where there are several seeds, its band, which a click on the name hides together."""
    x, y = (_short(values) for values in line[:2])
    name = html.escape(name)  # Plotly reads texts as HTML
    trace: dict[str, Any] = {
        "x": x, "y": y, "name": name, "legendgroup": name, "mode": "lines", "line": {"color": look.color},
        "hovertemplate": _hover(),
    }  # fmt: skip
    if "budget" in line[2]:  # its points are evaluations
        trace |= {"mode": "lines+markers", "marker": {"symbol": SYMBOLS[look.marker], "size": 8}}
        trace |= {"text": line[2]["budget"].tolist(), "hovertemplate": _hover("at update %{text}")}
    traces = [trace]
    if "low" in line[2] and line[2]["low"].notna().any():
        ends = [_short(line[2][end].fillna(line[1])) for end in ("high", "low")]
        band = {"x": x + x[::-1], "y": ends[0] + ends[1][::-1], "fill": "toself", "fillcolor": f"{look.color}26"}
        traces.append(
            {**band, "name": name, "legendgroup": name, "showlegend": False, "hoverinfo": "skip", "mode": "none"}
        )
    return traces


def _short(values: pd.Series) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _samples(section: Section) -> dict[str, Any] | None:
    """The section's images as one, and what they are."""
    samples = section.samples()
    if samples is None:
        return None
    most = max(1, PIXELS // (len(samples.rows) * math.prod(samples.images.shape[2:4])))
    samples = Samples(samples.rows, samples.columns[:most], samples.images[:, :most], samples.rewards[:, :most])
    data = io.BytesIO()
    mosaic(samples).save(data, "WEBP", quality=90, method=6)
    rewards = [["" if pd.isna(x) else f"{x:.4g}" for x in line] for line in samples.rewards]
    columns = [f"{prompt} · {sample}" for prompt, sample in samples.columns]
    return {
        "url": f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}",
        "ratio": samples.images.shape[3] / samples.images.shape[2],
        "names": {"rows": samples.rows, "columns": columns, "rewards": rewards},
    }


def _runs(section: Section) -> pd.DataFrame:
    """Where every row's runs come from: a line a run."""
    columns = ["row", "seed", "run", "config_hash", "updates", "revision", "dirty", "hardware", "status"]
    last = section.rows.sort_values(["row", "seed", "budget"]).drop_duplicates(["row", "seed"], keep="last")
    return last[columns].assign(dirty=last["dirty"].map({True: "yes", False: "no"}).fillna("unknown"))
