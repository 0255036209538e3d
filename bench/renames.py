"""What result rows and stored configurations of earlier versions call settings, and what these are now.

A published row carries the settings of the version that made it. `current` is the one place that translates them: for
reading rows, for `bench reproduce`, and for the configuration of an old run's folder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.errors import BenchError


@dataclass(frozen=True)
class Renamed:
    """The setting's key now, and what its value becomes."""

    key: str
    convert: Callable[[Any], Any] = lambda value: value


# former key → what it is now, of every method
GENERAL: Mapping[str, Renamed] = {
    "model.lora_rank": Renamed("model.lora.rank"),
    "model.lora_alpha": Renamed("model.lora.alpha"),
}

# method → former key → what it is now, or the only value that a row of this method may have: its options were given by
# name to one class of many methods, and are now what the method's own class does.
METHODS: Mapping[str, Mapping[str, Any]] = {}


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key, with the renames that hold for every method."""
    former = {key: GENERAL.get(key, Renamed(key)) for key in settings}
    return {now.key: now.convert(settings[key]) for key, now in former.items()}


def current(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key, in the names of this version; `method.name` among them.

    Raises BenchError for a setting that is now another method's or nobody's.
    """
    former, found = METHODS.get(settings["method.name"], {}), {}
    for key, value in renamed(settings).items():
        now = former.get(key, Renamed(key))
        if isinstance(now, Renamed):
            found[now.key] = now.convert(value)
        elif now != value:
            raise BenchError(
                f"{key} = {value!r} was a setting of {settings['method.name']!r} and is none of this version's: "
                "use the version that made the row."
            )
    return found
