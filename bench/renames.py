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


UNUSED = object()  # a setting that did nothing in this method, whatever its value

# One class with options was all of the ∇-GFlowNet methods.
_NABLA = {"method.residual": True, "method.flow": True, "method.flow_target": "policy"}
_PATHWISE = {"method.reverse": "pathwise", "method.reverse_at": "start"}
_FLOW = ("flow_target", "detach_target", "reverse", "reverse_at", "reverse_weight", "channels")

# method → former key → what it is now, or the only value that a row of this method may have: its options were given by
# name to one class of many methods, and are now what the method's own class does.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "nabla_gfn": _NABLA | {"method.detach_target": True, "method.reverse": "expected", "method.reverse_at": "end"},
    "nabla_gfn_noflow": _NABLA | {"method.flow": False} | {f"method.{name}": UNUSED for name in _FLOW},
    "nabla_gfn_published": _NABLA | _PATHWISE,
    "nabla_gfn_adjoint": _NABLA
    | {
        "method.flow_target": "adjoint",
        "method.detach_target": True,
        "method.reverse": UNUSED,
        "method.reverse_at": "start",
    },
    "nabla_db": _NABLA | _PATHWISE | {"method.residual": False},
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
        elif now is not UNUSED and now != value:
            raise BenchError(
                f"{key} = {value!r} was a setting of {settings['method.name']!r} and is none of this version's: "
                "use the version that made the row."
            )
    return found
