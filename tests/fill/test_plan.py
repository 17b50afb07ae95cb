"""What is fetched for which reads."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from erofsd.blobs.layout import BlobLayout, uniform_layout
from erofsd.fill import plan
from erofsd.fill.plan import DEFAULT_POLICY, KIB, MIB, Policy, Stream, Streams
from ondemand.ranges import Range
from tests.fill.images import build, content

SMALL = uniform_layout("small", 64 * MIB, pin="p")  # pieces of 64 KiB
LARGE = uniform_layout("large", 64 * MIB, pin="p", piece_size=MIB)

layouts = st.lists(st.integers(1, 40_000), min_size=1, max_size=40).map(
    lambda sizes: build([content(size, size) for size in sizes], codec="none").layout
)


@given(layouts, st.data())
def test_runs_cover_each_unit_once_and_in_order(layout: BlobLayout, data: st.DataObject) -> None:
    units = sorted(data.draw(st.sets(st.integers(0, layout.unit_count - 1))))
    policy = replace(
        DEFAULT_POLICY, run=data.draw(st.integers(1, 200_000)), gap=data.draw(st.integers(0, 50_000))
    )
    runs = list(plan.runs(layout, units, policy))
    assert [unit for run in runs for unit in run.units] == units
    for run in runs:
        first, last = run.units[0], run.units[-1]
        assert run.compressed.start == layout.unit_offset[first]
        assert run.compressed.stop == layout.unit_offset[last] + layout.unit_stored[last]
        assert len(run.units) == 1 or len(run.compressed) <= policy.run
        for one, two in zip(run.units, run.units[1:], strict=False):
            gap = layout.unit_offset[two] - layout.unit_offset[one] - layout.unit_stored[one]
            assert gap <= policy.gap


@given(layouts, st.data())
def test_widening_adds_only_wanted_units_within_the_budget(layout: BlobLayout, data: st.DataObject) -> None:
    unit = data.draw(st.integers(0, layout.unit_count - 1))
    wanted = data.draw(st.sets(st.integers(0, layout.unit_count - 1)))
    budget = data.draw(st.integers(0, 300_000))
    units = plan.widen(layout, [unit], wanted.__contains__, budget)
    assert units[0] == unit
    assert units == sorted(set(units))
    assert set(units[1:]) <= wanted
    last = units[-1]
    if last != unit:
        assert layout.unit_offset[last] + layout.unit_stored[last] - layout.unit_offset[unit] <= budget


def test_a_random_miss_may_cost_as_much_as_its_round_trip() -> None:
    assert DEFAULT_POLICY.random(0.0, 0.0) == 256 * KIB
    assert DEFAULT_POLICY.random(0.003, 125e6) == 375_000
    assert DEFAULT_POLICY.random(0.05, 125e6) == 512 * KIB


def test_random_reads_are_no_stream() -> None:
    streams = Streams(DEFAULT_POLICY)
    for i in range(200):
        offset = (i * 7919) % 60 * MIB
        assert streams.seen(Range.of(offset, 4096)).window == 0


def test_one_read_in_each_megabyte_is_no_stream() -> None:
    streams = Streams(DEFAULT_POLICY)
    assert not any(streams.seen(Range.of(i * MIB, 4096)).window for i in range(64))


def test_a_sequential_reader_gets_a_window_that_doubles_up_to_its_limit() -> None:
    streams = Streams(DEFAULT_POLICY)
    windows = [streams.seen(Range.of(i * 128 * KIB, 128 * KIB)).window for i in range(400)]
    assert windows[0] == 0
    assert sorted(set(windows)) == [0, *(MIB << i for i in range(5))]
    assert windows == sorted(windows)


def test_many_sequential_readers_are_told_apart() -> None:
    streams = Streams(DEFAULT_POLICY)
    for i in range(100):
        for reader in range(8):
            stream = streams.seen(Range.of(reader * 100 * MIB + i * 64 * KIB, 64 * KIB))
    assert stream.window >= 2 * MIB
    assert streams.seen(Range.of(100 * 64 * KIB, 4096)).window >= 2 * MIB


def test_reading_again_what_was_read_moves_no_window() -> None:
    streams = Streams(DEFAULT_POLICY)
    for _ in range(100):
        assert streams.seen(Range.of(0, 256 * KIB)).window == 0


@given(st.lists(st.integers(0, 600), min_size=1, max_size=80), st.sampled_from([SMALL, LARGE]))
def test_what_is_fetched_ahead_stays_in_the_window_and_is_given_out_once(
    steps: list[int], layout: BlobLayout
) -> None:
    policy = Policy()
    stream = Stream(next=0, travelled=0)
    given_out: list[int] = []
    for step in steps:
        want = Range.of(stream.next, step * KIB).clamp(layout.size)
        stream.went(want, policy)
        units = plan.ahead(layout, stream, policy)
        given_out += units
        at = plan.unit_at(layout, stream.next)
        for unit in units:
            assert unit >= at
            assert layout.unit_offset[unit] < layout.unit_offset[at] + policy.window_max
    assert given_out == sorted(set(given_out))


def test_requests_ahead_of_a_fast_reader_are_long() -> None:
    stream = Stream(next=0, travelled=0, window=16 * MIB)
    sizes = []
    for i in range(64):
        stream.next = i * 128 * KIB
        sizes.append(len(plan.ahead(SMALL, stream, DEFAULT_POLICY)) * 64 * KIB)
    assert sizes[0] == 16 * MIB
    assert all(size == 0 or size >= 2 * MIB for size in sizes[1:])


@given(layouts, st.integers(0, 1_000_000))
def test_the_unit_at_an_offset_is_that_of_the_chunk_there_or_after(layout: BlobLayout, offset: int) -> None:
    unit = plan.unit_at(layout, offset)
    chunks = layout.chunks_in(Range(offset, max(layout.size, offset)))
    assert unit == (layout.chunk_unit[chunks.start] if chunks else layout.unit_count)
