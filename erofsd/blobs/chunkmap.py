"""Which chunks of a stored blob are there, in a file that survives every crash.

Theory of operation. Three columns and who may trust them:

- **state**, one byte a chunk, written after the chunk's verified data and through the same page cache. A
  killed process leaves it no further than the data; a power failure may leave it ahead. So it is trusted
  while the boot id in the header is the running kernel's.
- **durable**, a snapshot of state in one of two slots, written only after fdatasync of the data, so that
  it is trusted after a reboot. The slots alternate; each carries a generation and a CRC, and a torn one
  loses to its neighbour.
- **claims**: for each chunk the digest it was verified against (or will be), see ``erofsd.blobs.store``.

A state byte is ``PRESENT`` or it means nothing: a file of zeros, of ones or of noise claims next to nothing,
and what it still claims must be backed by allocated blocks (`ChunkMap.reconcile`).

Bits are also taken away: by eviction, and when a blob is spoilt. A thread that is just writing a chunk must
not bring such a bit back, so each taking starts a new *epoch*, and marks of an older one are refused.
"""

from __future__ import annotations

import os
import re
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from erofsd.blobs.layout import DIGEST_SIZE, BlobLayout
from ondemand.ranges import Range, RangeSet

MAGIC = b"erofsdCM"
VERSION = 1
HEADER = struct.Struct("<8sIIQ32s16sI")  # magic, version, digest size, chunk count, identity, boot id, CRC
SLOT = struct.Struct("<QII")  # generation, CRC of what follows and of the generation, 0
PRESENT = 0xA7
PAGE_SIZE = 4096
BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")

_TO_FILE = bytes([0, PRESENT]) + bytes(254)
_FROM_FILE = bytes(1 if value == PRESENT else 0 for value in range(256))
_ONES = re.compile(b"\x01+")


class MapRefused(Exception):
    """A map file that is damaged or not for this blob."""


def boot_id() -> bytes:
    """The running kernel's boot id, 16 bytes."""
    return bytes.fromhex(BOOT_ID_PATH.read_text().strip().replace("-", ""))


def both(a: bytes | bytearray, b: bytes | bytearray) -> bytes:
    """Bytewise AND of two columns of 0 and 1."""
    return (int.from_bytes(a, "little") & int.from_bytes(b, "little")).to_bytes(len(a), "little")


def without(a: bytes | bytearray, b: bytes | bytearray) -> bytes:
    """Those of column *a* that are not in column *b*."""
    return (int.from_bytes(a, "little") & ~int.from_bytes(b, "little")).to_bytes(len(a), "little")


def spans(column: bytes) -> Iterator[tuple[int, int]]:
    """Runs of ones in a column of 0 and 1, as half-open index ranges."""
    return (match.span() for match in _ONES.finditer(column))


