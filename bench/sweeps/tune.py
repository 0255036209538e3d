"""The `tune:` section of a sweep: the same trials for every method, one stated rule, the choice and its cost on file.

Trials are ordinary runs on a seed that the sweep's own runs do not have. The choice of a method stands in `tuned.yaml`
beside the names of its trials, which hold a hash of their settings: it is made again when those have changed. All that
a trial measured stands there too, so that what another rule would have chosen can be read off.
"""

import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field, model_validator

from bench.errors import BenchError, did_you_mean
from bench.options import Config, Distinct
from bench.reporting.statistics import student
from bench.runtime import yaml_text
from bench.runtime.files import write_atomic
from bench.settings import Seed

COST = ("updates", "reward_calls", "network_forwards", "network_backwards", "train_seconds", "wall_seconds")
FILE = "tuned.yaml"
Values = Annotated[list[Any], Field(min_length=1), Distinct]  # of a setting, in a grid


class Tune(Config):
    """How settings are chosen; `smallest` or `largest` and the bounds name metrics of a trial's last evaluation."""

    grid: dict[str, Values] = Field(min_length=1, description="setting → values; every combination is a trial")
    seed: Seed = Field(description="of the trials; none of the sweep's own")
    smallest: str | None = Field(None, description="the metric (column `metric` of the rows, its `value`) to minimise")
    largest: str | None = Field(None, description="or the one to maximise")
    at_most: dict[str, float] = Field({}, description="metric → bound that the chosen trial must keep")
    at_least: dict[str, float] = Field({}, description="the same from below")
    updates: int | None = Field(None, ge=1, description="of a trial; null: as many as the run has")
    set: dict[str, Any] = Field({}, description="further settings of trials, a cheaper evaluation for one")

    @model_validator(mode="after")
    def _one_rule(self) -> "Tune":
        if (self.smallest is None) == (self.largest is None):
            raise ValueError("name one metric, under smallest: or under largest:")
        if apart := [name for name, most in self.at_most.items() if self.at_least.get(name, most) > most]:
            raise ValueError(f"no trial can keep both bounds of {apart[0]}: at_least is above at_most")
        return self

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.smallest or self.largest or ""

    def metrics(self) -> list[str]:
        """All that the rule looks at."""
        return [*dict.fromkeys([self.metric, *self.at_most, *self.at_least])]

    def points(self) -> Iterator[dict[str, Any]]:
        """The values of every trial."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))

    def settings(self) -> dict[str, Any]:
        """What a trial's settings have apart from the run's: it is evaluated at its end only."""
        shorter = {} if self.updates is None else {"train.updates": self.updates}
        return {"evaluation.at": [], **shorter, **self.set}

    def rule(self) -> str:
        """The rule in words."""
        bounds = [f"{name} at most {bound:g}" for name, bound in self.at_most.items()]
        bounds += [f"{name} at least {bound:g}" for name, bound in self.at_least.items()]
        best = f"smallest {self.smallest}" if self.smallest else f"largest {self.largest}"
        return f"{best} of trials with {' and '.join(bounds)}" if bounds else best


def choose(tune: Tune, method: str, trials: Sequence[tuple[str, Mapping[str, Any], pd.DataFrame]]) -> dict[str, Any]:
    """The best of a method's trials (run, values, rows) by the rule, as an entry of `tuned.yaml`.

    Every metric of a trial's last evaluation is kept. A trial that failed or lacks a value is never chosen. Where none
    keeps the bounds it is the one nearest to them (by the sum of what is missing over the bounds' size), and `within`
    is false. Of equals the first in the grid. `ties` are the values of trials that keep the bounds as well and are not
    told apart from the chosen one by the evaluations' errors, added in squares (on the same noise the error of the
    difference is smaller).
    Raises BenchError where no trial has a value, or no row the metric.
    """
    records = []
    for run, values, rows in trials:
        last = rows[rows["budget"] == rows["budget"].max()]
        failed = last[last["status"] == "failed"]
        by_metric = dict(zip(last["metric"], last["value"], strict=True))
        record: dict[str, Any] = {"run": run, "values": dict(values)}
        if failed.empty and (missing := [name for name in tune.metrics() if name not in by_metric]):
            raise BenchError(f"tune: {run} measured no {missing[0]!r}{did_you_mean(missing[0], by_metric)}")
        for name in by_metric if failed.empty else tune.metrics():
            record[name] = _known(by_metric.get(name))
        if failed.empty:
            deciding = last[last["metric"] == tune.metric].iloc[0]
            record["interval"] = _known(deciding["standard_error"] * student(deciding["degrees"]))
        else:
            record["failed"] = failed["note"].iloc[0]
        records.append(record | {name: last[name].iloc[0].item() for name in COST})
    whole = [record for record in records if all(record[name] is not None for name in tune.metrics())]
    if not whole:
        why = records[0].get("failed", "their metrics were refused")
        raise BenchError(f"tune: no trial of {method} has a value to choose by ({why}): change the grid or the rule.")

    def excess(record: dict[str, Any]) -> float:
        over = [(record[name] - bound, bound) for name, bound in tune.at_most.items()]
        over += [(bound - record[name], bound) for name, bound in tune.at_least.items()]
        return sum(max(0.0, much) / (abs(bound) or 1.0) for much, bound in over)

    sign = 1 if tune.smallest else -1
    best = min(whole, key=lambda record: (excess(record), sign * record[tune.metric]))
    ties = [
        dict(other["values"])  # a copy: YAML would write the same object as a reference
        for other in whole
        if other is not best
        and excess(other) == excess(best) == 0
        and None not in (other["interval"], best["interval"])
        and abs(other[tune.metric] - best[tune.metric]) <= math.hypot(other["interval"], best["interval"])
    ]
    return {
        "method": method,
        "chosen": dict(best["values"]),
        "edge": _edges(tune.grid, best["values"]),
        "ties": ties,
        "within": excess(best) == 0,
        "cost": total(records),
        "trials": records,
    }


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _edges(grid: Mapping[str, list[Any]], chosen: Mapping[str, Any]) -> dict[str, str]:
    """Settings whose chosen value is the smallest or the largest that was offered: a wider grid might have another."""
    edges = {}
    for key, values in grid.items():
        numbers = {value for value in values if isinstance(value, int | float) and not isinstance(value, bool)}
        if chosen[key] in numbers and len(numbers) > 1 and chosen[key] in (min(numbers), max(numbers)):
            edges[key] = "smallest" if chosen[key] == min(numbers) else "largest"
    return edges


def total(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of costs, and of how many runs."""
    return {"runs": sum(cost.get("runs", 1) for cost in costs), **{n: sum(cost[n] for cost in costs) for n in COST}}


