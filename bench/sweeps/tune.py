"""The `tune:` section of a sweep: the same trials for every method, one stated rule, the choice and its cost on file.

Trials are ordinary runs on a seed that the sweep's own runs do not have. The choice of a method stands in `tuned.yaml`
beside the names of its trials, which hold a hash of their settings: it is made again when those have changed. All that
a trial measured stands there too, so that what another rule would have chosen can be read off.

The stages: trials; those tied with the chosen again with more evaluation samples; the choice; if a winner is
at an edge, a wider grid for all methods and the same again; then the runs of the chosen configurations on the table's
seeds, which are no part of this.
"""

import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from bench.errors import BenchError, did_you_mean
from bench.method import STRENGTHS, Strength
from bench.options import Config, Distinct
from bench.reporting.budgets import KL
from bench.reporting.statistics import student
from bench.runtime import yaml_text
from bench.runtime.files import write_atomic
from bench.settings import Seed
from bench.sweeps import envelope

COST = ("updates", "reward_calls", "network_forwards", "network_backwards", "train_seconds", "wall_seconds")
FILE = "tuned.yaml"
RATE = "optimizer.lr"
STRENGTH = "strength"  # the axis whose setting every method names itself
Widening = dict[str, list[str]]  # setting, or `STRENGTH` → which ends of its values grow: "smallest", "largest"
Values = Annotated[list[Any], Field(min_length=1), Distinct]  # of a setting, in a grid


class Tune(Config):
    """How settings are chosen; `smallest` or `largest` and the bounds name metrics of a trial's last evaluation.

    `envelope` names a metric whose gain over the prior is set against path_kl, at every evaluation.
    """

    grid: dict[str, Values] = Field(min_length=1, description="setting → values; every combination is a trial")
    strength: bool = Field(False, description="try every value with each of the method's strength, which it declares")
    seed: Seed = Field(description="of the trials; none of the sweep's own")
    smallest: str | None = Field(None, description="the metric (column `metric` of the rows, its `value`) to minimise")
    largest: str | None = Field(None, description="or the one to maximise")
    envelope: str | None = Field(None, description="or the one whose gain is to cost the least path_kl, at every gain")
    most: int = Field(3, ge=1, description="configurations of a method that are kept of its envelope")
    widen: int = Field(0, ge=0, description="how often all grids grow where a method's winner has an extreme value")
    resolve: int = Field(
        1, ge=1, description="factor of the samples with which trials tied with the chosen are made again"
    )
    at_most: dict[str, float] = Field({}, description="metric → bound that the chosen trial must keep")
    at_least: dict[str, float] = Field({}, description="the same from below")
    updates: int | None = Field(None, ge=1, description="of a trial; null: as many as the run has")
    set: dict[str, Any] = Field({}, description="further settings of trials, a cheaper evaluation for one")

    @model_validator(mode="after")
    def _one_rule(self) -> "Tune":
        if sum(name is not None for name in (self.smallest, self.largest, self.envelope)) != 1:
            raise ValueError("name one metric, under smallest:, under largest: or under envelope:")
        if self.envelope and (self.at_most or self.at_least):
            raise ValueError("an envelope has all gains: leave out at_most and at_least")
        if self.strength and RATE not in self.grid:
            raise ValueError(f"strength is tried with learning rates: give values of {RATE} in tune.grid")
        if apart := [name for name, most in self.at_most.items() if self.at_least.get(name, most) > most]:
            raise ValueError(f"no trial can keep both bounds of {apart[0]}: at_least is above at_most")
        return self

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.smallest or self.largest or self.envelope or ""

    def metrics(self) -> list[str]:
        """All that the rule looks at."""
        return [*dict.fromkeys([self.metric, *([KL] if self.envelope else []), *self.at_most, *self.at_least])]

    def points(
        self, strength: Strength | None, own: float | None, widenings: Sequence[Widening] = ()
    ) -> Iterator[dict[str, Any]]:
        """The values of every trial of a method with this strength, whose setting has the value `own` otherwise."""
        axes = self._axes(strength, own, widenings)
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))

    def _axes(
        self, strength: Strength | None, own: float | None, widenings: Sequence[Widening]
    ) -> dict[str, list[Any]]:
        """Setting → values. A method without a strength gets as many trials, as learning rates in between."""
        axes: dict[str, list[Any]] = {key: list(values) for key, values in self.grid.items()}
        if self.strength:
            factors = strength.values if strength else tuple(map(float, range(1, STRENGTHS + 1)))
            axes[STRENGTH] = [float(f"{value * own:.6g}") if own is not None else value for value in factors]
        for axis, sides in (item for widening in widenings for item in widening.items()):
            for side in sides:
                axes[axis] = extended(axes[axis], side)
        if self.strength:
            tried = axes.pop(STRENGTH)
            if strength:
                axes[strength.setting] = tried
            else:
                rates = axes[RATE]
                between = np.geomspace(min(rates), max(rates), len(rates) * len(tried))
                axes[RATE] = [float(f"{rate:.3g}") for rate in between]
        return axes

    def settings(self) -> dict[str, Any]:
        """What a trial's settings have apart from the run's: without an envelope it is evaluated at its end only."""
        shorter = {} if self.updates is None else {"train.updates": self.updates}
        return ({} if self.envelope else {"evaluation.at": []}) | {**shorter, **self.set}

    def described(self) -> dict[str, Any]:
        """As `tuned.yaml` has it: options that older files do not know stand there only where they are set."""
        tree = self.model_dump(mode="json")
        later = ("strength", "envelope", "most", "widen", "resolve")
        return {key: value for key, value in tree.items() if key not in later or key in self.model_fields_set}

    def rule(self) -> str:
        """The rule in words."""
        if self.envelope:
            rule = f"envelope of {self.envelope} and {KL}, of at most {self.most} configurations"
        else:
            rule = f"smallest {self.smallest}" if self.smallest else f"largest {self.largest}"
        bounds = [f"{name} at most {bound:g}" for name, bound in self.at_most.items()]
        bounds += [f"{name} at least {bound:g}" for name, bound in self.at_least.items()]
        rule += f" of trials with {' and '.join(bounds)}" if bounds else ""
        return rule + (f"; ties again with {self.resolve} times the samples" if self.resolve > 1 else "")


