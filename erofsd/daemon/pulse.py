"""Whether the worker is alive, or only not dead.

The keeper asks; a worker whose event loop turns answers. One that does not for `LOOKS` looks in a row is
hung: it is told to abort, so that it writes where it hangs, and at the next look killed.

Looks are counted, not seconds: a keeper that was itself stopped for a minute finds one look due, not a dozen,
and a worker that was stopped along with it has time to answer.
"""

from __future__ import annotations

from enum import Enum, auto

LOOKS = 3


class Due(Enum):
    """What to do after a look."""

    NOTHING = auto()
    ASK = auto()
    ABORT = auto()
    KILL = auto()


class Pulse:
    """Of one worker.

    Args:
        patience_s: How long it may be silent.
        now: Of the monotonic clock, seconds; so are all others.
    """

    def __init__(self, patience_s: float, now: float) -> None:
        self._interval_s = patience_s / LOOKS
        self._next_look = now
        self._silent_looks = 0
        self._asked = False

    def wait_s(self, now: float) -> float:
        """Seconds until the next look."""
        return max(0.0, self._next_look - now)

    def look(self, now: float) -> Due:
        """Call it when the time has come, after everything that the worker has sent is read."""
        if now < self._next_look:
            return Due.NOTHING
        self._next_look = now + self._interval_s
        if not self._asked:
            self._asked = True
            return Due.ASK
        self._silent_looks += 1
        if self._silent_looks < LOOKS:
            return Due.NOTHING
        return Due.ABORT if self._silent_looks == LOOKS else Due.KILL

    def answered(self) -> None:
        """It lives."""
        self._asked = False
        self._silent_looks = 0