def runs(chunks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending chunk indexes as half-open index ranges."""
    first = last = -1
    for chunk in chunks:
        if chunk != last:
            if last > first:
                yield first, last
            first = chunk
        last = chunk + 1
    if last > first:
        yield first, last


def _pages(length: int) -> int:
    return -(-length // PAGE_SIZE) * PAGE_SIZE


class ChunkMap:
    """The map of one stored blob. Lives on the event loop's thread, but for `persist` and `write_durable`.

    Attributes:
        present: One byte a chunk, 1 where verified data are there. Read it; change it by methods only.
        durable: The same, for what is known to survive a power failure.
        epoch: Grows with every taking away; see above.
    """

    def __init__(self, fd: int, path: Path, chunk_count: int, identity: bytes, digest_size: int) -> None:
        self._fd = fd
        self._path = path
        self._lock = threading.Lock()
        self._identity = identity
        self._digest_size = digest_size
        self._generation = 0
        self._claims_synced = False
        self.chunk_count = chunk_count
        self.present = bytearray(chunk_count)
        self.durable = bytearray(chunk_count)
        self.epoch = 0
        self._state_at = PAGE_SIZE
        slot_size = _pages(SLOT.size + chunk_count)
        first = self._state_at + _pages(chunk_count)
        self._slots_at = (first, first + slot_size)
        self._claimed_at = first + 2 * slot_size
        self._digests_at = self._claimed_at + _pages(chunk_count)
        self._file_size = self._digests_at + _pages(chunk_count * digest_size)

    @classmethod
    def create(cls, path: Path, chunk_count: int, identity: bytes, digest_size: int) -> ChunkMap:
        """A new map without a bit, in place of whatever *path* was.

        Raises:
            OSError: ENOSPC and its kin; nothing is left at *path*.
        """
        fresh = path.with_name(path.name + ".new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self = cls(fd, path, chunk_count, identity, digest_size)
            # Zeros are written, not left as a hole: a later bit must not fail for want of space.
            os.posix_fallocate(fd, 0, self._file_size)
            self._write_header()
            os.rename(fresh, path)
        except BaseException:
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise
        return self

    @classmethod
    def open(cls, path: Path, chunk_count: int, identity: bytes, digest_size: int) -> ChunkMap | None:
        """The map at *path*; None if it is sound but another blob's.

        Raises:
            FileNotFoundError: There is none.
            MapRefused: It is damaged; the message says how.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            header = cls._read_header(fd)
            if header[:3] != (digest_size, chunk_count, identity):
                os.close(fd)
                return None
            self = cls(fd, path, chunk_count, identity, digest_size)
            if os.fstat(fd).st_size != self._file_size:
                raise MapRefused(f"{os.fstat(fd).st_size} bytes, {self._file_size} expected")
            self._load(same_boot=header[3] == boot_id())
        except BaseException:
            os.close(fd)
            raise
        return self

    @staticmethod
    def _read_header(fd: int) -> tuple[int, int, bytes, bytes]:
        raw = os.pread(fd, HEADER.size, 0)
        if len(raw) != HEADER.size:
            raise MapRefused(f"header is {len(raw)} bytes")
        magic, version, digest_size, chunk_count, identity, boot, crc = HEADER.unpack(raw)
        if magic != MAGIC or crc != zlib.crc32(raw[:-4]):
            raise MapRefused("header is damaged")
        if version != VERSION:
            raise MapRefused(f"version {version}, not {VERSION}")
        return digest_size, chunk_count, identity, boot

    def _write_header(self) -> None:
        raw = HEADER.pack(MAGIC, VERSION, self._digest_size, self.chunk_count, self._identity, boot_id(), 0)[
            :-4
        ]
        self._pwrite(raw + zlib.crc32(raw).to_bytes(4, "little"), 0)

    def _load(self, *, same_boot: bool) -> None:
        claimed = self._read_column(self._claimed_at)
        self._generation, durable = max(self._read_slot(at) for at in self._slots_at)
        if same_boot:
            self.present[:] = both(claimed, self._read_column(self._state_at))
            self.durable[:] = both(durable, self.present)
            return
        self.present[:] = both(claimed, durable)
        self.durable[:] = self.present
        self._write_state()  # before the header: it makes the state column trusted
        self._write_header()

    def _read_slot(self, at: int) -> tuple[int, bytes]:
        generation, crc, _ = SLOT.unpack(self._pread(SLOT.size, at))
        column = self._pread(self.chunk_count, at + SLOT.size)
        if crc != zlib.crc32(column, generation & 0xFFFFFFFF):
            return 0, bytes(self.chunk_count)
        return generation, column.translate(_FROM_FILE)

    def _read_column(self, at: int) -> bytes:
        return self._pread(self.chunk_count, at).translate(_FROM_FILE)

    def _write_state(self) -> None:
        self._pwrite(bytes(self.present).translate(_TO_FILE), self._state_at)

    def _pread(self, length: int, offset: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        if len(data) != length:
            raise MapRefused(f"ends at {offset + len(data)}")
        return data

    def _pwrite(self, data: bytes, offset: int) -> None:
        while data:
            count = os.pwrite(self._fd, data, offset)
            data, offset = data[count:], offset + count

    # -- bits that come ---------------------------------------------------------------------------------

    def persist(self, chunks: Iterable[int], epoch: int) -> bool:
        """Note in the file that the data of *chunks*, ascending, have been written. Any thread.

        Returns:
            False if bits were taken away since *epoch*: then the data may be gone, and nothing was noted.

        Raises:
            OSError: The map cannot be written.
        """
        with self._lock:
            if epoch != self.epoch:
                return False
            for first, last in runs(chunks):
                self._pwrite(bytes([PRESENT]) * (last - first), self._state_at + first)
        return True

    def mark(self, chunks: Iterable[int], epoch: int) -> list[int]:
        """Make *chunks* present, once `persist` said True.

        Returns:
            Those that were not before; none if bits were taken away since *epoch*.
        """
        if epoch != self.epoch:
            return []
        fresh = [chunk for chunk in chunks if not self.present[chunk]]
        for chunk in fresh:
            self.present[chunk] = 1
        return fresh

    @property
    def is_durable(self) -> bool:
        """True if everything that is present would survive a power failure."""
        return self.present == self.durable

    def write_durable(self, present: bytes, epoch: int) -> bool:
        """Note that *present*, a copy of that column, survives a power failure, as its data do. Any thread.

        Returns:
            False if bits were taken away since *epoch*; nothing was noted.

        Raises:
            OSError: The map cannot be written or synced.
        """
        if not self._claims_synced:
            # On disk before any bit that relies on them.
            os.fdatasync(self._fd)
            self._claims_synced = True
        with self._lock:
            if epoch != self.epoch:
                return False
            self._write_slot(present)
        os.fdatasync(self._fd)
        return True

    def _write_slot(self, present: bytes) -> None:
        self._generation += 1
        column = present.translate(_TO_FILE)
        crc = zlib.crc32(column, self._generation & 0xFFFFFFFF)
        at = self._slots_at[self._generation % 2]
        self._pwrite(SLOT.pack(self._generation, crc, 0) + column, at)

    def durable_now(self, present: bytes, epoch: int) -> None:
        """`write_durable` of *present* has returned True."""
        if epoch == self.epoch:
            self.durable[:] = present

    # -- bits that go -----------------------------------------------------------------------------------

    def take(self, chunks: Iterable[int] | None = None) -> list[int]:
        """Make *chunks* (None: all) absent, on disk as well, before their data may go. Blocks: it syncs.

        Returns:
            Those that were present.

        Raises:
            OSError: The map cannot be written or synced: the data must stay.
        """
        with self._lock:
            self.epoch += 1
            gone = [c for c in (range(self.chunk_count) if chunks is None else chunks) if self.present[c]]
            for chunk in gone:
                self.present[chunk] = 0
                self.durable[chunk] = 0
            if chunks is None:
                self._write_state()
            else:
                for chunk in gone:
                    self._pwrite(b"\0", self._state_at + chunk)
            # Both slots: the older one must not win if the newer one is torn.
            self._write_slot(bytes(self.durable))
            self._write_slot(bytes(self.durable))
        os.fdatasync(self._fd)
        return gone

    def distrust(self) -> list[int]:
        """Forget what is not durable: the data could not be synced. Returns what was forgotten."""
        return self.take(
            [c for first, last in spans(without(self.present, self.durable)) for c in range(first, last)]
        )

    def reconcile(self, data: RangeSet, layout: BlobLayout) -> list[int]:
        """Take away bits of chunks that the file system does not have.

        Args:
            data: Allocated ranges of the data file (SEEK_DATA).

        Returns:
            The chunks that were taken away.
        """
        allocated = list(data)
        lost: list[int] = []
        at = 0
        for first, last in spans(bytes(self.present)):
            for chunk in range(first, last):
                start = layout.chunk_offset[chunk]
                while at < len(allocated) and allocated[at].stop <= start:
                    at += 1
                block = Range.of(start, layout.chunk_size[chunk])
                if at == len(allocated) or not allocated[at].covers(block):
                    lost.append(chunk)
        return self.take(lost) if lost else []

    # -- claims -----------------------------------------------------------------------------------------

    def claim(self, layout: BlobLayout) -> bool:
        """Record the digests that *layout* states.

        Returns:
            False if a chunk is claimed with another digest already; nothing was recorded.

        Raises:
            OSError: The map cannot be written.
        """
        claimed = self._read_column(self._claimed_at)
        if self._digest_size:
            digests = self._pread(self.chunk_count * DIGEST_SIZE, self._digests_at)
            for first, last in spans(both(claimed, layout.stated)):
                columns = slice(first * DIGEST_SIZE, last * DIGEST_SIZE)
                if digests[columns] != layout.digests[columns]:
                    return False
        fresh = list(spans(without(layout.stated, claimed)))
        if fresh:
            self._claims_synced = False
        for first, last in fresh:
            if self._digest_size:
                columns = slice(first * DIGEST_SIZE, last * DIGEST_SIZE)
                self._pwrite(layout.digests[columns], self._digests_at + columns.start)
            self._pwrite(bytes([PRESENT]) * (last - first), self._claimed_at + first)  # after its digests
        return True

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
