"""The journal outlives whoever writes it, and a kill between any two steps."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ondemand.journal import SLOT_SIZE, Entry, Journal
from ondemand.wire import fanotify as wire

EVENT = wire.encode(wire.PreAccess(wire.EventFd(7), 1, 4096, 8192))


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("journal")
    yield fd
    os.close(fd)


def write_event(buffer: memoryview) -> None:
    """As the kernel does: all of it in one system call."""
    source, sink = os.pipe()
    os.write(sink, EVENT)
    assert os.readv(source, [buffer]) == len(EVENT)
    os.close(source)
    os.close(sink)


def test_a_new_journal_is_empty_and_all_there(fd: int) -> None:
    journal = Journal.create(fd, 100)
    assert os.fstat(fd).st_size == 100 * SLOT_SIZE
    assert os.fstat(fd).st_blocks * 512 >= 100 * SLOT_SIZE
    assert (journal.slot_count, journal.free_count) == (100, 100)
    assert list(journal.entries()) == []


def test_a_successor_finds_what_was_read(fd: int) -> None:
    journal = Journal.create(fd, 4)
    slots, buffers = journal.claim(2)
    write_event(buffers[0])
    journal.identify(slots[0], (11, 22))
    write_event(buffers[1])  # killed here, before the identity
    successor = Journal(fd)
    assert sorted(successor.entries(), key=lambda entry: entry.slot) == sorted(
        [Entry(slots[0], EVENT, (11, 22)), Entry(slots[1], EVENT, None)], key=lambda entry: entry.slot
    )
    assert successor.free_count == 2


def test_a_killed_claim_leaves_nothing_behind(fd: int) -> None:
    Journal.create(fd, 4).claim(3)
    successor = Journal(fd)
    assert list(successor.entries()) == []
    assert successor.free_count == 4


def test_a_cleared_slot_keeps_no_identity_for_the_next_event(fd: int) -> None:
    journal = Journal.create(fd, 1)
    [slot], [buffer] = journal.claim(1)
    write_event(buffer)
    journal.identify(slot, (11, 22))
    journal.clear(slot)
    assert list(Journal(fd).entries()) == []
    [slot], [buffer] = journal.claim(1)
    write_event(buffer)
    assert [entry.identity for entry in Journal(fd).entries()] == [None]


def test_no_more_slots_than_there_are(fd: int) -> None:
    journal = Journal.create(fd, 3)
    first, _ = journal.claim(2)
    second, _ = journal.claim(2)
    assert (len(first), len(second), journal.free_count) == (2, 1, 0)
    assert journal.claim(2) == ([], [])
    journal.unclaim(second)
    assert journal.claim(2)[0] == second
    assert len({*first, *second}) == 3


def test_claiming_none_claims_none(fd: int) -> None:
    journal = Journal.create(fd, 3)
    assert journal.claim(0) == ([], [])
    assert journal.free_count == 3


@pytest.mark.parametrize("size", [0, 63, 100])
def test_what_is_no_journal_is_refused(fd: int, size: int) -> None:
    os.ftruncate(fd, size)
    with pytest.raises(ValueError, match="journal"):
        Journal(fd)


def test_closing_leaves_the_memory_to_the_others(fd: int) -> None:
    journal = Journal.create(fd, 2)
    _, buffers = journal.claim(1)
    write_event(buffers[0])
    del buffers
    journal.close()
    assert [entry.event for entry in Journal(fd).entries()] == [EVENT]
