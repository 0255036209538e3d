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


_NO_BUFFER = {"method.buffer": 32, "method.minimum": 16}  # options that had no effect, at their defaults
_NO_DEVIATION = {"method.deviation.over": "group", "method.deviation.correction": 0, "method.deviation.epsilon": 1e-6}
_CLIPPED = {"method.surrogate": "clip", "method.threshold": 1e-5}
_ALL_STEPS = {"method.window": None, "method.window_rounds": 25, "method.shared_start": False}
_PLAIN_STEP = {"method.density": "gaussian", "method.kl_unit": "step"}

# method → former key → what it is now, or the only value that a row of this method may have: its options were given by
# name to one class of many methods, and are now what the method's own class does.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "ddpo": {"method.advantage": "buffer", "method.reduction": "mean", **_NO_DEVIATION},
    "grpo": {"method.advantage": "group", "method.reduction": "mean", **_NO_BUFFER},
    "dpok": {"method.advantage": "reward", "method.reduction": "sum", **_NO_BUFFER, **_NO_DEVIATION},
    "flow_grpo": _CLIPPED | _ALL_STEPS | {"method.density": "gaussian", "method.kl_unit": "rate"},
    "flow_grpo_cps": _CLIPPED | _ALL_STEPS | {"method.density": "square", "method.kl_unit": "square"},
    "dance_grpo": _CLIPPED | _ALL_STEPS | _PLAIN_STEP | {"method.shared_start": True},
    "mix_grpo": _CLIPPED | _PLAIN_STEP | {"method.fraction": 1.0, "method.shared_start": False},
    "grpo_guard": _CLIPPED | _ALL_STEPS | _PLAIN_STEP | {"method.surrogate": "guard"},
    "flow_dppo": _ALL_STEPS | _PLAIN_STEP | {"method.surrogate": "mask", "method.clip": 1e-4},
}


def current(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key, in the names of this version; `method.name` among them.

    Raises BenchError for a setting that is now another method's or nobody's.
    """
    former, found = METHODS.get(settings["method.name"], {}), {}
    for key, value in settings.items():
        now = former.get(key, Renamed(key))
        if isinstance(now, Renamed):
            found[now.key] = now.convert(value)
        elif now != value:
            raise BenchError(
                f"{key} = {value!r} was a setting of {settings['method.name']!r} and is none of this version's: "
                "use the version that made the row."
            )
    return found
