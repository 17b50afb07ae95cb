"""How long each request may take, so that EIO reaches a reader within the deadline of its read.

One read is several requests, one after the other, and only the last denial becomes the reader's EIO. Seen on
Linux 6.18 for a read of 64 KiB, every request denied, in pages:

    read    [0, 16)  [16, 32)  [0, 1)            readahead in one or more pieces, then the page itself
    mmap    [0, 31)  [31, 32)  [0, 1)  [0, 1)    the fault asks for the page twice

Pieces that do not touch, of another file even, follow each other just so. Giving each request the whole
deadline would multiply it. So

- the first request gets 0.6 of the deadline D;
- one that *follows* a denial gets what is left of 0.85 D, counted from the start of the first; when that is
  over, a quarter of what is left of D, so that bytes which are almost there still come;
- when D is over, everything starts afresh.

A request follows a denial if it is about the same object, touches the denied range, and comes within a
second; or if it comes from the same process directly afterwards. It does not, if part of it was asked for
again and denied again a while before: then that read has ended in EIO, and this is a later one, which tries
afresh. Directly after that denial it may be a fault's second try, or another reader who has been waiting for
the same page all the time: those follow it, one after the other, each with a quarter of what is left. A
denial that came at once used up nothing, and is not remembered.

Times are seconds of any monotonic clock, and the caller's to tell.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ondemand.provider import ObjectKey
from ondemand.ranges import Range

FIRST_SHARE = 0.6
TOTAL_SHARE = 0.85
LAST_SHARE = 0.25
AT_ONCE_SHARE = 0.005
SAME_RANGE_S = 1.0
SAME_PROCESS_S = 0.1  # the kernel asks again as soon as the reader's thread runs
SAME_PAGE_S = 0.05  # until somebody who has waited for the page runs: 0.2 ms, but much more under load
DENIED_MAX = 1024
"""Most denials remembered; a flood of them forgets the oldest, whose followers then get a full budget."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long a request may take.

    Attributes:
        start: When the read began, as far as is known.
        expires: When the request has to be answered.
    """

    start: float
    expires: float


@dataclass(frozen=True, slots=True)
class _Denial:
    key: ObjectKey
    want: Range
    pid: int
    start: float
    when: float
    again: bool  # its range had been denied before, as part of a larger one


class Deadlines:
    """Budgets for requests.

    Args:
        deadline_s: A reader gets EIO at most this long after its read.
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._denials: deque[_Denial] = deque(maxlen=DENIED_MAX)

    def admit(self, key: ObjectKey, want: Range, pid: int, now: float) -> Budget:
        """The budget of a request that has just been read.

        Args:
            pid: The reader's process, 0 if unknown.
        """
        start = self._start(key, want, pid, now)
        if start is None:
            return Budget(now, now + FIRST_SHARE * self._deadline_s)
        left = start + self._deadline_s - now
        return Budget(start, max(start + TOTAL_SHARE * self._deadline_s, now + LAST_SHARE * left))

    def denied(self, key: ObjectKey, want: Range, pid: int, budget: Budget, now: float) -> None:
        """A request was denied: the kernel is about to ask for the next piece, or for parts of this one."""
        if now - budget.start > AT_ONCE_SHARE * self._deadline_s:
            again = any(
                d.key == key and d.start == budget.start and d.want.covers(want) for d in self._denials
            )
            self._denials.append(_Denial(key, want, pid, budget.start, now, again))

    def _start(self, key: ObjectKey, want: Range, pid: int, now: float) -> float | None:
        while self._denials and now - self._denials[0].when > SAME_RANGE_S:
            self._denials.popleft()
        live = [denial for denial in self._denials if now - denial.start <= self._deadline_s]
        ended = max((d.when for d in live if d.again and d.key == key and d.want.overlaps(want)), default=now)
        if now - ended > SAME_PAGE_S:
            return None
        starts = (d.start for d in live if _follows(d, key, want, pid, now))
        return min(starts, default=None)


def _follows(denial: _Denial, key: ObjectKey, want: Range, pid: int, now: float) -> bool:
    if denial.key == key and denial.want.start <= want.stop and want.start <= denial.want.stop:
        return True
    return denial.pid == pid != 0 and now - denial.when <= SAME_PROCESS_S
