"""SIGINT, SIGTERM and SIGHUP: a run stops where it can resume, and says so at once."""

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
    """A signal asked the program to end; like KeyboardInterrupt it passes every `except Exception`."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Stop:
    """The signal handler: it raises Interrupted at once, or, inside `deferred`, notes the signal for later.

    A second signal always raises.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # the deferred signal
        self.raised: int | None = None  # the signal that raised Interrupted
        self._waiting = False

    def __call__(self, number: int, frame: Any) -> None:
        if not self._waiting or self.number is not None:
            self.raised = number
            raise Interrupted(number)
        self.number = number
        sys.stderr.write("\nStopping after this update, with a checkpoint; once more stops at once.\n")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Do not let a first signal interrupt the block."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False


STOP = Stop()


def end_with_launcher() -> None:
    """Let the kernel send SIGTERM when the process that launched this one dies; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def signals_stop() -> Iterator[None]:
    """In the block signals go to `STOP`; signals that the parent process ignores stay ignored.

    A library that turns an Interrupted into an error of its own, or drops it, does not stop it from being raised.
    """
    STOP.number = STOP.raised = None
    hook = sys.unraisablehook

    def swallowed(lost: Any) -> None:
        """An exception cannot leave a finaliser: send the signal again, after it."""
        if isinstance(lost.exc_value, Interrupted):
            # not threading.Thread: its start waits, and the signal could come before this function returns
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
