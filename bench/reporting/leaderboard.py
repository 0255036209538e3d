"""What a table of one setting says, whatever it is printed as: rows, columns, intervals, marks, notes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from bench.prompts import SPLITS
from bench.registry import BUILT_IN
from bench.reporting.budgets import COSTS, GAINS, KL, TEST, VALIDATION, Draws, Missing, at, draws, nobody, with_costs
from bench.reporting.efficiency import EFFICIENCY, note, with_efficiency
from bench.reporting.frontier import Frontier
from bench.reporting.standings import Standing, standings, whole_of
from bench.reporting.statistics import FEW, MANY
from bench.reporting.summary import Spread, floors, has_seeds, is_robust, learners, priors, spreads, summary

ARROWS = {"higher": "↑", "lower": "↓", "none": ""}
DETAILS = ("/early", "/late", "/importance", "/floor", "/recall")  # parts and second opinions of a metric
NO_SPACES = {*SPLITS, "mean", "spread"}  # what else follows a metric's name
DRAWN = ("path_kl_steps/", "reward_prompts/")  # a row for every step or prompt: figures show them, tables do not
# What a table shows by default: these metrics where there are values, in every feature space, then those of
# installed plugins, then the costs.
MEASURES = (
    *("tilt_sw2", "tilt_tv", "tilt_within", "target_sw2", "share_tv", "within_mode", "prior_nll"),
    *(*GAINS, VALIDATION, "fid_prior", "diversity", "diversity_dreamsim", "coverage"),
)
COSTLY = (KL, "NFE", "backward NFE", "reward calls", "reward gradients", "training time")
# what a narrow table leaves out before it leaves out costs
LATER = ("tilt_tv", "tilt_within", "share_tv", "within_mode", "prior_nll", "diversity_dreamsim", "coverage")
NARROW = 5  # its columns
COST_NAMES = tuple(name for name, _ in COSTS.values())
OVER_SEEDS = "over seeds, each with evaluation noise of its own"
OVER_TRAINING = "over seeds, of training alone: all share one draw of evaluation noise"
WITHIN = (
    "within the one evaluation: of the difference to the prior over the noise on training prompts, else over prompts, "
    "and over samples where there is one prompt; of a floor over its draws"
)


class Cell(NamedTuple):
    """A value and, where they are known, its interval and the paired difference to the prior with its own."""

    value: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    difference: float = float("nan")  # only where it says more than the value
    difference_low: float = float("nan")
    difference_high: float = float("nan")
    gap: float = float("nan")  # to the best of the column (see `selection.Standing`); a tie where its interval holds 0
    gap_low: float = float("nan")
    gap_high: float = float("nan")
    mark: str = ""  # "best" or "tie", of the column
    text: str = ""  # instead of a value, or behind it
    from_prior: bool = False  # interpolated between the prior and a first evaluation


class Line(NamedTuple):
    """A row of a table; n: the runs behind it, in words; few: whether intervals rest on hardly any."""

    name: str
    cells: tuple[Cell, ...]
    n: str = ""
    few: bool = False

    @property
    def runs(self) -> str:
        """`n` as a table prints it."""
        return f"{self.n} †" if self.few else self.n


@dataclass(frozen=True)
class Board:
    """A table: `columns` are metrics, `headings` what stands above them; prior and floor come first among `lines`.

    lead: what a reader must know before the numbers; answers: what they say (see `bench.reporting.answers`); of: what
    lines are.
    """

    title: str
    columns: tuple[str, ...]
    headings: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    lead: str = ""
    answers: tuple[str, ...] = ()
    of: str = "method"


def selected(rows: pd.DataFrame, metrics: Sequence[str] | None = None, every: bool = False) -> list[str]:
    """The metrics that tables and figures show of rows of a setting: those asked for, the default ones, or all."""
    if metrics:
        return list(metrics)
    names = list(dict.fromkeys(rows.loc[rows["value"].notna(), "metric"]))
    if every:
        return [*(name for name in names if not name.endswith("/floor") and not name.startswith(DRAWN)), *COST_NAMES]
    tuned_on = {VALIDATION} if TEST in names else set()  # where there are test prompts, it says nothing more
    names = [name for name in names if not name.endswith(DETAILS) and name not in tuned_on]
    plugins = [name for name in names if name.partition("/")[0] not in BUILT_IN["metrics"]]
    kinds = (*MEASURES, *plugins, *COSTLY)
    return [name for kind in kinds for name in [*names, *COST_NAMES] if name == kind or name.startswith(f"{kind}/")]


def narrow(columns: Sequence[str]) -> list[int]:
    """Places of the columns that matter first, `NARROW` of them, in their order: second opinions come last."""
    places = sorted(range(len(columns)), key=lambda i: columns[i].partition("/")[0] in LATER)
    return sorted(places[:NARROW])


def leaderboard(
    rows: pd.DataFrame,
    metrics: Sequence[str] | None = None,
    axis: str | None = None,
    limit: float = 0.0,
    title: str = "",
    every: bool = False,
    frontier: Frontier | None = None,
) -> Board:
    """The table of one setting, sorted by its first metric.

    rows: of `bench.reporting.selection.settings`; metrics, every: see `selected`; axis, limit: see
    `bench.reporting.budgets.at`. At an equal gain the columns leave out the gain's reward and hold all costs, of which
    the least is best.
    """
    trained = rows.loc[(rows["updates"] > 0) & (rows["status"] != "failed"), "row"].nunique()
    rows, missing, notes = at(rows, axis, limit)
    names = with_kl(selected(rows, metrics, every), metrics, frontier)
    rows, texts = with_efficiency(rows, frontier)
    if axis in GAINS and not metrics:
        names = [*(name for name in names if name not in (axis, *COST_NAMES)), *COST_NAMES]
    lead = nobody(missing, axis, limit, trained)
    if frontier is not None and EFFICIENCY in names:
        notes.append(note(frontier))
    return tabulate(rows, names, missing, notes, title, lead, "lower" if axis in GAINS else "none", texts)


def with_kl(names: list[str], metrics: Sequence[str] | None, frontier: Frontier | None) -> list[str]:
    """The names and, where nobody asked for others and the least KL is known, behind the KL how near to it a row is."""
    if metrics or frontier is None or KL not in names:
        return names
    place = names.index(KL) + 1
    return [*names[:place], EFFICIENCY, *names[place:]]


def tabulate(
    rows: pd.DataFrame,
    names: Sequence[str],
    missing: Mapping[str, Missing],
    notes: Sequence[str],
    title: str,
    lead: str,
    costs: str = "none",
    texts: Mapping[tuple[str, str], str] | None = None,
) -> Board:
    """The table of `names` of rows that were chosen; missing: row → why it has no values; costs: their direction.

    texts: (row, metric) → what stands there in the place of a value.
    """
    failed, rows = rows[rows["status"] == "failed"], rows[rows["status"] != "failed"]
    rows = with_costs(rows, costs)
    table, least, before = summary(rows), floors(rows), priors(rows)
    bounded = any(one.costs for one in missing.values())  # then nobody knows whose costs are least
    scatter = spreads(rows, table)
    marks = standings(rows, table, [name for name in names if not (bounded and name in COST_NAMES)], scatter)
    lines = []
    if not rows.empty:
        lines.append(Line("prior", tuple(_plain(before, name) for name in names)))
    if any(name in least.index for name in names):
        lines.append(Line("sampling floor", tuple(_plain(least, name) for name in names)))
    broken, runs = failed.groupby("row")["seed"].nunique(), rows.groupby("row")["seed"].nunique()
    failures = {name: f", {n} failed" for name, n in broken.items()}
    selecting, entries = draws(rows), table.to_dict("index")
    for name in ranked(rows, table, names):
        own = {metric: text for (row, metric), text in (texts or {}).items() if row == name}
        if name in selecting:
            spent = {"NFE": selecting[name].nfe, "reward calls": selecting[name].calls}
            own |= {metric: f"{count:,} per sample" for metric, count in spent.items()}
        cells = tuple(
            Cell(text=own[metric])
            if metric in own
            else _cell(entries.get((name, metric)), runs[name], marks.get((name, metric)))
            for metric in names
        )
        lines.append(Line(name, cells, f"{runs[name]}{failures.get(name, '')}", 1 < runs[name] < FEW))
    others = broken.index.difference([*rows["row"], *missing])
    for name, one in ({**missing} | dict.fromkeys(others, Missing("failed"))).items():
        bounds = (Cell(text=one.costs.get(metric, "")) for metric in names[1:])
        lines.append(Line(name, (Cell(text=one.why), *bounds), f"{one.runs}{failures.get(name, '')}"))
    notes = [*notes, *(_selection(name, one) for name, one in selecting.items())]
    notes += [f"{row['row']}, seed {row['seed']}, failed: {row['note']}" for row in failed.to_dict("records")]
    headings, space = _headings(rows, names)
    if space:
        notes.insert(0, f"Feature space: {space}.")
    if not rows.empty:
        notes[:0] = [meaning(rows, names), *_warnings(rows, table, names, lines, scatter)]
    notes = [note.replace(f"/{space}", "") if space else note for note in notes]
    return Board(title, tuple(names), headings, tuple(lines), tuple(notes), lead)


def _selection(name: str, cost: Draws) -> str:
    bound = "" if math.isnan(cost.kl) else " In the place of a path_kl stands a bound of the KL of its samples (≤)."
    return (
        f"{name} trains nothing and spends as it samples: a finished sample is one of {cost.n} draws and takes "
        f"{cost.nfe:,} NFE and {cost.calls} reward calls; of a trained model it takes {cost.nfe // cost.n:,} NFE and "
        f"no reward call.{bound}"
    )


def meaning(rows: pd.DataFrame, names: Sequence[str]) -> str:
    """What numbers, brackets and marks are, in one note."""
    if not has_seeds(rows):
        centre, kind = "Values of one run each", WITHIN
    else:
        robust = is_robust(rows).reindex(names).dropna()
        supports = rows.drop_duplicates("metric").set_index("metric")["support"].reindex(robust.index)
        means = [name for name, kind in robust.items() if not kind]
        centre = "Means over seeds, intervals by Student's t"
        if len(means) < len(robust):
            centre = "Interquartile means over seeds, intervals by bootstrap"
            if means:
                centre += f" (means and Student's t where a row has under {MANY} values: {', '.join(means)})"
        for kind, scale in (("positive", "of logarithms"), ("share", "on the scale of logits")):
            if own := [name for name in means if supports[name] == kind]:
                centre += f"; {scale}: {', '.join(own)}"
        seeds = {json.loads(text).get("evaluation.seed") for text in rows["settings"].unique()}
        kind = OVER_SEEDS if seeds == {None} else OVER_TRAINING
    return (
        f"{centre}. Square brackets: 95 % {kind}. Round brackets: paired difference to the prior on the same noise. "
        "Marked are the best of a column (★ or bold) and what does not differ significantly from it (≈)."
    )


def _warnings(
    rows: pd.DataFrame,
    table: pd.DataFrame,
    names: Sequence[str],
    lines: Sequence[Line],
    scatter: Mapping[str, Spread],
) -> list[str]:
    """Notes that keep numbers of the table from saying more than they do."""
    notes = []
    if any(line.few for line in lines):
        notes.append(
            f"† Fewer than {FEW} runs, too few to show how they scatter: the interval holds as far as values (of a "
            "positive metric their logarithms) are normal."
        )
    shown = rows[rows["metric"].isin(names)]
    first = shown[shown["direction"] != "none"].drop_duplicates("metric").set_index("metric")
    if limited := list(first.index[first["prior_is_best"]]):
        learned, half = learners(rows, table)
        trained = rows.loc[rows["method"] != "prior", "row"].unique()
        who = "all rows" if set(learned) == set(trained) else ", ".join(sorted(learned)) or "no row"
        reached = f" ({half:+.3g})" if half > 0 else ""
        notes.append(
            f"At {', '.join(limited)} the prior is best, so doing nothing would win: values beyond the prior's count "
            "as equal to it, and marked are only rows with at least half the best gain of the training "
            f"reward{reached}: {who}."
        )
    for metric, spread in scatter.items():
        if metric in names and spread.hides:
            notes.append(
                f"{metric}: 95 % of its floors fall between {spread.low:.3g} and {spread.high:.3g}, as far apart as "
                f"the rows compared ({spread.apart:.3g}): nothing is marked, and it says nothing without more samples."
            )
    parts = {whole: [name for name in names if whole_of(name) == whole] for whole in names}
    for whole, own in ((whole, own) for whole, own in parts.items() if own):
        notes.append(f"{', '.join(own)}: of {whole} a part alone, and marked only in rows that are marked there.")
    for metric, own in shown.groupby("metric", sort=False)["note"]:
        if own.nunique() == 1 and own.iloc[0]:
            notes.append(f"{metric}: {own.iloc[0]}.")
    return notes


def ranked(rows: pd.DataFrame, table: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """The table's rows but for the prior's, the best by the first metric first, those without a value of it last."""
    directions = rows.drop_duplicates("metric").set_index("metric")["direction"]
    names = table.index.get_level_values("row").unique().difference(rows.loc[rows["method"] == "prior", "row"])
    key = next((name for name in metrics if name in directions.index), None)
    if key is None:
        return sorted(names)
    values = table["value"].xs(key, level="metric")
    values = values[values.index.isin(names)].sort_values(ascending=directions[key] != "higher", kind="stable")
    return [*values.index, *sorted(names.difference(values.index))]


def heading(row: Mapping[str, Any]) -> str:
    """A metric's name, unit, and the direction that is better."""
    unit = f" [{row['unit']}]" if row["unit"] else ""
    return f"{row['metric']}{unit} {ARROWS[row['direction']]}".rstrip()


