"""Which events were read and not yet answered, in memory that outlives the process that read them.

The kernel matches answers by number only and offers an event once. If the process that read it is killed,
somebody else has to know the number, or its reader waits for ever, and the range, or its reader sees zeros.
So the kernel itself writes each event into shared memory: ``readv(group, [slot])`` copies it there before a
SIGKILL can take effect, and no event is ever read and not noted. (Reading into private memory and noting it
afterwards left 21 of 44,000 events unknown in 58 kills.)

A slot has 64 bytes: 48 for the event, then device and inode number of the file it is about, written by the
reading process right after fstat(). A kill between the two leaves an *unidentified* event.

What makes each step safe against a kill before and after it:

- A slot is free if its event length is 0; that is one store, so a slot is free or it is not.
- The identity of a free slot is zero, or left over from a kill; `claim` zeroes it before the slot is used.
- Of the identity the device is written first: it counts only once the inode, never 0, is there.

The memory is a memfd, so its pages exist from the beginning and writing to them cannot fail. Each slot is
touched by one process at a time: a worker gets the journal after its predecessor is dead.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

from ondemand.wire.fanotify import EVENT_SIZE

SLOT_SIZE = 64
SLOT_COUNT = 4096
"""Most events in flight. Further ones stay in the kernel's queue, which has no bound."""

_WORDS = SLOT_SIZE // 8
_LENGTHS = SLOT_SIZE // 4
_DEVICE_WORD = EVENT_SIZE // 8
_INODE_WORD = _DEVICE_WORD + 1


@dataclass(frozen=True, slots=True)
class Entry:
    """An event that a dead process had read.

    Attributes:
        event: What the kernel wrote, as many bytes as it says it has.
        identity: ``(st_dev, st_ino)`` of the file, None if the process was killed before it wrote that.
    """

    slot: int
    event: bytes
    identity: tuple[int, int] | None


class Journal:
    """Slots in shared memory.

    Args:
        fd: A memfd that `create` has prepared; belongs to the caller, who hands it to the successors.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        size = os.fstat(fd).st_size
        if size == 0 or size % SLOT_SIZE:
            raise ValueError(f"a journal of {size} bytes")
        self.slot_count = size // SLOT_SIZE
        self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        self._lengths = self._bytes.cast("I")  # event_len is the first word of 32 bits of an event
        self._events: dict[int, memoryview] = {}  # views of slots in use so far; few, because LIFO
        self._free = [slot for slot in reversed(range(self.slot_count)) if not self._length(slot)]

    @classmethod
    def create(cls, fd: int, slot_count: int = SLOT_COUNT) -> Journal:
        """Make an empty journal of *fd*, a new memfd; all of its memory is there afterwards."""
        os.ftruncate(fd, slot_count * SLOT_SIZE)
        os.posix_fallocate(fd, 0, slot_count * SLOT_SIZE)
        return cls(fd)

    @property
    def free_count(self) -> int:
        """Number of events that may still be read."""
        return len(self._free)

    def entries(self) -> Iterator[Entry]:
        """The events in the journal; after a crash, the ones that nobody answered."""
        for slot in range(self.slot_count):
            if length := self._length(slot):
                start, word = slot * SLOT_SIZE, slot * _WORDS
                device, inode = self._words[word + _DEVICE_WORD], self._words[word + _INODE_WORD]
                event = bytes(self._bytes[start : start + min(length, EVENT_SIZE)])
                yield Entry(slot, event, (device, inode) if inode else None)

    def claim(self, count: int) -> tuple[list[int], list[memoryview]]:
        """Up to *count* free slots, and the memory for their events, for one readv().

        They are in use once the kernel has written an event; give the others back with `unclaim`.
        """
        slots = self._free[: -count - 1 : -1]
        del self._free[len(self._free) - len(slots) :]
        for slot in slots:
            self._words[slot * _WORDS + _INODE_WORD] = 0
        return slots, [self._events.get(slot) or self._view(slot) for slot in slots]

    def unclaim(self, slots: list[int]) -> None:
        """Take back claimed slots that got no event."""
        self._free.extend(reversed(slots))

    def identify(self, slot: int, identity: tuple[int, int]) -> None:
        """Note which file the event in *slot* is about."""
        word = slot * _WORDS
        self._words[word + _DEVICE_WORD], self._words[word + _INODE_WORD] = identity

    def clear(self, slot: int) -> None:
        """The event in *slot* has been answered: free the slot."""
        self._lengths[slot * _LENGTHS] = 0
        self._free.append(slot)

    def close(self) -> None:
        """Unmap; the descriptor stays the caller's."""
        for view in self._events.values():
            view.release()
        self._events.clear()
        self._words.release()
        self._lengths.release()
        self._bytes.release()
        try:
            self._map.close()
        except BufferError:
            pass  # somebody, a traceback perhaps, still has a slot's memory: unmapped with that

    def _length(self, slot: int) -> int:
        return self._lengths[slot * _LENGTHS]

    def _view(self, slot: int) -> memoryview:
        start = slot * SLOT_SIZE
        view = self._events[slot] = self._bytes[start : start + EVENT_SIZE]
        return view
