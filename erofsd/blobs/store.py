"""The cache directory: decoded blobs in sparse files, each with its chunk map beside it.

``<blob_id>.<variant>.data`` is what the kernel mounts as a device, ``<blob_id>.<variant>.map`` says which
chunks of it are there. Both are ours alone, mode 0600 in a directory of mode 0700.

Who shares with whom: a blob id is only a name, and an image only claims what is in that blob. Two images
share one stored blob, and so one fetch, if they state the same geometry and wherever both state a chunk the
same digest (without digests: the same pin). Each chunk's digest is *claimed* in the map by the first image
that states it. An image that disagrees gets the next variant, a file of its own, so what it gets there
harms nobody.

A file must be opened before the kernel is told to ask us about it: later opens, even ours, would make events
for ourselves. So a descriptor is opened once, when the blob is first bound, and kept until
`StoredBlob.close`; those that outlived our predecessor come in as *held*, and no other is opened for them.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import struct
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress, count
from pathlib import Path

import structlog

from erofsd.backends.base import Backend
from erofsd.blobs.chunkmap import ChunkMap, MapRefused, spans, without
from erofsd.blobs.layout import DIGEST_SIZE, BlobLayout
from erofsd.errors import CacheFull, CorruptImage, ErofsdError
from ondemand.ranges import Range, RangeSet

BLOCK_SIZE = 4096
NAME_BYTES_MAX = 180  # of a blob id in a file name; with variant and suffix it stays below 200

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\Z")

log = structlog.get_logger("erofsd.blobs")


def allocated(fd: int) -> RangeSet:
    """The ranges of *fd* that have blocks, or may have. Makes no fanotify event.

    Source: lseek(2), SEEK_DATA and SEEK_HOLE.
    """
    found = RangeSet()
    at = 0
    while True:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but holes from here on
                return found
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        found.add(Range(start, at))


class FileSink:
    """Writes to a descriptor somebody else closes; see `ondemand.provider.Sink`."""

    block_size = BLOCK_SIZE

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, offset: int, data: memoryview) -> None:
        """See `ondemand.provider.Sink`."""
        while data:
            done = os.pwrite(self._fd, data, offset)
            data, offset = data[done:], offset + done

    def data(self) -> RangeSet:
        """See `ondemand.provider.Sink`."""
        return allocated(self._fd)


class Tally:
    """How much of what one image states of a blob is there; kept up to date chunk by chunk.

    Attributes:
        missing_count: Stated chunks that are not present.
        fetched_stored_bytes: Stored bytes of the units whose stated chunks are all present.
        total_stored_bytes: Stored bytes of all units with a stated chunk.
    """

    def __init__(self, layout: BlobLayout, present: bytearray) -> None:
        self.layout = layout
        missing = without(layout.stated, present)
        self.missing_count = missing.count(1)
        self._left: array[int] | None = None  # for batches: missing stated chunks of each unit
        if layout.unit_count == layout.chunk_count:
            self.total_stored_bytes = sum(compress(layout.unit_stored, layout.stated))
            self.fetched_stored_bytes = self.total_stored_bytes - sum(compress(layout.unit_stored, missing))
        else:
            self._left = array("I", bytes(4 * layout.unit_count))
            for unit in compress(layout.chunk_unit, missing):
                self._left[unit] += 1
            stated = set(compress(layout.chunk_unit, layout.stated))
            self.total_stored_bytes = sum(layout.unit_stored[unit] for unit in stated)
            self.fetched_stored_bytes = sum(
                layout.unit_stored[unit] for unit in stated if not self._left[unit]
            )

    def add(self, chunks: Sequence[int]) -> None:
        """*chunks* have become present."""
        layout = self.layout
        for chunk in chunks:
            if layout.stated[chunk]:
                self.missing_count -= 1
                unit = layout.chunk_unit[chunk]
                if self._left is not None:
                    self._left[unit] -= 1
                    if self._left[unit]:
                        continue
                self.fetched_stored_bytes += layout.unit_stored[unit]

    def remove(self, chunks: Sequence[int]) -> None:
        """*chunks* are not present any more."""
        layout = self.layout
        for chunk in chunks:
            if layout.stated[chunk]:
                self.missing_count += 1
                unit = layout.chunk_unit[chunk]
                if self._left is not None:
                    self._left[unit] += 1
                    if self._left[unit] > 1:
                        continue
                self.fetched_stored_bytes -= layout.unit_stored[unit]


class Binding:
    """One image's view of a stored blob.

    Attributes:
        layout: What the image states.
        source: Where missing chunks come from; set by the owner before anything is filled.
        image: What logs and statistics call the image.
    """

    def __init__(self, blob: StoredBlob, tally: Tally) -> None:
        self.blob = blob
        self.layout = tally.layout
        self.tally = tally
        self.source: Backend | None = None
        self.image = ""

    @property
    def missing_count(self) -> int:
        """Number of stated chunks that are not present."""
        return self.tally.missing_count

    @property
    def fetched_stored_bytes(self) -> int:
        """Stored bytes of the stated units that are present as a whole."""
        return self.tally.fetched_stored_bytes

    @property
    def total_stored_bytes(self) -> int:
        """Stored bytes of all stated units."""
        return self.tally.total_stored_bytes

    def missing(self) -> Iterator[int]:
        """Stated chunks that are not present now, ascending."""
        for first, last in spans(without(self.layout.stated, self.blob.map.present)):
            yield from range(first, last)

    def release(self) -> None:
        """The image does not use the blob any more. The blob stays open, see `StoredBlob.close`."""
        self.blob.bindings.remove(self)
        if all(other.tally is not self.tally for other in self.blob.bindings):
            self.blob.tallies.remove(self.tally)


class StoredBlob:
    """One file of the cache, shared by all images that are bound to it.

    Attributes:
        store: That has it.
        name: ``<blob_id>.<variant>``: stable across restarts.
        size: Of the data file, bytes; a multiple of 4096.
        layout: Geometry that all bindings agree on: sizes and offsets of chunks. Its digests and units are
            one image's.
        identity: See `identity_of`.
        spoilt: Its data were destroyed on purpose; nothing is filled any more.
    """

    def __init__(
        self, store: BlobStore, name: str, layout: BlobLayout, identity: bytes, fd: int, chunk_map: ChunkMap
    ) -> None:
        self.store = store
        self._fd = fd
        self._uses = 0
        self._unused = threading.Condition()
        self._closing = False
        self._closed = False
        self._flushing = asyncio.Lock()
        self._directory_synced = False
        self.name = name
        self.layout = layout
        self.identity = identity
        self.size = aligned(layout.size)
        self.map = chunk_map
        self.bindings: list[Binding] = []
        self.tallies: list[Tally] = []
        self.spoilt = False

    @property
    def path(self) -> Path:
        """The data file."""
        return self.store.path(self.name)

    @property
    def fd(self) -> int:
        """Open for reading and writing, from before any mark. Of the map, in a store without data."""
        return self._fd

    def use_fd(self, fd: int) -> None:
        """Go on with *fd*, another descriptor of the same file; the old one is closed."""
        old, self._fd = self._fd, fd
        os.close(old)

    @property
    def complete(self) -> bool:
        """True if every chunk that any image states of it is present; not if none is bound to it."""
        return not self.spoilt and bool(self.tallies) and all(not t.missing_count for t in self.tallies)

    def mark(self, chunks: Sequence[int], epoch: int) -> None:
        """Make *chunks* present for all bindings: their data are verified, written and persisted."""
        fresh = self.map.mark(chunks, epoch)
        for tally in self.tallies:
            tally.add(fresh)

    def take(self, chunks: Sequence[int]) -> None:
        """Make *chunks* absent before their data go. Blocks: it syncs.

        Raises:
            OSError: The map cannot be written: the data must stay.
        """
        self._taken(self.map.take(chunks))

    def _taken(self, gone: Sequence[int]) -> None:
        for tally in self.tallies:
            tally.remove(gone)

    def reconcile(self, data: RangeSet) -> int:
        """Take away chunks that are not in *data* (what is allocated); returns how many."""
        lost = self.map.reconcile(data, self.layout)
        self._taken(lost)
        return len(lost)

    async def flush(self) -> None:
        """Make durable what is present now.

        Raises:
            OSError: It could not be; what was not durable is not present any more, and is fetched again.
        """
        async with self._flushing:
            if self.map.is_durable or not self.retain():
                return
            epoch, present = self.map.epoch, bytes(self.map.present)
            try:
                if await asyncio.to_thread(self._sync, present, epoch):
                    self.map.durable_now(present, epoch)
            except OSError:
                # The kernel reports lost writes once and then calls the pages clean (fsync(2), EIO).
                if not self.spoilt:
                    self._taken(self.map.distrust())
                raise
            finally:
                self.release()

    def _sync(self, present: bytes, epoch: int) -> bool:
        os.fdatasync(self._fd)
        if not self._directory_synced:
            self.store.sync_directory()
            self._directory_synced = True
        return self.map.write_durable(present, epoch)

    def retain(self) -> bool:
        """Keep the file open and unspoilt while a thread writes to it; False if it is too late."""
        with self._unused:
            if self.spoilt or self._closed:
                return False
            self._uses += 1
            return True

    def release(self) -> None:
        """The opposite of a `retain` that was True."""
        with self._unused:
            self._uses -= 1
            if not self._uses:
                self._unused.notify_all()
                if self._closing:
                    self._close_now()

    def close(self) -> None:
        """Close the descriptors once nobody uses them; the files stay. It is not used afterwards."""
        if not self._closing:
            self._closing = True
            self.store.closed(self)
            with self._unused:
                if not self._uses:
                    self._close_now()

    def _close_now(self) -> None:
        self._closed = True
        os.close(self._fd)
        self.map.close()

    def spoil(self) -> None:
        """Make every further read of the file fail, for ever.

        For a superblock that outlives those who would fill it: a truncated file gives EIO where a hole
        would give zeros. The name is free afterwards: the same file grown again would give zeros.
        Blocks until nobody writes to it any more, and until the truncation's own fanotify event is answered:
        run it in a thread.

        Raises:
            OSError: The map or the file cannot be changed.
        """
        with self._unused:
            self.spoilt = True
            self._unused.wait_for(lambda: not self._uses)  # a late write would make it grow again
        self._taken(self.map.take())
        os.ftruncate(self._fd, 0)
        self.store.forget(self)


class BlobStore:
    """All stored blobs in one directory.

    Args:
        directory: Made if it is not there.
        held: Descriptors that a predecessor's keeper has preserved, by `StoredBlob.name`; consulted, never
            changed. A blob that uses one closes it like its own.
        keeps_data: False where the data are elsewhere, in files of the kernel: then there are maps only, and
            what a map says is compared with the data when the kernel opens the object.

    Attributes:
        on_fresh: Called before a new map is made, where the data are elsewhere: data of that name, if there
            are any, were verified for nobody that we know, and must go. Returns False if they cannot.

    Raises:
        OSError: The directory cannot be made or used.
    """

    def __init__(
        self, directory: Path, *, held: Mapping[str, int] | None = None, keeps_data: bool = True
    ) -> None:
        self.directory = directory
        self._keeps_data = keeps_data
        self._held = {} if held is None else held
        self._open: dict[str, StoredBlob] = {}
        self.on_fresh: Callable[[str], bool] = lambda name: True
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_mode & 0o077:  # or not at all: its file system may have become read-only
            directory.chmod(0o700)
        for left in directory.glob("*.new"):
            left.unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """The data file of the stored blob *name*."""
        return self.directory / f"{name}.data"

    def opened(self, name: str) -> StoredBlob | None:
        """The stored blob *name*, if it is open."""
        return self._open.get(name)

    def names(self) -> list[str]:
        """Names of all stored blobs, open or not."""
        return sorted(path.name.removesuffix(".map") for path in self.directory.glob("*.map"))

    def has(self, name: str) -> bool:
        """True if there is a map of that name."""
        return (self.directory / f"{name}.map").exists()

    def used_at(self, name: str) -> float:
        """When the stored blob *name* was filled or let go of last, in seconds; 0 if there is none."""
        try:
            return (self.directory / f"{name}.map").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def remove(self, name: str) -> None:
        """Delete the map of *name*, which is not open, before its data go elsewhere."""
        (self.directory / f"{name}.map").unlink(missing_ok=True)

    def bind(self, layout: BlobLayout, *, name: str | None = None) -> Binding:
        """Find or make the stored blob for *layout*.

        Args:
            name: The stored blob that a living superblock of this image already uses; no other will do.

        Raises:
            CorruptImage: The layout's chunks do not lie on blocks; or *name* now holds something else.
            CacheFull: The files cannot be made.
        """
        stem = stem_of(layout.blob_id)
        identity = identity_of(layout)
        candidates = [name] if name is not None else (f"{stem}.{variant}" for variant in count())
        for candidate in candidates:
            try:
                blob = self._open.get(candidate)
                if blob is None:
                    blob = self._load(candidate, layout, identity, wanted=name is not None)
                elif blob.identity != identity or not blob.map.claim(layout):
                    blob = None
                if blob is not None:
                    return self._bound(blob, layout)
            except OSError as exc:
                raise CacheFull(f"{self.directory / candidate}: {exc.strerror}") from exc
        raise CorruptImage(f"{name}: the stored blob was verified for another image")

    def _bound(self, blob: StoredBlob, layout: BlobLayout) -> Binding:
        # Bindings of one image share columns and counters, however often it is mounted.
        for tally in blob.tallies:
            if tally.layout is layout or tally.layout == layout:
                break
        else:
            tally = Tally(layout, blob.map.present)
            blob.tallies.append(tally)
        binding = Binding(blob, tally)
        blob.bindings.append(binding)
        return binding

    def _load(self, name: str, layout: BlobLayout, identity: bytes, *, wanted: bool) -> StoredBlob | None:
        """Open what is called *name*, or make it; None if it is another blob's.

        Args:
            wanted: A living superblock of this very image uses it.
        """
        check(layout)
        path = self.directory / f"{name}.map"
        digest_size = DIGEST_SIZE if layout.digester else 0
        try:
            chunk_map = ChunkMap.open(path, layout.chunk_count, identity, digest_size)
        except FileNotFoundError:
            if self._is_foreign(name, wanted):
                return None
            chunk_map = self._create(path, layout, identity)
        except MapRefused as exc:
            log.warning("map.refused", blob_id=name, error=str(exc))
            if self._is_foreign(name, wanted):
                return None
            os.replace(path, path.with_name(path.name + ".bad"))
            chunk_map = self._create(path, layout, identity)
        if chunk_map is None:
            return None
        try:
            if not chunk_map.claim(layout):
                chunk_map.close()
                return None
            if not self._keeps_data:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                blob = self._open[name] = StoredBlob(self, name, layout, identity, fd, chunk_map)
                return blob
            return self._with_data(name, layout, identity, chunk_map)
        except BaseException:
            chunk_map.close()
            raise

    def _is_foreign(self, name: str, wanted: bool) -> bool:
        # Without its map nobody knows whose the held file is; a living superblock may read it.
        return (name in self._held or not self.on_fresh(name)) and not wanted

    def _create(self, path: Path, layout: BlobLayout, identity: bytes) -> ChunkMap:
        return ChunkMap.create(path, layout.chunk_count, identity, DIGEST_SIZE if layout.digester else 0)

    def _with_data(
        self, name: str, layout: BlobLayout, identity: bytes, chunk_map: ChunkMap
    ) -> StoredBlob | None:
        size = aligned(layout.size)
        fd = self._held.get(name)
        if fd is None:
            fd = os.open(self.path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        elif os.fstat(fd).st_size != size:
            chunk_map.close()  # spoilt while it was held: of no use to anybody
            return None
        try:
            if os.fstat(fd).st_size != size:
                chunk_map.take()
                os.ftruncate(fd, size)
            elif lost := chunk_map.reconcile(allocated(fd), layout):
                log.warning("chunks.lost", blob_id=name, count=len(lost))
        except BaseException:
            if name not in self._held:
                os.close(fd)
            raise
        blob = StoredBlob(self, name, layout, identity, fd, chunk_map)
        self._open[name] = blob
        return blob

    def drop(self, name: str) -> None:
        """Destroy the stored blob *name*: readers that still have it get EIO. Blocks, see `StoredBlob.spoil`.

        Raises:
            OSError: It cannot be.
        """
        if (blob := self._open.get(name)) is not None:
            blob.spoil()
            return
        self._unlink(name, ".map")
        if (fd := self._held.get(name)) is not None:
            os.ftruncate(fd, 0)
        else:
            try:
                os.truncate(self.path(name), 0)
            except FileNotFoundError:
                pass  # nothing to destroy
        self._unlink(name, ".data")

    def _unlink(self, name: str, suffix: str) -> None:
        (self.directory / (name + suffix)).unlink(missing_ok=True)
        self.sync_directory()

    def forget(self, blob: StoredBlob) -> None:
        """*blob* was spoilt: free its name."""
        self.closed(blob)
        self._unlink(blob.name, ".map")
        self._unlink(blob.name, ".data")

    def closed(self, blob: StoredBlob) -> None:
        """*blob* is not used any more; the next `bind` opens it anew."""
        if self._open.get(blob.name) is blob:
            del self._open[blob.name]

    def sync_directory(self) -> None:
        """Make names durable. Blocks."""
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def aligned(size: int) -> int:
    """*size* rounded up to whole blocks."""
    return -(-size // BLOCK_SIZE) * BLOCK_SIZE


def stem_of(blob_id: str) -> str:
    """A file name for *blob_id*: itself if it is one, else a hash."""
    if len(blob_id) <= NAME_BYTES_MAX and _PLAIN_NAME.match(blob_id):
        return blob_id
    return "id-" + hashlib.sha256(blob_id.encode("utf-8", "surrogateescape")).hexdigest()


def identity_of(layout: BlobLayout) -> bytes:
    """32 bytes that are equal for layouts which may share a file: all but stated chunks and their digests."""
    hasher = hashlib.sha256()
    for text in (layout.blob_id, layout.digester or "", layout.pin):
        raw = text.encode("utf-8", "surrogateescape")
        hasher.update(struct.pack("<Q", len(raw)) + raw)
    hasher.update(struct.pack("<QQ", layout.size, layout.chunk_count))
    hasher.update(layout.chunk_offset)
    hasher.update(layout.chunk_size)
    if layout.digester is None:
        # Nothing verifies what is decoded, so how it is decoded belongs to what the pin stands for.
        hasher.update(layout.codec.encode() + b"\0" + layout.unit_packed)
        for column in (
            layout.chunk_unit,
            layout.chunk_at,
            layout.unit_offset,
            layout.unit_stored,
            layout.unit_size,
        ):
            hasher.update(column)
    return hasher.digest()


def check(layout: BlobLayout) -> None:
    """Refuse a layout whose chunks cannot be written one without touching another.

    Raises:
        CorruptImage: A chunk does not begin on a block, overlaps its neighbour or reaches past the end.
    """
    end = 0
    for chunk, (offset, size) in enumerate(zip(layout.chunk_offset, layout.chunk_size, strict=True)):
        if offset % BLOCK_SIZE or offset < end:
            raise CorruptImage(
                f"blob {layout.blob_id}: chunk {chunk} at {offset} is not where it can be stored"
            )
        end = aligned(offset + size)
    if end > aligned(layout.size):
        raise CorruptImage(f"blob {layout.blob_id}: chunks end at {end}, the blob at {layout.size}")
    if layout.digester is None and not layout.pin:
        raise ErofsdError(f"blob {layout.blob_id}: neither digests nor a pin")
