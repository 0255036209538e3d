"""Errors meant for people: one sentence that names the offending thing and the way out, printed without a traceback."""

import difflib
from collections.abc import Iterable


class BenchError(Exception):
    """A mistake in the input or the surroundings, not in the program; the command line exits with status 2."""


class NonFiniteError(BenchError):
    """A reward, loss, gradient or sample is NaN or infinite."""


class OutOfMemoryError(BenchError):
    """An allocation failed. phases: what was being done, outermost first."""

    phases: tuple[str, ...] = ()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a known name is close, then the known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f"; did you mean {close[0]!r}?" if close else ".") + f" Known: {', '.join(known) or 'none'}."
