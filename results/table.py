"""Tables: one run against its prior, and several runs against one another."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import scipy.stats
from rich import box
from rich.table import Table
from rich.text import Text

from results.selection import floors, has_seeds, priors, summary

Rows = pd.DataFrame | Iterable[Mapping[str, Any]]

ARROWS = {"higher": "↑", "lower": "↓", "none": ""}
HEADINGS = ("metric", "prior", "finetuned", "difference ± s.e.", "n")
CONFIDENCE = 0.95  # a difference is coloured where its interval, by Student's t, leaves out zero
OVER_SEEDS = "± is the standard error over seeds, each with evaluation noise of its own"
OVER_TRAINING = "± is the standard error over seeds, of training alone: all share one draw of evaluation noise"
WITHIN = (
    "± is the standard error within the one evaluation: of the difference to the prior over the noise on training "
    "prompts, else over prompts, and over samples where there is one prompt; of a floor, the deviation of its draws"
)


def number(value: float | None, sign: bool = False) -> str:
    """Four significant digits, without an exponent where one can be avoided; a dash for a missing value."""
    if value is None or pd.isna(value):
        return "–"
    value = value + 0.0  # no negative zero
    digits = f"{value:+.4g}" if sign else f"{value:.4g}"
    return digits if "e" not in digits or abs(value) < 1 else f"{value:+,.0f}" if sign else f"{value:,.0f}"


def with_error(value: float | None, error: float | None, sign: bool = False) -> str:
    """`value ± error`, the error with two significant digits and the value to the same decimal place."""
    if any(x is None or pd.isna(x) for x in (value, error)):
        return number(value, sign)
    if error <= 1e-12 * abs(value):
        return f"{number(value, sign)} ± 0"
    decimals = max(0, 1 - int(f"{error:e}".split("e")[1]))
    return f"{value:{'+' if sign else ''},.{decimals}f} ± {error:,.{decimals}f}"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The row's text under each of HEADINGS."""
    return (
        _heading(row),
        number(row["prior"]),
        number(row["value"]) if row["prior"] is not None and pd.notna(row["prior"]) else _alone(row),
        with_error(row["difference"], row["standard_error"], sign=True),
        str(row["n"]),
    )


def _heading(row: Mapping[str, Any]) -> str:
    unit = f" [{row['unit']}]" if row["unit"] else ""
    return f"{row['metric']}{unit} {ARROWS[row['direction']]}".rstrip()


def _alone(row: Mapping[str, Any]) -> str:
    """A value that is compared with nothing, a floor for one, carries its error itself."""
    return with_error(row["value"], row["standard_error"])


def is_clear(row: Mapping[str, Any]) -> bool:
    """Whether the difference's interval by Student's t, for as many prompts or samples as there were, leaves out zero.

    Two standard errors would do so by chance in one of nine cases with four prompts.
    """
    difference, error, degrees = (row[name] for name in ("difference", "standard_error", "degrees"))
    if any(x is None or pd.isna(x) for x in (difference, error, degrees)) or degrees <= 0:
        return False
    return abs(difference) > scipy.stats.t.ppf((1 + CONFIDENCE) / 2, degrees) * error


def _records(rows: Rows) -> list[Mapping[str, Any]]:
    return rows.to_dict("records") if isinstance(rows, pd.DataFrame) else list(rows)