def write_choices(path: Path, tune: Tune, choices: Sequence[Mapping[str, Any]]) -> None:
    """Write `tuned.yaml`."""
    cost = total([choice["cost"] for choice in choices])
    tree = {"rule": tune.rule(), "tune": tune.model_dump(mode="json"), "cost": cost, "choices": list(choices)}
    write_atomic(path, dump(tree))


def dump(tree: Mapping[str, Any]) -> bytes:
    """The text of `tuned.yaml`."""
    return yaml_text.dump(dict(tree)).encode()


def read_choices(path: Path, tune: Tune, planned: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Key → choice, of those in `tuned.yaml` that were made by this rule from the planned trials (key → runs).

    The key is `key_of` of method and point of the sweep's grid. Raises BenchError for a damaged file.
    """
    tree, choices = _read(path)
    runs = {key: [trial["run"] for trial in choice["trials"]] for key, choice in choices.items()}
    same_rule = tree.get("rule") == tune.rule()
    return {key: choices[key] for key, names in planned.items() if same_rule and runs.get(key) == names}


def other_choices(path: Path, tune: Tune, planned: Collection[str]) -> list[dict[str, Any]]:
    """The choices in `tuned.yaml` with none of the planned keys: of other methods, or at other points.

    Raises BenchError if they were made otherwise than `tune` says, so that one file cannot hold both.
    """
    tree, choices = _read(path)
    others = [choice for key, choice in choices.items() if key not in planned]
    if others and tree["tune"] != tune.model_dump(mode="json"):
        names = ", ".join(dict.fromkeys(choice["method"] for choice in others))
        raise BenchError(f"{path} holds choices of another sweep, tuned otherwise ({names}): choose another out.")
    return others


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The contents of `tuned.yaml`, and its choices by `key_of`; nothing where there is none."""
    try:
        tree = yaml_text.parse(path.read_text(encoding="utf8"))
        choices = {key_of(choice["method"], choice["at"]): choice for choice in tree["choices"]}
        _ = tree["rule"], tree["tune"], [trial["run"] for choice in choices.values() for trial in choice["trials"]]
    except FileNotFoundError:
        return {}, {}
    except (KeyError, TypeError, ValueError) as error:
        raise BenchError(f"{path} is damaged ({error}): remove it, and the sweep chooses again.") from None
    return tree, choices


def key_of(method: str, at: Mapping[str, Any]) -> str:
    """A name for a method at a point of the sweep's grid."""
    return f"{method} {json.dumps(at, sort_keys=True)}"


def summary(choices: Sequence[Mapping[str, Any]]) -> str:
    """What was spent, and which choices a wider grid might change."""
    cost = total([choice["cost"] for choice in choices])
    rows = cost["network_forwards"] + cost["network_backwards"]
    text = (
        f"Tuning: {cost['runs']} runs, {cost['updates']:,} updates, {cost['reward_calls']:,} reward calls, {rows:,} "
        f"rows through the network, forward and backward, {cost['wall_seconds']:,.0f} s of runs."
    )
    edges = [
        f"{choice['method']} ({key} = {choice['chosen'][key]}, the {side})"
        for choice in choices
        for key, side in choice["edge"].items()
    ]
    outside = [choice["method"] for choice in choices if not choice["within"]]
    chance = [choice["method"] for choice in choices if choice.get("ties")]  # files of older sweeps know of none
    text += f" At the edge of the grid: {', '.join(edges)}." if edges else ""
    text += f" Not told apart from other values, by the trials' errors: {', '.join(chance)}." if chance else ""
    return text + (f" No trial keeps the bounds: {', '.join(outside)}." if outside else "")
