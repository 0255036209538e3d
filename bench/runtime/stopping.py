"""SIGINT, SIGTERM and SIGHUP: a run stops where it can go on, and whoever waits is told at once."""

import _thread
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked the program to end; like KeyboardInterrupt, no `except Exception` holds it up."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Stop:
    """What a signal does: it raises Interrupted at once, or, inside `deferred`, is kept until someone asks.

    A second signal is never deferred.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # that was kept
        self.raised: int | None = None
        self._waiting = False

    def __call__(self, number: int, frame: Any) -> None:
        if not self._waiting or self.number is not None:
            self.raised = number
            raise Interrupted(number)
        self.number = number
        sys.stderr.write("\nStopping after this update, with a checkpoint; once more stops at once.\n")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """The block is not interrupted by a first signal."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False


STOP = Stop()


def end_with_launcher() -> None:
    """Be sent SIGTERM when the process that launched this one dies; on Linux, which alone can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def signals_stop() -> Iterator[None]:
    """In the block signals go to `STOP`; those that whoever started us has switched off stay off.

    What a library makes of an Interrupted that finds it, an error of its own or nothing, is Interrupted all the same.
    """
    STOP.number = STOP.raised = None
    hook = sys.unraisablehook

    def swallowed(lost: Any) -> None:
        """Nothing that is raised in a finaliser leaves it: the signal comes once more, after it."""
        if isinstance(lost.exc_value, Interrupted):
            # not threading's: its start waits, and the signal could come while this is still being run
            _thread.start_new_thread(_send_later, (lost.exc_value.status - 128,))
        else:
            hook(lost)

    sys.unraisablehook = swallowed
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, STOP)
    try:
        yield
    except Exception as error:
        if STOP.raised is None:
            raise
        raise Interrupted(STOP.raised) from error
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _send_later(number: int) -> None:
    time.sleep(0.1)
    os.kill(os.getpid(), number)
