"""The file `tuned.yaml`: the choices of a sweep with all that their trials measured, and the cost.

The choice of a method stands beside the names of its trials, which hold a hash of their settings: it is made again when
those have changed. What another rule would have chosen can be read off.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.runtime import yaml_text
from bench.runtime.files import write_atomic
from bench.sweeps.choosing import configurations, total
from bench.sweeps.tune import Tune, Widening

FILE = "tuned.yaml"


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
        f"Tuning: {cost['runs']} runs, {cost['updates']:,} updates, {cost['reward_calls']:,} reward calls, an "
        f"NFE of {rows:,}, forward and backward, {cost['wall_seconds']:,.0f} s of runs."
    )
    edges = [
        f"{choice['method']} ({key} = {configurations(choice)[0][key]}, the {side})"
        for choice in choices
        for key, side in choice["edge"].items()
    ]
    outside = [choice["method"] for choice in choices if not choice["within"]]
    chance = [choice["method"] for choice in choices if choice.get("ties")]  # files of older sweeps know of none
    text += f" At the edge of the grid: {', '.join(edges)}." if edges else ""
    text += f" Other values do not differ significantly, by the trials' errors: {', '.join(chance)}." if chance else ""
    return text + (f" No trial keeps the bounds: {', '.join(outside)}." if outside else "")
