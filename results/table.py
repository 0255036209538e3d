"""Tables: one run against its prior, and several runs against one another."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from results.rows import comparable

Rows = pd.DataFrame | Iterable[Mapping[str, Any]]

ARROWS = {"higher": "↑", "lower": "↓", "none": ""}
# The prior column of these is the prior against itself on other noise.
FLOORED = ("fid_prior", "fid_prior_per_prompt", "kid_prior")
HEADINGS = ("metric", "prior", "finetuned", "difference ± s.e.", "n", "note")
SETTING = ("reward", "beta", "model", "prompts", "evaluation", "budget_unit")


def number(value: float | None, sign: bool = False) -> str:
    """Four significant digits, without an exponent where one can be avoided; a dash for a missing value."""
    if value is None or pd.isna(value):
        return "–"
    digits = f"{value:+.4g}" if sign else f"{value:.4g}"
    return digits if "e" not in digits or abs(value) < 1 else f"{value:+,.0f}" if sign else f"{value:,.0f}"


def with_error(value: float | None, error: float | None, sign: bool = False) -> str:
    """`value ± error`, the error with two significant digits and the value to the same decimal place."""
    if any(x is None or pd.isna(x) for x in (value, error)) or error <= 1e-12 * abs(value):
        return number(value, sign)
    decimals = max(0, 1 - int(f"{error:e}".split("e")[1]))
    return f"{value:{'+' if sign else ''},.{decimals}f} ± {error:,.{decimals}f}"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The row's text under each of HEADINGS."""
    return (
        _heading(row),
        _prior_cell(row["metric"], row["prior"]),
        number(row["value"]),
        with_error(row["difference"], row["standard_error"], sign=True),
        str(row["n"]),
        row["note"],
    )


def _heading(row: Mapping[str, Any]) -> str:
    unit = f" [{row['unit']}]" if row["unit"] else ""
    return f"{row['metric']}{unit} {ARROWS[row['direction']]}".rstrip()


def _prior_cell(metric: str, value: float | None) -> str:
    return number(value) + (" (floor)" if metric.split("/")[0] in FLOORED else "")


def _records(rows: Rows) -> list[Mapping[str, Any]]:
    return rows.to_dict("records") if isinstance(rows, pd.DataFrame) else list(rows)


def run_table(rows: Rows) -> Table:
    """The end of a run, for the terminal: a line per metric, notes below. The arrow says which direction is better."""
    table = Table(*HEADINGS[:-1], box=box.SIMPLE_HEAD, caption_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    notes, floored = [], False
    for row in _records(rows):
        gained = {"higher": 1, "lower": -1, "none": 0}[row["direction"]] * (row["difference"] or 0)
        clear = row["standard_error"] and abs(gained) > 2 * row["standard_error"]
        heading, prior, *rest, note = _cells(row)
        if len(heading) > 28:  # what 80 columns leave
            heading = heading.replace("/", "/\n  ", 1)
        floored |= prior.endswith(" (floor)")
        *cells, note = map(Text, (heading, prior.replace(" (floor)", "*"), *rest, note))
        if clear:
            cells[3].stylize("green" if gained > 0 else "red")
        table.add_row(*cells)
        if note:
            notes.append(f"{row['metric']}: {note}")
    if floored:
        notes.insert(0, "* the floor: the prior against itself on other noise")
    table.caption = Text("\n".join(notes))
    return table


def markdown_table(rows: Rows) -> str:
    """The same table in Markdown."""
    return _markdown(HEADINGS, [_cells(row) for row in _records(rows)])


def floors(frame: pd.DataFrame) -> dict[str, float]:
    """Metric → its sampling floor, where rows named `<metric>/floor` hold one."""
    own = frame[frame["metric"].str.endswith("/floor") & frame["value"].notna()]
    return own.groupby(own["metric"].str.removesuffix("/floor"))["value"].mean().to_dict()


def comparison_markdown(frame: pd.DataFrame, metrics: Sequence[str] | None = None) -> str:
    """Methods as rows, metrics as columns, from rows of several runs in one setting.

    A cell holds the value and, in brackets, the paired difference to the prior ± its standard error; over several
    seeds it is the mean ± the standard error over seeds. The first row is the prior (for distances to the
    prior, the floor); where metrics have a sampling floor (`<metric>/floor`), the second row is that. A run counts at
    its largest budget. Metrics default to all that any run has a value of; the first sorts the methods, best on top.
    Raises ValueError if the rows mix settings or versions of a metric, or hold none of the metrics.
    """
    frame = comparable(frame)
    for name in SETTING:
        if frame[name].nunique() > 1:
            raise ValueError(f"a comparison needs one {name}, the rows hold {sorted(frame[name].unique())}")
    frame = frame[frame["budget"] == frame.groupby("run")["budget"].transform("max")]
    failed = sorted(set(frame.loc[frame["status"] == "failed", "method"]))
    frame = frame[frame["value"].notna() & (frame["status"] != "failed")]
    least = floors(frame)
    if metrics is None:
        metrics = [name for name in dict.fromkeys(frame["metric"]) if not name.endswith("/floor")]
    frame = frame[frame["metric"].isin(metrics)]
    if frame.empty:
        raise ValueError(f"no row has a value of {', '.join(metrics) or 'any metric'}")
    mixed = frame.groupby("metric")[["metric_version", "n"]].nunique().max(axis=1)
    if (mixed > 1).any():
        names = ", ".join(mixed.index[mixed > 1])
        raise ValueError(f"rows of different versions or sample counts of {names}: name the metrics to compare")
    titles = {row["metric"]: _heading(row) for row in frame.to_dict("records")}
    headings = ("method", *(titles.get(name, name) for name in metrics), "updates", "reward calls", "time", "seeds")
    priors = frame.groupby("metric")["prior"].mean()
    lines = [("prior", *(_prior_cell(name, priors.get(name)) for name in metrics), "", "", "", "")]
    if any(name in least for name in metrics):
        lines.append(("sampling floor", *(number(least[n]) if n in least else "" for n in metrics), "", "", "", ""))
    leading = frame[frame["metric"] == next(name for name in metrics if name in titles)]
    means = leading.groupby("method")["value"].mean().sort_values(ascending=leading["direction"].iloc[0] == "lower")
    for method in [*means.index, *sorted(set(frame["method"]) - set(means.index))]:
        if method == "prior":
            continue
        own = frame[frame["method"] == method]
        runs = own.drop_duplicates("run")
        cells = [_comparison_cell(own[own["metric"] == name]) for name in metrics]
        updates = " / ".join(f"{count:,}" for count in sorted(set(runs["updates"])))
        calls = number(runs["reward_calls"].mean())
        time = _minutes(runs["wall_seconds"].mean())
        lines.append((method, *cells, updates, calls, time, str(runs["seed"].nunique())))
    lines += [(method, *("failed" for _ in metrics), "", "", "", "") for method in failed]
    return _markdown(headings, lines)


def _comparison_cell(own: pd.DataFrame) -> str:
    if own.empty:
        return "–"
    value, difference = own["value"].mean(), own["difference"].mean()
    if len(own) > 1 and own["prior"].nunique() == 1:  # the prior's row says the rest
        return with_error(value, own["value"].sem())
    error = own["difference"].sem() if len(own) > 1 else own["standard_error"].iloc[0]
    if difference == value:  # the prior's is zero by definition
        return with_error(value, error)
    if pd.isna(difference) or pd.isna(error):
        return number(value)
    return f"{number(value)} ({with_error(difference, error, sign=True)})"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    text = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in text) + "\n"
