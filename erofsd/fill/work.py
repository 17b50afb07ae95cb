"""What a thread does with stored bytes: decompress, verify, write. One hop for all three.

Touches nothing but its own job. The order is the promise: nothing is written that was not verified, nothing
is noted in the map that was not written.
"""

from __future__ import annotations

import errno
import mmap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from erofsd.blobs.chunkmap import ChunkMap
from erofsd.blobs.layout import BlobLayout
from erofsd.blobs.store import BLOCK_SIZE, aligned
from erofsd.blobs.units import DIGESTERS, codec_named
from erofsd.errors import BlobCorrupt, CacheFull, ErofsdError
from ondemand.provider import Sink

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM})


class Buffers:
    """Page-aligned memory, reused: fresh pages for each chunk cost two threads half of their speed.

    Args:
        keep_bytes: Unused memory that is kept at most.
    """

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._kept_bytes = 0
        self._free: dict[int, list[mmap.mmap]] = {}

    def take(self, size: int) -> mmap.mmap:
        """Memory of at least *size* bytes, with anything in it."""
        room = max(64 << 10, 1 << (size - 1).bit_length())
        free = self._free.get(room)
        if free:
            self._kept_bytes -= room
            return free.pop()
        return mmap.mmap(-1, room, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def give(self, buffer: mmap.mmap) -> None:
        """Take *buffer* back. Views of it may still exist, but are not used any more."""
        if self._kept_bytes + len(buffer) <= self._keep_bytes:
            self._kept_bytes += len(buffer)
            self._free.setdefault(len(buffer), []).append(buffer)


@dataclass(frozen=True, slots=True)
class Part:
    """The stored bytes of one unit, complete.

    Attributes:
        chunks: Those of its chunks that are wanted, with the digest of each (empty: nothing to verify).
        memory: Whose view ``stored`` is; parts of one memory that follow each other there can be one write.
    """

    unit: int
    stored: memoryview
    chunks: Sequence[tuple[int, bytes]]
    memory: object
    start: int


@dataclass(slots=True)
class Job:
    """Units that make one hop, and what became of them.

    Attributes:
        out: Room for the decoded chunks, each padded to whole blocks; None where nothing is decoded.
        scratch: Room for the largest unit that does not decode straight into ``out``; None without one.
        landed: Chunks that are verified, written and noted.
        failed: Chunks with the error that hit them.
        stale: Bits were taken away in the meantime, so that nothing was noted.
    """

    layout: BlobLayout
    parts: list[Part]
    sink: Sink
    map: ChunkMap
    epoch: int
    out: memoryview | None = None
    scratch: memoryview | None = None
    landed: list[int] = field(default_factory=list)
    failed: list[tuple[list[int], ErofsdError]] = field(default_factory=list)
    stale: bool = False
    decode_s: float = 0.0
    digest_s: float = 0.0
    write_s: float = 0.0

    def run(self) -> None:
        """Do it. Every wanted chunk is in ``landed`` or ``failed`` afterwards, unless it is ``stale``."""
        writes: list[_Write] = []
        at = 0
        for part in self.parts:
            at = self._decode(part, at, writes)
        self._write(writes)
        if self.landed:
            self.landed.sort()
            try:
                self.stale = not self.map.persist(self.landed, self.epoch)
            except OSError as exc:
                self.failed.append((self.landed, _disk_error(exc)))
                self.landed = []

    def _decode(self, part: Part, at: int, writes: list[_Write]) -> int:
        """Decode and verify one unit, with room in ``out`` from *at* on; returns what is free then."""
        layout = self.layout
        began = time.perf_counter()
        try:
            if not layout.unit_packed[part.unit]:
                decoded = part.stored
                if len(decoded) != layout.unit_size[part.unit]:
                    raise BlobCorrupt(
                        f"{len(decoded)} bytes stored as they are, not {layout.unit_size[part.unit]}"
                    )
            else:
                decoded = self._room(part, at)
                codec_named(layout.codec).decompress_into(part.stored, decoded)
        except ErofsdError as exc:
            self.failed.append(([chunk for chunk, _ in part.chunks], exc))
            return at
        finally:
            self.decode_s += time.perf_counter() - began
        for chunk, digest in part.chunks:
            start, size = layout.chunk_at[chunk], layout.chunk_size[chunk]
            data = decoded[start : start + size]
            if (error := self._verify(data, size, digest)) is not None:
                self.failed.append(([chunk], error))
                continue
            at = self._place(part, chunk, data, at, writes)
        return at

    def _room(self, part: Part, at: int) -> memoryview:
        """Where to decompress: in place if the unit is one chunk, else beside."""
        size = self.layout.unit_size[part.unit]
        if self._is_one_chunk(part):
            assert self.out is not None
            return self.out[at : at + size]
        assert self.scratch is not None
        return self.scratch[:size]

    def _is_one_chunk(self, part: Part) -> bool:
        layout = self.layout
        chunk = part.chunks[0][0]
        return (
            len(part.chunks) == 1
            and layout.chunk_at[chunk] == 0
            and layout.chunk_size[chunk] == layout.unit_size[part.unit]
        )

    def _verify(self, data: memoryview, size: int, digest: bytes) -> BlobCorrupt | None:
        if len(data) != size:
            return BlobCorrupt(f"its unit ends {size - len(data)} bytes before it does")
        if not digest:
            return None  # pinned as a whole: see BlobLayout.pin
        assert self.layout.digester is not None
        began = time.perf_counter()
        found = DIGESTERS[self.layout.digester](data)
        self.digest_s += time.perf_counter() - began
        if found == digest:
            return None
        return BlobCorrupt(f"{self.layout.digester} is {found.hex()}, the image says {digest.hex()}")

    def _place(self, part: Part, chunk: int, data: memoryview, at: int, writes: list[_Write]) -> int:
        """Arrange for *data* to be written in whole blocks."""
        offset, size = self.layout.chunk_offset[chunk], len(data)
        if size % BLOCK_SIZE == 0 and not self.layout.unit_packed[part.unit]:
            _append(writes, offset, part.memory, part.start + self.layout.chunk_at[chunk], data, chunk)
            return at
        assert self.out is not None
        room = self.out[at : at + aligned(size)]
        if not self._is_one_chunk(part) or not self.layout.unit_packed[part.unit]:
            room[:size] = data
        room[size:] = bytes(len(room) - size)
        _append(writes, offset, self.out.obj, at, room, chunk)
        return at + len(room)

    def _write(self, writes: list[_Write]) -> None:
        began = time.perf_counter()
        error: ErofsdError | None = None
        for write in writes:
            if error is None:
                try:
                    self.sink.write(write.offset, write.view())
                    self.landed += write.chunks
                    continue
                except OSError as exc:
                    error = _disk_error(exc)
            self.failed.append((write.chunks, error))
        self.write_s += time.perf_counter() - began


@dataclass(slots=True)
class _Write:
    """Chunks that lie side by side both in memory and in the blob."""

    offset: int
    memory: object
    start: int
    views: list[memoryview]
    length: int
    chunks: list[int]

    def view(self) -> memoryview:
        if len(self.views) == 1:
            return self.views[0]
        assert isinstance(self.memory, bytes | mmap.mmap)
        return memoryview(self.memory)[self.start : self.start + self.length]


def _append(
    writes: list[_Write], offset: int, memory: object, start: int, view: memoryview, chunk: int
) -> None:
    if writes:
        last = writes[-1]
        if (
            last.memory is memory
            and last.start + last.length == start
            and last.offset + last.length == offset
        ):
            last.views.append(view)
            last.length += len(view)
            last.chunks.append(chunk)
            return
    writes.append(_Write(offset, memory, start, [view], len(view), [chunk]))


def _disk_error(exc: OSError) -> ErofsdError:
    text = f"cache cannot be written: {exc.strerror or exc}"
    if exc.errno in _NO_ROOM:
        return CacheFull(text, hint="make room where state_dir is")
    return ErofsdError(text)
