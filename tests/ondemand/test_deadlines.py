"""However the kernel splits a read into requests, its EIO comes within the deadline."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ondemand.deadlines import Deadlines
from ondemand.provider import ObjectKey
from ondemand.ranges import Range

KEY, OTHER = ObjectKey(b"first"), ObjectKey(b"second")
PAGE = 4096
DEADLINE_S = 60.0


def pages(first: int, count: int) -> Range:
    return Range.of(first * PAGE, count * PAGE)


def hang(deadlines: Deadlines, requests: list[tuple[ObjectKey, Range]], now: float, pid: int = 7) -> float:
    """Nobody ever fills anything; returns when the last request is denied."""
    for key, want in requests:
        budget = deadlines.admit(key, want, pid, now)
        assert budget.expires >= now
        now = budget.expires
        deadlines.denied(key, want, pid, budget, now)
        now += 0.0001
    return now


def test_the_second_asking_gets_what_is_left() -> None:
    deadlines = Deadlines(DEADLINE_S)
    first = deadlines.admit(KEY, pages(0, 32), 7, 100.0)
    assert first.expires == 100.0 + 0.6 * DEADLINE_S
    deadlines.denied(KEY, pages(0, 32), 7, first, first.expires)
    second = deadlines.admit(KEY, pages(0, 1), 7, first.expires + 0.001)
    assert second.start == 100.0
    assert second.expires == 100.0 + 0.85 * DEADLINE_S


def test_another_process_that_waited_for_the_same_pages_follows_too() -> None:
    deadlines = Deadlines(DEADLINE_S)
    now = hang(deadlines, [(KEY, pages(0, 32))], 100.0)
    assert deadlines.admit(KEY, pages(31, 1), 8, now).start == 100.0


def test_a_strange_read_gets_a_full_budget() -> None:
    deadlines = Deadlines(DEADLINE_S)
    now = hang(deadlines, [(KEY, pages(0, 32))], 100.0)
    assert deadlines.admit(OTHER, pages(0, 32), 8, now).start == now
    assert deadlines.admit(KEY, pages(100, 1), 8, now).start == now
    assert deadlines.admit(KEY, pages(100, 1), 0, now).start == now


def test_a_read_that_was_refused_for_good_may_be_tried_afresh() -> None:
    deadlines = Deadlines(DEADLINE_S)
    now = hang(deadlines, [(KEY, pages(0, 32)), (KEY, pages(0, 1))], 100.0)
    assert deadlines.admit(KEY, pages(0, 1), 7, now + 0.1).start == now + 0.1


def test_a_page_fault_asks_a_third_time_and_does_not_start_afresh() -> None:
    deadlines = Deadlines(DEADLINE_S)
    end = hang(
        deadlines, [(KEY, pages(0, 31)), (KEY, pages(31, 1)), (KEY, pages(0, 1)), (KEY, pages(0, 1))], 0.0
    )
    assert end <= DEADLINE_S


def test_eight_readers_who_waited_for_one_page_are_all_refused_in_time() -> None:
    deadlines = Deadlines(DEADLINE_S)
    now = hang(deadlines, [(KEY, pages(0, 32)), (KEY, pages(0, 1))], 0.0)
    for _ in range(7):  # the page was locked while the first one waited, and each asks for itself
        now = hang(deadlines, [(KEY, pages(0, 1))], now + 0.01)
    assert now <= DEADLINE_S


def test_a_later_read_starts_afresh() -> None:
    deadlines = Deadlines(DEADLINE_S)
    now = hang(deadlines, [(KEY, pages(0, 32))], 100.0)
    assert deadlines.admit(KEY, pages(0, 1), 7, now + 1.1).start == now + 1.1
    assert deadlines.admit(KEY, pages(0, 1), 7, 100.0 + DEADLINE_S + 0.1).start > 100.0


def test_a_denial_at_once_costs_nothing() -> None:
    deadlines = Deadlines(DEADLINE_S)
    budget = deadlines.admit(KEY, pages(0, 32), 7, 100.0)
    deadlines.denied(KEY, pages(0, 32), 7, budget, 100.01)
    assert deadlines.admit(KEY, pages(0, 1), 7, 100.011).start == 100.011


@given(
    st.lists(st.tuples(st.sampled_from([KEY, OTHER]), st.integers(0, 500), st.integers(1, 64)), max_size=40),
    st.floats(0.5, 600.0),
)
def test_no_split_exceeds_the_deadline(pieces: list[tuple[ObjectKey, int, int]], deadline_s: float) -> None:
    """Any number of pieces that never come, and the first page again, twice."""
    seen: set[tuple[ObjectKey, Range]] = set()
    requests = []
    for key, first, count in pieces:
        piece = (key, pages(first, count))
        if not any(k == key and want.overlaps(piece[1]) for k, want in seen):  # readahead asks once for each
            seen.add(piece)
            requests.append(piece)
    if requests:
        key, want = requests[0]
        requests += [(key, Range.of(want.start, PAGE))] * 2
    assert hang(Deadlines(deadline_s), requests, 0.0) <= deadline_s + 0.0001 * len(requests)