def extended(values: Sequence[float], side: str) -> list[float]:
    """The values with one more at an end, in the ratio of the two next to it; a value 0 stays the smallest."""
    values = sorted(values)
    if side == "largest":
        return [*values, float(f"{values[-1] ** 2 / values[-2]:.6g}")]
    zero = values[:1] if values[0] == 0 else []
    positive = values[len(zero) :]
    return [*zero, float(f"{positive[0] ** 2 / positive[1]:.6g}"), *positive]


Trial = tuple[str, Mapping[str, Any], pd.DataFrame]  # run, values, rows


def choose(tune: Tune, method: str, trials: Sequence[Trial], again: Sequence[Trial] = ()) -> dict[str, Any]:
    """The best of a method's trials by the rule, as an entry of `tuned.yaml`; of an envelope, the best.

    again: the chosen and those tied with it once more, with more evaluation samples; they decide then.
    Every metric of a trial's last evaluation is kept. A trial that failed or lacks a value is never chosen. `ties` are
    the values of trials that are not told apart from the chosen by the evaluations' errors, added in squares (on the
    same noise the error of the difference is smaller).
    Raises BenchError where no trial has a value, or no row the metric.
    """
    records, second = ([_record(tune, *trial) for trial in some] for some in (trials, again))
    deciding = second or records
    complete = "evaluations" if tune.envelope else "interval"
    whole = [one for one in deciding if one.get(complete) and all(one[name] is not None for name in tune.metrics())]
    if not whole:
        why = deciding[0].get("failed", "their metrics were refused")
        raise BenchError(f"tune: no trial of {method} has a value to choose by ({why}): change the grid or the rule.")
    entry = {"method": method, **(_on_envelope if tune.envelope else _best)(tune, whole)}
    entry["edge"] = _edges([record["values"] for record in records], configurations(entry)[0])
    entry |= {"cost": total([*records, *second]), "trials": records}
    return entry | ({"again": second} if second else {})


