"""Comparing finished runs: tables, figures, and the folder that holds both."""

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from bench.reporting.answers import answers
from bench.reporting.budgets import GAINS, at, common_gains, measured_gains, spelled
from bench.reporting.efficiency import with_efficiency
from bench.reporting.envelopes import Group, groups, table
from bench.reporting.figures.curves import plot_curves
from bench.reporting.figures.envelopes import plot_envelopes
from bench.reporting.figures.methods import plot_methods
from bench.reporting.figures.prompts import plot_prompts
from bench.reporting.figures.ranks import plot_ranks
from bench.reporting.figures.sheet import plot_sheet
from bench.reporting.figures.steps import plot_profiles, plot_steps
from bench.reporting.figures.trades import plot_checks, plot_trades
from bench.reporting.formats import latex, markdown, to_csv
from bench.reporting.frontier import Frontier, find
from bench.reporting.leaderboard import Board, Cell, Line, leaderboard, ranked, selected, with_kl
from bench.reporting.points import plot_points
from bench.reporting.ranking import measures
from bench.reporting.ranks import FEWEST, Ranks, ranks, ranks_table
from bench.reporting.samples import Samples, samples_of, write_samples
from bench.reporting.selection import failures, settings
from bench.reporting.statistics import improvement, over_seeds
from bench.reporting.summary import summary, without_levels
from bench.reporting.table import markdown_text


@dataclass(frozen=True)
class Question:
    """What is compared: which metrics, and at which costs or gains.

    axis: one of `bench.reporting.budgets.AXES`, or "gain": of every reward of GAINS that a setting has.
    """

    metrics: tuple[str, ...] = ()
    axis: str | None = None
    limits: tuple[float, ...] = (0.0,)
    every: bool = False


@dataclass(frozen=True)
class Section:
    """A setting: its rows, its tables, and the least KL at every gain, where it is known."""

    heading: str
    rows: pd.DataFrame
    boards: tuple[Board, ...]
    frontier: Frontier | None = None

    def samples(self) -> Samples | None:
        """Images of the table's rows, if any were kept."""
        return samples_of(self.rows, [line.name for line in self.boards[0].lines], self.heading)


def sections(frame: pd.DataFrame, question: Question, with_gains: bool = False) -> list[Section]:
    """A section for every setting of `frame` (see `bench.reporting.selection.collect`).

    with_gains: where no cost or gain was asked for, add tables at gains that the methods share.
    Raises ValueError where no row has a value of any of the question's metrics.
    """
    metrics = question.metrics
    if metrics and frame.loc[frame["metric"].isin(metrics), "value"].isna().all():
        measured = sorted(frame.loc[frame["value"].notna(), "metric"].unique())
        raise ValueError(f"no row has a value of {', '.join(metrics)}; there are {', '.join(measured)}")
    result: list[Section] = []
    for title, rows in settings(frame):
        rows, frontier = rows if question.every else without_levels(rows), find(rows)
        result.append(Section(title, rows, tuple(_boards(title, rows, question, with_gains, frontier)), frontier))
    return result


def _boards(
    title: str, rows: pd.DataFrame, question: Question, with_gains: bool, frontier: Frontier | None
) -> list[Board]:
    """The tables of a setting with what they say in sentences, some of which need the table at a gain, shown or not."""
    gains = measured_gains(rows)
    on = {name: f" on {GAINS[name]}" if len(gains) > 1 else "" for name in gains}

    def board(axis: str | None, limit: float) -> Board:
        place = f"a reward gain of {limit:+g}{on[axis]}" if axis in on else spelled(limit, axis) if axis else ""
        heading = f"{title}, at {place}" if place else title
        return leaderboard(rows, question.metrics, axis, limit, heading, question.every, frontier)

    def at_gain(axis: str, limit: float) -> Board:
        found = board(axis, limit)
        return replace(found, answers=answers(found, found, limit, on=on[axis]))

    if question.axis == "gain":
        return [at_gain(axis, limit) for axis in gains for limit in question.limits]
    main = [board(question.axis, limit) for limit in question.limits]
    common = {} if question.axis else {axis: common_gains(rows, axis) for axis in gains}
    first = next((axis for axis in gains if common.get(axis)), None)
    if first is None:
        return [replace(one, answers=answers(one)) for one in main]
    most = common[first][-1]
    hint = "" if with_gains else f"--at-reward-gain {most:g} has the table"
    said = answers(main[0], board(first, most), most, hint, on[first])
    equal = [at_gain(axis, limit) for axis, limits in common.items() for limit in limits] if with_gains else []
    return [replace(main[0], answers=said), *equal]


