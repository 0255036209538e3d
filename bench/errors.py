"""Errors meant for people: one sentence that names the offending thing and the way out, printed without a traceback."""

import difflib
import errno
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


WAYS_OUT = {  # errno → what to do about it
    errno.EISDIR: "it is a folder, and a file is needed",
    errno.ENOTDIR: "a file is where a folder is needed",
    errno.EEXIST: "a file is where a folder is needed",
    errno.EACCES: "give yourself the right to it, or choose another place",
    errno.EPERM: "give yourself the right to it, or choose another place",
    errno.EROFS: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a link leads back to itself: remove it",
}


def disk_error(error: OSError, place: object = None) -> str:
    """One sentence for an error of a file or the disk: which file, or else `place`; why, and the way out."""
    file, reason = error.filename or place, error.strerror or str(error)
    if not file:
        return f"{reason}."
    if error.errno == errno.ENOENT:
        return f"there is no {file}: check how it is written."
    way = WAYS_OUT.get(
        error.errno or 0,
        "what was stored before is intact, and once the disk works again, the same command goes on",
    )
    return f"cannot read or write {file}: {reason}; {way}."
