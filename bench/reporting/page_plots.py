"""The plots of the page, drawn by Plotly, with hover and several views."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd

from bench.reporting.budgets import AXES, COSTS, KL, measured_gains
from bench.reporting.envelopes import Group, curves, ratios, reference
from bench.reporting.figures.looks import Look, families, looks
from bench.reporting.figures.scales import Scale, gains, is_positive, lines_of, scale_of
from bench.reporting.figures.trades import SHOWN as NEEDED
from bench.reporting.figures.trades import SOFT, Trade, curve_of, trades_of
from bench.reporting.frontier import ENOUGH, EVERY
from bench.reporting.ranks import Ranks
from bench.reporting.report import Section
from bench.reporting.statistics import student

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


def plots_of(section: Section) -> list[Plot]:
    """The reward's gain against each cost with bands, and each metric against the reward, of the table's rows."""
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
    axes = {
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
    return plots + ([_plot(f"Against {of}:", lines, axes, order, known)] if lines else [])


def envelope_plot(group: Group) -> Plot:
    """The least KL of every method at every gain, and its ratio to the least of them."""
    lines = {"the KL": curves(group), "its ratio": ratios(group)}
    views = {
        view: {name: (line["gain"], line["value"], line) for name, line in own.items()}
        for view, own in lines.items()
        if own
    }
    titles = {"the KL": f"least {KL} [nats]", "its ratio": f"{KL} over that of {reference(group)}"}
    gain = {"title": {"text": html.escape(f"gain of {group.gained}")}, "type": "linear"}
    axes = {
        view: {"xaxis": gain, "yaxis": {"title": {"text": html.escape(titles[view])}, "type": "log"}} for view in views
    }
    known = {}
    if group.frontier is not None:
        least = group.frontier.curve(EVERY).iloc[1:]  # the first is no gain, at no KL
        known["the KL"] = [
            _still("least KL of all distributions", _short(least["gain"]), _short(least["kl"]), mode="lines")
        ]
    return _plot(f"Over all gains of {group.gained}:", views, axes, list(group.points), known)


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