def scores(all_sections: Sequence[Section]) -> dict[str, dict[str, np.ndarray]]:
    """Method → setting → gains of its last evaluations over the best method's mean gain there: 0 is the prior, 1 that.

    A failed run leaves the prior, a gain of 0. Of the methods that are in all settings, as others were not asked the
    same; a setting in which nothing gains counts as none.
    """
    scored: dict[str, dict[str, np.ndarray]] = {}
    for section in all_sections:
        rows, _, _ = at(section.rows)
        headline = rows["metric"] == measured_gains(rows)[0]
        gains_of = rows[headline & rows["difference"].notna() & (rows["method"] != "prior")]
        best, failed = gains_of.groupby("row")["difference"].mean().max(), failures(section.rows)
        for name in dict.fromkeys([*gains_of["row"], *failed]) if best > 0 else ():
            gains = gains_of.loc[gains_of["row"] == name, "difference"].to_numpy() / best
            scored.setdefault(name, {})[section.heading] = np.append(gains, np.zeros(failed.get(name, 0)))
    every = set().union(*scored.values())
    return {name: tasks for name, tasks in scored.items() if tasks.keys() == every}


def across(scored: dict[str, dict[str, np.ndarray]]) -> Board | None:
    """The table over settings, of `scores`; None if there are fewer than two methods or settings."""
    count = max(map(len, scored.values()), default=0)
    if count < 2 or len(scored) < 2:
        return None
    means = {name: np.array([task.mean() for task in tasks.values()]) for name, tasks in scored.items()}
    order = sorted(scored, key=lambda name: -means[name].mean())
    lines = []
    for name in order:
        centre, low, high = over_seeds([means[name]])[0]
        pairs = [(scored[order[0]][task], scored[name][task]) for task in scored[name]]
        beaten = Cell(*improvement(pairs)) if name != order[0] else Cell(text="–")
        n = sum(map(len, scored[name].values()))
        lines.append(Line(name, (Cell(centre, low, high), beaten), f"{n} runs, {count} settings"))
    columns = "normalised gain ↑", f"P({order[0]} better)"
    notes = (
        "Normalised gain: of the last evaluations, over the best method's mean gain in the setting, 0 of a failed run; "
        "the mean over settings with Student's interval over them. Probability that a run of the first row gains more "
        "than one of the row, settings counted equally; Newcombe's interval, 95 %.",
    )
    return Board("All settings", columns, columns, tuple(lines), notes)


def ranked_over(all_sections: Sequence[Section]) -> tuple[Ranks, Board] | None:
    """Mean ranks by the distance to the target, where it is known, else by the gain; None if there is too little."""
    values, used = {}, {}
    for section in all_sections:
        rows, _, _ = at(section.rows)
        rows = rows[(rows["status"] != "failed") & (rows["method"] != "prior") & rows["value"].notna()]
        if metric := next(iter(measures(rows)), None):
            own, failed = summary(rows).xs(metric, level="metric"), pd.Series(failures(section.rows), dtype=float)
            nearer = rows.loc[rows["metric"] == metric, "prior"].mean() - own["value"]
            better = own["difference"] if metric in GAINS else nearer
            done = own["seeds"] / (own["seeds"] + failed.reindex(own.index, fill_value=0))
            gone = 0.0 * failed[~failed.index.isin(own.index)]  # what failed leaves the prior, which is 0 better
            values[section.heading] = pd.concat([better * done, gone])
            used[section.heading] = metric
    every = pd.DataFrame(values)
    scored = every.dropna()
    if len(scored) < FEWEST or len(values) < 2:
        return None
    found, left = ranks(scored), every[every.isna().any(axis=1)]
    partly = {str(name): int(count) for name, count in left.notna().sum(axis=1).items()}
    return found, ranks_table(found, used, partly)


class Report(NamedTuple):
    """Settings, and what is said over several of them.

    scores: of `scores`; gains: their table; ranked: mean ranks and their table; envelopes: methods with several
    configurations over all their tables, and the table that compares them.
    """

    sections: list[Section]
    scores: dict[str, dict[str, np.ndarray]]
    gains: Board | None
    ranked: tuple[Ranks, Board] | None
    envelopes: list[tuple[Group, Board]]

    @property
    def over(self) -> list[Board]:
        """The tables over all settings."""
        return [board for board in (self.gains, self.ranked and self.ranked[1]) if board]

    @property
    def boards(self) -> list[Board]:
        """All tables: of every setting, over settings, of envelopes."""
        own = [board for section in self.sections for board in section.boards]
        return [*own, *self.over, *(board for _, board in self.envelopes)]


def compared(frame: pd.DataFrame, question: Question, with_gains: bool = False) -> Report:
    """The report on `frame`; arguments and errors are those of `sections`."""
    found = sections(frame, question, with_gains)
    scored = scores(found)
    several = groups(pd.concat([section.rows for section in found]))
    return Report(found, scored, across(scored), ranked_over(found), [(group, table(group)) for group in several])