def configurations(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The chosen values, of an envelope those of every configuration on it, the winner's first."""
    chosen = choice["chosen"]
    return chosen if isinstance(chosen, list) else [chosen]


def _record(tune: Tune, run: str, values: Mapping[str, Any], rows: pd.DataFrame) -> dict[str, Any]:
    """What is kept of a trial."""
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
    if tune.envelope and failed.empty:
        record["evaluations"] = envelope.evaluations(rows, tune.envelope)
    return record | {name: last[name].iloc[0].item() for name in COST}


def _best(tune: Tune, whole: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The trial with the smallest or largest value within the bounds; of equals the first in the grid.

    Where none keeps the bounds it is the one nearest to them (by the sum of what is missing over the bounds' size), and
    `within` is false.
    """

    def excess(record: Mapping[str, Any]) -> float:
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
    return {"chosen": dict(best["values"]), "ties": ties, "within": excess(best) == 0}


def _on_envelope(tune: Tune, whole: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The configurations that make the envelope, see `bench.sweeps.envelope.choose`, with their shares of its gains."""
    taken, shares, tied = envelope.choose([record["evaluations"] for record in whole], tune.most)
    values = [dict(record["values"]) for record in whole]
    return {
        "chosen": [values[i] for i in taken],
        "shares": [round(share, 3) for share in shares],
        "ties": [values[i] for i in tied],
        "within": True,
    }


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _edges(trials: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> dict[str, str]:
    """Settings whose chosen value is the smallest or the largest that was tried: a wider grid might have another."""
    edges = {}
    for key, value in chosen.items():
        tried = {values[key] for values in trials if _is_number(values[key])}
        if value in tried and len(tried) > 1 and value in (min(tried), max(tried)):
            edges[key] = "smallest" if value == min(tried) else "largest"
    return edges


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def wider(tune: Tune, choices: Sequence[Mapping[str, Any]], strengths: Mapping[str, Strength | None]) -> Widening:
    """What the next widening adds: an axis grows, of all methods, at an end where some method's winner is.

    strengths: of the methods. Only positive numbers with a fraction grow; a strength of 0 is no end.
    """
    ends: set[tuple[str, str]] = set()
    for choice in choices:
        strength = strengths[choice["method"]]
        for key, side in choice["edge"].items():
            value = configurations(choice)[0][key]
            if isinstance(value, float) and value > 0:
                ends.add((STRENGTH if tune.strength and strength and key == strength.setting else key, side))
    return {axis: sorted(side for name, side in ends if name == axis) for axis in sorted({axis for axis, _ in ends})}


def total(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of costs, and of how many runs."""
    return {"runs": sum(cost.get("runs", 1) for cost in costs), **{n: sum(cost[n] for cost in costs) for n in COST}}


def write_choices(
    path: Path, tune: Tune, choices: Sequence[Mapping[str, Any]], widenings: Sequence[Widening] = ()
) -> None:
    """Write `tuned.yaml`."""
    cost = total([choice["cost"] for choice in choices])
    tree = {"rule": tune.rule(), "tune": tune.described(), "cost": cost, "choices": list(choices)}
    write_atomic(path, dump(tree | ({"widened": list(widenings)} if widenings else {})))


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


def read_widenings(path: Path, tune: Tune) -> list[Widening]:
    """The widenings that the trials of `tuned.yaml` had, if it was made by these trials and this rule."""
    tree, _ = _read(path)
    return tree.get("widened", [])[: tune.widen] if tree.get("tune") == tune.described() else []


def other_choices(path: Path, tune: Tune, planned: Collection[str]) -> list[dict[str, Any]]:
    """The choices in `tuned.yaml` with none of the planned keys: of other methods, or at other points.

    Raises BenchError if they were made otherwise than `tune` says, so that one file cannot hold both.
    """
    tree, choices = _read(path)
    others = [choice for key, choice in choices.items() if key not in planned]
    if others and tree["tune"] != tune.described():
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
        f"{choice['method']} ({key} = {configurations(choice)[0][key]}, the {side})"
        for choice in choices
        for key, side in choice["edge"].items()
    ]
    outside = [choice["method"] for choice in choices if not choice["within"]]
    chance = [choice["method"] for choice in choices if choice.get("ties")]  # files of older sweeps know of none
    text += f" At the edge of the grid: {', '.join(edges)}." if edges else ""
    text += f" Not told apart from other values, by the trials' errors: {', '.join(chance)}." if chance else ""
    return text + (f" No trial keeps the bounds: {', '.join(outside)}." if outside else "")
