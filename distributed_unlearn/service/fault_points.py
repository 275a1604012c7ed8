"""Places at which a test can kill this process: before and after everything that is written."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "DISTRIBUTED_UNLEARN_KILL_AT"
"""How many fault points the process lives to pass; unset outside of tests."""


class _Countdown:
    """Points that are left, taken from the environment of this very process at its first point."""

    def __init__(self) -> None:
        self._left: dict[int, int] = {}

    def passed(self) -> None:
        text = os.environ.get(VARIABLE)
        if text is None:
            return
        left = self._left.get(os.getpid(), int(text)) - 1
        self._left[os.getpid()] = left
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


_COUNTDOWN = _Countdown()


@contextmanager
def fault_points() -> Iterator[None]:
    """One point before the block and one after it."""
    _COUNTDOWN.passed()
    yield
    _COUNTDOWN.passed()
