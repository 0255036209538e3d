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


# One class with options was db, res_db and dag_kl; another rtb_softmax and tmpo; another vgg_flow and vgg_flow_pruned.
_NO_POLICY_GRADIENT = {"method.clip": None, "method.advantage_clip": 5.0, "method.policy_weight": 1.0}
_NO_VALUE_NETWORK = {
    "method.value_network": False,
    "method.gradient_at": "sample",
    "method.consistency": 1.0,
    "method.terminal": 1000.0,
    "method.channels": [64, 128, 256, 256],
}

# method → former key → what it is now, or the only value that a row of this method may have: its options were given by
# name to one class of many methods, and are now what the method's own class does.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "rtb_softmax": {"method.prior": True},
    "tmpo": {"method.prior": False},
    "db": {"method.residual": False} | _NO_POLICY_GRADIENT,
    "res_db": {"method.residual": True} | _NO_POLICY_GRADIENT,
    "dag_kl": {"method.residual": False},
    "vgg_flow": {"method.value_network": True, "method.gradient_at": "prediction"},
    "vgg_flow_pruned": _NO_VALUE_NETWORK,
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