def text(report: Report, left_out: Sequence[str], figures: Sequence[Sequence[str]] = ()) -> str:
    """Markdown: every setting with its tables, its figures if there are names of some, and what was left out."""
    parts = []
    for i, section in enumerate(report.sections):
        for board in section.boards:
            parts.append(f"### {markdown_text(board.title)}\n\n{markdown(board)}")
        heading = re.sub(r"(?<!\\)[\[\]]", r"\\\g<0>", markdown_text(section.heading))
        parts += [f"![{name.split('-')[0]}: {heading}]({name})\n" for name in (figures[i] if figures else ())]
    if report.gains:
        parts.append(f"### {report.gains.title}\n\n{markdown(report.gains)}")
        parts += ["![performance profiles](profiles.png)\n"] * bool(figures)
    if report.ranked:
        parts.append(f"### {report.ranked[1].title}\n\n{markdown(report.ranked[1])}")
        parts += ["![mean ranks](ranks.png)\n"] * bool(figures)
    for number, (_, board) in enumerate(report.envelopes):
        parts.append(f"### {markdown_text(board.title)}\n\n{markdown(board)}")
        parts += [f"![envelopes](envelopes-{number}.png)\n"] * bool(figures)
    if left_out:
        parts.append("Left out:\n\n" + "\n".join(f"- {markdown_text(sentence)}" for sentence in left_out) + "\n")
    return "\n".join(parts)


def write_report(out: Path, frame: pd.DataFrame, left_out: Sequence[str], question: Question) -> Path:
    """Write `report.md`, the same tables as `report.csv` and `report.tex`, and the figures to `out`.

    The same rows give the same bytes, in any folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    report = compared(frame, question, with_gains=True)
    figures = [_figures(section, question, out, number) for number, section in enumerate(report.sections)]
    if report.gains:
        plot_profiles(report.scores, out / "profiles.png", "Performance profiles over all settings")
    if report.ranked:
        plot_ranks(report.ranked[0], out / "ranks.png", "Mean ranks over all settings")
    for number, (group, _) in enumerate(report.envelopes):
        plot_envelopes(group, out / f"envelopes-{number}.png")
    page = out / "report.md"
    page.write_text(text(report, left_out, figures), encoding="utf8")
    (out / "report.csv").write_text(to_csv(report.boards), encoding="utf8")
    (out / "report.tex").write_text("\n".join(map(latex, report.boards)), encoding="utf8")
    return page


def _figures(section: Section, question: Question, out: Path, number: int) -> list[str]:
    """Names of the figures of one setting, drawn to `out`, of the rows and metrics of its first table."""
    axis = measured_gains(section.rows)[0] if question.axis == "gain" else question.axis
    chosen, _, _ = at(section.rows, axis, question.limits[0])
    chosen, _ = with_efficiency(chosen, section.frontier)
    values = chosen[chosen["value"].notna() & (chosen["status"] != "failed")]
    drawable = values[values["method"] != "prior"]
    names = with_kl(selected(values, question.metrics, question.every), question.metrics, section.frontier)
    panels = [name for name in dict.fromkeys(names) if name in set(drawable["metric"])]
    if not panels:
        return []
    drawn = []

    def path(kind: str) -> Path:
        drawn.append(f"{kind}-{number}.png")
        return out / drawn[-1]

    plot_methods(values, panels, path("methods"), section.heading)
    rows = section.rows[(section.rows["status"] != "failed") & section.rows["value"].notna()]
    order = ranked(values, summary(values), panels)
    if (rows[rows["row"].isin(order)].groupby(["row", "seed"])["budget"].nunique() > 1).any():
        trained = rows[rows["updates"] > 0]
        for metric in dict.fromkeys([panels[0], *(name for name in GAINS if name in panels)]):
            plot_curves(
                trained, metric, path(f"curves-{re.sub(r'[^A-Za-z0-9_.]+', '-', metric)[:60]}"), order, section.heading
            )
    trades = path("trades")
    if not plot_trades(rows, panels, trades, order, section.heading, section.frontier):
        drawn.remove(trades.name)
    checks = path("checks")
    if not plot_checks(rows, checks, order, section.heading):
        drawn.remove(checks.name)
    for kind, plot in {"path_kl_steps": plot_steps, "reward_prompts": plot_prompts}.items():
        if drawable["metric"].str.startswith(f"{kind}/").any():
            plot(drawable, path(kind), order, section.heading)
    if samples := section.samples():
        write_samples(samples, section.heading, out / f"samples-{number}")
        plot_sheet(samples, path("sheet"), f"{section.heading}: same prompts, same noise")
    if points := points_of(values, order):
        plot_points(*points, path("points"), section.heading)
    return drawn


def points_of(rows: pd.DataFrame, order: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray] | None:
    """Samples by name, density and extent, of every row's first seed that left its points; None if none did."""
    panels: dict[str, np.ndarray] = {}
    target: tuple[np.ndarray, np.ndarray] | None = None
    rows = rows[[Path(path).name == "rows.parquet" for path in rows["source"]]]  # points are those of the end
    for name in order:
        for source, run in rows[rows["row"] == name].sort_values("seed").groupby("source", sort=False):
            try:
                data = dict(np.load(Path(source).with_name("points.npz")))
            except (OSError, ValueError, zipfile.BadZipFile):  # not there, or not whole
                continue
            target = target or (data["density"], data["extent"])
            panels = panels or {"target": data["target"], "prior": data["prior"]}
            seed = f"{name}\nseed {run['seed'].iloc[0]}"
            error = run.loc[run["metric"] == "tilt_sw2", "value"]
            panels[seed if error.empty else f"{seed}, SW2 {error.iloc[0]:.3f}"] = data["finetuned"]
            break
    return (panels, *target) if target else None