def run_table(rows: Rows) -> Table:
    """The end of a run, for the terminal: a line per metric, notes below. The arrow says which direction is better."""
    table = Table(*HEADINGS, box=box.SIMPLE_HEAD, caption_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    notes = []
    for row in _records(rows):
        sign = {"higher": 1, "lower": -1, "none": 0}[row["direction"]]
        heading, *rest = _cells(row)
        if len(heading) > 28:  # what 80 columns leave
            heading = heading.replace("/", "/\n  ", 1)
        cells = [Text(cell) for cell in (heading, *rest)]
        if sign and is_clear(row):
            cells[3].stylize("green" if sign * row["difference"] > 0 else "red")
        table.add_row(*cells)
        if row["note"]:
            notes.append(f"{row['metric']}: {row['note']}")
    table.caption = Text("\n".join(notes))
    return table


def run_markdown(rows: Rows) -> str:
    """The same as Markdown, without the notes."""
    return _markdown(HEADINGS, map(_cells, _records(rows)))


def comparison_markdown(rows: pd.DataFrame, metrics: Sequence[str] | None = None) -> str:
    """Configurations as rows, metrics as columns, and below what ± means and which runs failed.

    rows: of one setting, as `results.selection.at_cost` chose them. A cell holds the value and, in brackets, the paired
    difference to the prior. The first row is the prior; where metrics have a sampling floor (`<metric>/floor`), the
    second row is that. Metrics default to all that any run has a value of; the first sorts the rows, best on top.
    """
    failed, rows = rows[rows["status"] == "failed"], rows[rows["status"] != "failed"]
    measured = rows.loc[rows["value"].notna(), "metric"].unique()
    names = [name for name in measured if not name.endswith("/floor")] if metrics is None else metrics
    found, least, before = summary(rows), floors(rows), priors(rows)
    titles = {row["metric"]: _heading(row) for row in rows.drop_duplicates("metric").to_dict("records")}
    costs = ("updates", "reward calls", "network rows, forward + backward", "training time", "seeds")
    headings = ("method", *(titles.get(name, name) for name in names), *costs)
    empty = ("",) * len(costs)
    lines: list[tuple[str, ...]] = []
    if not rows.empty:
        lines.append(("prior", *(_plain(before, name) for name in names), *empty))
    if any(name in least.index for name in names):
        cells = (_plain(least, name) if name in least.index else "" for name in names)
        lines.append(("sampling floor", *cells, *empty))
    broken = failed.groupby("row")["seed"].nunique()
    for name in ranked(rows, found, names):
        own = rows[rows["row"] == name].drop_duplicates("seed")
        seeds = f"{len(own)}, {broken[name]} failed" if name in broken.index else str(len(own))
        cells = (_comparison_cell(found, name, metric, len(own)) for metric in names)
        lines.append((name, *cells, *_costs(own), seeds))
    for name in broken.index.difference(rows["row"]):
        lines.append((name, *("failed" for _ in names), *empty[1:], f"0, {broken[name]} failed"))
    notes = [f"{row['row']}, seed {row['seed']}, failed: {row['note']}" for row in failed.to_dict("records")]
    if not rows.empty:
        notes.insert(0, f"{meaning(rows)}.")
    return _markdown(headings, lines) + "".join(f"\n{note}\n" for note in notes)


def meaning(rows: pd.DataFrame) -> str:
    """What ± and the bars of a figure are, for rows of one table."""
    if not has_seeds(rows):
        return WITHIN
    seeds = {json.loads(text).get("evaluation.seed") for text in rows["settings"].unique()}
    return OVER_SEEDS if seeds == {None} else OVER_TRAINING


def ranked(rows: pd.DataFrame, found: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """The table's rows but for the prior's, the best by the first metric first, those without a value of it last."""
    directions = rows.drop_duplicates("metric").set_index("metric")["direction"]
    names = found.index.get_level_values("row").unique().difference(rows.loc[rows["method"] == "prior", "row"])
    key = next((name for name in metrics if name in directions.index), None)
    if key is None:
        return sorted(names)
    values = found["value"].xs(key, level="metric")
    values = values[values.index.isin(names)].sort_values(ascending=directions[key] == "lower", kind="stable")
    return [*values.index, *sorted(names.difference(values.index))]


def _plain(found: pd.DataFrame, name: str) -> str:
    return with_error(found["value"].get(name), found["value_error"].get(name))


def _comparison_cell(found: pd.DataFrame, name: str, metric: str, seeds: int) -> str:
    if (name, metric) not in found.index:
        return "–"
    cell = found.loc[name, metric]
    text = with_error(cell["value"], cell["value_error"])
    if cell["paired"]:
        text += f" ({with_error(cell['difference'], cell['difference_error'], sign=True)})"
    return text if cell["seeds"] == seeds else f"{text} [{cell['seeds']} of {seeds} seeds]"


def _costs(runs: pd.DataFrame) -> tuple[str, ...]:
    updates = " / ".join(f"{count:,}" for count in sorted(set(runs["updates"])))
    names = ("reward_calls", "network_forwards", "network_backwards")
    calls, forwards, backwards = (f"{runs[name].mean():,.0f}" for name in names)
    return updates, calls, f"{forwards} + {backwards}", _minutes(runs["train_seconds"].mean())


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    text = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in text) + "\n"
