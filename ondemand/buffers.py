"""Page-aligned memory for direct I/O, reused.

A cache file is written around the page cache: the kernel takes no memory that is not aligned, and Python's
bytes never are.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ondemand import syscalls

ALIGNMENT = mmap.PAGESIZE
BUFFER_SIZE = 1 << 20
KEPT_MAX = 4
"""Most unused buffers that are kept: about as many as threads that write at the same time."""


def is_aligned(data: memoryview) -> bool:
    """True if *data* begins on a page."""
    return syscalls.address_of(data) % ALIGNMENT == 0


class AlignedBuffers:
    """Buffers of one size. Usable from any thread."""

    def __init__(self, size: int = BUFFER_SIZE, kept_max: int = KEPT_MAX) -> None:
        self.size = size
        self._kept_max = kept_max
        self._kept: list[mmap.mmap] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self) -> Iterator[memoryview]:
        """One of them, with anything in it, until the end of the block."""
        with self._lock:
            buffer = self._kept.pop() if self._kept else None
        if buffer is None:
            buffer = mmap.mmap(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            yield memoryview(buffer)
        finally:
            with self._lock:
                if len(self._kept) < self._kept_max:
                    self._kept.append(buffer)

    def pieces(self, data: memoryview) -> Iterator[memoryview]:
        """*data* in aligned pieces: itself if it is aligned, else one copy after the other.

        A piece is good until the next one is asked for.
        """
        if is_aligned(data):
            yield data
            return
        with self.borrow() as buffer:
            for start in range(0, len(data), self.size):
                piece = data[start : start + self.size]
                buffer[: len(piece)] = piece
                yield buffer[: len(piece)]