def _headings(rows: pd.DataFrame, names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """What stands above columns, and the feature space left out there because all that have one share it."""
    parts = {name.split("/")[1] for name in names if "/" in name and not name.startswith("reward/")}
    spaces = {part for part in parts if f"/{part}" not in DETAILS and part not in NO_SPACES}
    space = spaces.pop() if len(spaces) == 1 else ""
    titles = {row["metric"]: heading(row) for row in rows.drop_duplicates("metric").to_dict("records")}
    headings = (titles.get(name, name) for name in names)
    return tuple(title.replace(f"/{space}", "", 1) if space else title for title in headings), space


def _plain(table: pd.DataFrame, name: str) -> Cell:
    return Cell(*table.loc[name, ["value", "value_low", "value_high"]]) if name in table.index else Cell()


def _cell(entry: Mapping[str, Any] | None, runs: int, standing: Standing | None) -> Cell:
    """entry: of the `summary`."""
    if entry is None:
        return Cell()
    text = f"{entry['seeds']} of {runs} seeds" if entry["seeds"] != runs else ""
    ends = entry["value"], entry["value_low"], entry["value_high"]
    cell = Cell(*ends, text=text, from_prior=bool(entry["from_prior"]))
    if standing:
        cell = cell._replace(**standing._asdict())
    if not entry["paired"]:
        return cell
    return cell._replace(**{end: entry[end] for end in ("difference", "difference_low", "difference_high")})
