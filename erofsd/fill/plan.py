"""What to fetch for a miss, and what before there is one. Pure: columns in, units and byte ranges out.

Three sizes of ambition, all counted in stored bytes, because those are what a fetch costs:

- a **random** miss brings the units it needs, and small neighbours behind them up to a budget: the round
  trip is paid anyway;
- a **stream**, a reader that goes forward, has a window ahead of it, fetched in the background. The window
  doubles as long as the reader keeps coming, so a reader that stops early has wasted at most what it used;
- a **prefetch** is cut into runs long enough to pay for their round trip, short enough to let a miss through.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from erofsd.blobs.layout import BlobLayout
from ondemand.ranges import Range

KIB = 1 << 10
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits of amplification. All of them stored bytes, but for ``slack`` and ``proof``.

    Attributes:
        random_min: A random miss may always bring this much in all.
        random_max: And never more than this, unless a single unit is larger.
        window_first: Window of a stream when it is recognised.
        window_max: The window grows no further.
        run: One range request of a stream or a prefetch asks for about this much.
        gap: Bytes that may lie unused between two units of one request: cheaper than another request.
        slack: Decoded bytes a reader may skip, or go back, and still be the same stream.
        proof: Decoded bytes a reader must have read in sequence to be a stream.
    """

    random_min: int = 256 * KIB
    random_max: int = 512 * KIB
    window_first: int = 1 * MIB
    window_max: int = 16 * MIB
    run: int = 4 * MIB
    gap: int = 64 * KIB
    slack: int = 256 * KIB
    proof: int = 384 * KIB

    def random(self, latency_s: float, bytes_per_s: float) -> int:
        """Budget of a random miss: what costs as much time as the round trip does, within limits."""
        return max(self.random_min, min(self.random_max, int(latency_s * bytes_per_s)))


DEFAULT_POLICY = Policy()


@dataclass(frozen=True, slots=True)
class Run:
    """One range request.

    Attributes:
        units: Indexes of the units that are wanted of it, ascending.
        compressed: Range in the stored object, from the first unit's start to the last one's end.
    """

    units: tuple[int, ...]
    compressed: Range


Wanted = Callable[[int], bool]


def widen(layout: BlobLayout, units: list[int], wanted: Wanted, budget: int) -> list[int]:
    """Add neighbours behind *units* (ascending, not empty) until *budget* stored bytes are asked for.

    Neighbours that are not *wanted* are passed over, but what is asked for must stay one request: the bytes
    between its ends count.
    """
    start = layout.unit_offset[units[0]]
    widened = list(units)
    for unit in range(units[-1] + 1, layout.unit_count):
        if layout.unit_offset[unit] + layout.unit_stored[unit] - start > budget:
            break
        if wanted(unit):
            widened.append(unit)
    return widened


def runs(layout: BlobLayout, units: Iterable[int], policy: Policy) -> Iterator[Run]:
    """Cut *units*, ascending, into requests of about ``policy.run`` bytes, none across a larger gap."""
    taken: list[int] = []
    start = stop = 0
    for unit in units:
        offset = layout.unit_offset[unit]
        end = offset + layout.unit_stored[unit]
        if taken and (offset - stop > policy.gap or end - start > policy.run or offset < stop):
            yield Run(tuple(taken), Range(start, stop))
            taken = []
        if not taken:
            start = offset
        taken.append(unit)
        stop = end
    if taken:
        yield Run(tuple(taken), Range(start, stop))


def unit_at(layout: BlobLayout, offset: int) -> int:
    """The unit of the chunk at decoded *offset*, or of the next one; ``unit_count`` past the last."""
    chunk = bisect_right(layout.chunk_offset, offset) - 1
    if chunk < 0 or layout.chunk_offset[chunk] + layout.chunk_size[chunk] <= offset:
        chunk += 1
    return layout.chunk_unit[chunk] if chunk < layout.chunk_count else layout.unit_count


def unit_beyond(layout: BlobLayout, unit: int, stored_bytes: int) -> int:
    """The first unit that begins at least *stored_bytes* behind the start of *unit*."""
    if unit >= layout.unit_count:
        return layout.unit_count
    return bisect_left(layout.unit_offset, layout.unit_offset[unit] + stored_bytes, unit)


@dataclass(slots=True, eq=False)
class Stream:
    """A reader that goes forward through a blob.

    Attributes:
        next: Decoded offset that it will ask for next.
        travelled: Decoded bytes it has asked for in sequence since ``window`` last changed.
        window: Stored bytes to keep fetched ahead of it; 0 until it has proved itself.
        ahead: First unit that was not asked for ahead of it yet.
    """

    next: int
    travelled: int
    window: int = 0
    ahead: int = 0

    def reach(self, policy: Policy) -> int:
        """Decoded bytes it may skip: a reader of many small files leaves some out."""
        return max(policy.slack, min(self.window // 4, 2 * MIB))

    def went(self, want: Range, policy: Policy) -> None:
        """It has asked for *want*."""
        if want.stop <= self.next:
            return
        self.travelled += want.stop - max(want.start, self.next)
        self.next = want.stop
        if self.window == 0:
            if self.travelled >= policy.proof:
                self.window, self.travelled = policy.window_first, 0
        elif self.travelled >= self.window:
            self.window, self.travelled = min(2 * self.window, policy.window_max), 0


class Streams:
    """The streams of one blob, found among all that is read of it, hits and misses.

    Args:
        limit: How many are followed at once; the one that was not seen for longest gives way.
    """

    def __init__(self, policy: Policy, limit: int = 32) -> None:
        self._policy = policy
        self._limit = limit
        self._streams: list[Stream] = []  # the one seen last stands first

    def seen(self, want: Range) -> Stream:
        """Note a read of *want*; the stream that it belongs to, perhaps a new one."""
        policy = self._policy
        for position, stream in enumerate(self._streams):
            if -policy.slack <= want.start - stream.next <= stream.reach(policy):
                stream.went(want, policy)
                if position:
                    self._streams.insert(0, self._streams.pop(position))
                return stream
        stream = Stream(next=want.stop, travelled=len(want))
        self._streams.insert(0, stream)
        del self._streams[self._limit :]
        return stream

    def last(self, want: Range) -> Stream:
        """The stream that *want* was seen in just now; sees it if it was not."""
        for stream in self._streams:
            if stream.next == want.stop:
                return stream
        return self.seen(want)


def ahead(layout: BlobLayout, stream: Stream, policy: Policy) -> range:
    """Units to fetch ahead of *stream* now; notes that they were given out.

    Empty until a good part of a request can be asked for, so that requests stay long.
    """
    if not stream.window:
        return range(0)
    at = unit_at(layout, stream.next)
    first = max(at, stream.ahead)
    stop = unit_beyond(layout, at, stream.window)
    if first >= stop:
        return range(0)
    left = layout.unit_offset[stop - 1] - layout.unit_offset[first]
    if left < min(stream.window // 4, policy.run // 2) and stop < layout.unit_count and first > at:
        return range(0)
    stream.ahead = stop
    return range(first, stop)
