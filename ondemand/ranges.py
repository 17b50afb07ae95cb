"""Half-open byte ranges and sets of them: pure arithmetic."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Bytes ``[start, stop)``. Never negative; ``start == stop`` is the empty range."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"not a range: [{self.start}, {self.stop})")

    @classmethod
    def of(cls, offset: int, length: int) -> Range:
        """The *length* bytes that begin at *offset*."""
        return cls(offset, offset + length)

    def __len__(self) -> int:
        return self.stop - self.start

    def __bool__(self) -> bool:
        return self.stop > self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"

    def overlaps(self, other: Range) -> bool:
        """True if at least one byte is in both."""
        return self.start < other.stop and other.start < self.stop and bool(self) and bool(other)

    def covers(self, other: Range) -> bool:
        """True if every byte of *other* is in this range."""
        return not other or (self.start <= other.start and other.stop <= self.stop)

    def clamp(self, size: int) -> Range:
        """The part of this range that lies below *size*."""
        return Range(min(self.start, size), min(self.stop, size))

    def aligned(self, block_size: int) -> Range:
        """The smallest range of whole blocks that covers this one."""
        return Range(self.start - self.start % block_size, -(-self.stop // block_size) * block_size)


class RangeSet:
    """A set of bytes, kept as sorted, disjoint, non-adjacent ranges."""

    __slots__ = ("_starts", "_stops")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for r in ranges:
            self.add(r)

    def add(self, r: Range) -> None:
        """Put every byte of *r* into the set."""
        if not r:
            return
        first = bisect_left(self._stops, r.start)  # adjacency merges: stops == start is a neighbour
        last = bisect_right(self._starts, r.stop)
        start, stop = r.start, r.stop
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def discard(self, r: Range) -> None:
        """Take every byte of *r* out of the set."""
        if not r:
            return
        first = bisect_right(self._stops, r.start)
        last = bisect_left(self._starts, r.stop)
        starts: list[int] = []
        stops: list[int] = []
        if first < last:
            if self._starts[first] < r.start:
                starts.append(self._starts[first])
                stops.append(r.start)
            if self._stops[last - 1] > r.stop:
                starts.append(r.stop)
                stops.append(self._stops[last - 1])
            self._starts[first:last] = starts
            self._stops[first:last] = stops

    def covers(self, r: Range) -> bool:
        """True if every byte of *r* is in the set."""
        if not r:
            return True
        i = bisect_right(self._starts, r.start) - 1
        return i >= 0 and self._stops[i] >= r.stop

    def missing(self, r: Range) -> Iterator[Range]:
        """The parts of *r* that are not in the set, in order."""
        at = r.start
        i = bisect_right(self._stops, r.start)
        while at < r.stop and i < len(self._starts) and self._starts[i] < r.stop:
            if self._starts[i] > at:
                yield Range(at, self._starts[i])
            at = self._stops[i]
            i += 1
        if at < r.stop:
            yield Range(at, r.stop)

    def __iter__(self) -> Iterator[Range]:
        return (Range(a, b) for a, b in zip(self._starts, self._stops, strict=True))

    def __len__(self) -> int:
        """Number of ranges, not of bytes."""
        return len(self._starts)

    @property
    def byte_count(self) -> int:
        """Number of bytes in the set."""
        return sum(self._stops) - sum(self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"RangeSet([{', '.join(map(str, self))}])"
