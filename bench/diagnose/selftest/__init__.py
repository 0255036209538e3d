"""`bench selftest NAME`: the contract of a plugin, checked on small exact problems; no weights are needed.

A check is a function of the plugin's name; it returns nothing, raises `Failed` with one sentence, or `Skipped`.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from bench.diagnose.selftest.checking import Failed, Skipped

KINDS = ("methods", "rewards", "metrics", "models")


def checks(kind: str) -> list[Callable[[str], None]]:
    """Those of a kind."""
    return _module(kind).CHECKS


def _module(kind: str) -> Any:
    return importlib.import_module(f"{__name__}.{kind}")  # only now: that of models takes seconds


@dataclass(frozen=True)
class Outcome:
    """One check's result: status is "passed", "failed" or "skipped"."""

    check: str
    status: str
    detail: str = ""


def selftest(kind: str, name: str) -> Iterator[Outcome]:
    """Run every check of a plugin (`kind` as in the registry; a model may be a folder) and yield the outcomes."""
    with getattr(_module(kind), "present", nullcontext)(name) as name:
        for check in checks(kind):
            title = check.__name__.replace("_", " ")
            try:
                check(name)
            except Skipped as reason:
                yield Outcome(title, "skipped", str(reason))
            except Failed as reason:
                yield Outcome(title, "failed", str(reason))
            except Exception as error:  # whatever a plugin raises is its failure, not ours
                yield Outcome(title, "failed", f"raised {type(error).__name__}: {error}")
            else:
                yield Outcome(title, "passed", (check.__doc__ or "").strip().splitlines()[0])
