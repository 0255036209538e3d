"""The choice among a method's trials by the rule of `tune:`, and what it cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.errors import BenchError, did_you_mean
from bench.method import Strength
from bench.reporting.statistics import student
from bench.sweeps import envelope
from bench.sweeps.tune import STRENGTH, Tune, Widening

COST = ("updates", "reward_calls", "network_forwards", "network_backwards", "train_seconds", "wall_seconds")


Trial = tuple[str, Mapping[str, Any], pd.DataFrame]  # run, values, rows


def choose(tune: Tune, method: str, trials: Sequence[Trial], again: Sequence[Trial] = ()) -> dict[str, Any]:
    """The best of a method's trials by the rule, as an entry of `tuned.yaml`; of an envelope, the best.

    again: the chosen and those tied with it once more, with more evaluation samples; they decide then.
    Every metric of a trial's last evaluation is kept. A trial that failed or lacks a value is never chosen. `ties` are
    the values of trials that do not differ significantly from the chosen by the evaluations' errors, added in squares
    (on the same noise the error of the difference is smaller).
    Raises BenchError where no trial has a value, or no row the metric.
    """
    records, second = ([_record(tune, *trial) for trial in some] for some in (trials, again))
    deciding = second or records
    whole = [one for one in deciding if "failed" not in one and all(one[name] is not None for name in tune.metrics())]
    whole = [one for one in whole if one["evaluations"]] if tune.envelope else whole
    if not whole:
        why = deciding[0].get("failed", "their metrics were refused")
        raise BenchError(f"tune: no trial of {method} has a value to choose by ({why}): change the grid or the rule.")
    entry = {"method": method, **(_on_envelope if tune.envelope else _best)(tune, whole)}
    entry["edge"] = _edges([record["values"] for record in records], configurations(entry)[0])
    entry |= {"cost": total([*records, *second]), "trials": records}
    return entry | ({"again": second} if second else {})


def with_replaced(choice: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The choice among the trials of a wider grid, with those that the choice `before` had and this one lacks.

    A method without a strength has other rates in a wider grid. What these trials cost was spent too.
    """
    runs = {record["run"] for record in _records(choice)}
    replaced = [record for record in _records(before) if record["run"] not in runs]
    return dict(choice) | ({"cost": total([choice["cost"], *replaced]), "replaced": replaced} if replaced else {})


def _records(choice: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*choice["trials"], *choice.get("again", ()), *choice.get("replaced", ())]


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
        if _is_number(value) and len(tried) > 1 and value in (min(tried), max(tried)):
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
