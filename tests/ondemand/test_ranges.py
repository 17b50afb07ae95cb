"""Byte ranges, and sets of them against Python's own sets."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondemand.ranges import Range, RangeSet

points = st.integers(0, 40)
ranges = st.tuples(points, points).map(lambda pair: Range(min(pair), max(pair)))


def bytes_of(*parts: Range) -> set[int]:
    return {n for part in parts for n in range(part.start, part.stop)}


@pytest.mark.parametrize(("start", "stop"), [(-1, 0), (2, 1), (-2, -1)])
def test_what_is_no_range_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not a range"):
        Range(start, stop)


@given(ranges, ranges)
def test_a_range_is_the_set_of_its_bytes(a: Range, b: Range) -> None:
    assert len(a) == len(bytes_of(a))
    assert bool(a) == bool(bytes_of(a))
    assert a.overlaps(b) == bool(bytes_of(a) & bytes_of(b))
    assert a.covers(b) == (bytes_of(a) >= bytes_of(b))


@given(ranges, points)
def test_clamp_keeps_what_lies_below(a: Range, size: int) -> None:
    assert bytes_of(a.clamp(size)) == {n for n in bytes_of(a) if n < size}


@given(ranges, st.integers(1, 16))
def test_aligned_is_the_smallest_cover_of_whole_blocks(a: Range, block_size: int) -> None:
    whole = a.aligned(block_size)
    assert whole.covers(a)
    assert whole.start % block_size == whole.stop % block_size == 0
    assert a.start - whole.start < block_size
    assert whole.stop - a.stop < block_size


@given(st.lists(st.tuples(st.booleans(), ranges)), ranges)
def test_a_range_set_is_the_set_of_its_bytes(steps: list[tuple[bool, Range]], probe: Range) -> None:
    ours, theirs = RangeSet(), set[int]()
    for add, part in steps:
        if add:
            ours.add(part)
            theirs |= bytes_of(part)
        else:
            ours.discard(part)
            theirs -= bytes_of(part)
        parts = list(ours)
        assert bytes_of(*parts) == theirs
        assert all(a.stop < b.start for a, b in pairwise(parts))
        assert all(parts)
    assert ours.byte_count == len(theirs)
    assert ours.covers(probe) == (theirs >= bytes_of(probe))
    assert bytes_of(*ours.missing(probe)) == bytes_of(probe) - theirs
    assert ours == RangeSet(reversed(list(ours)))
