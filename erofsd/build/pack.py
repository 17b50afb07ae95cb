"""Packs file content into one blob: chunks, digests, duplicates, compression by several threads.

One thread (the caller's) reads, hashes, and looks for duplicates: hashing takes a tenth of what zstd takes,
and a duplicate must be known before it is compressed. New chunks collect in a buffer of a fixed size, which
then is a job for the pool; jobs come back in their order and are written in it, so the blob is the same
whatever the number of threads. Small files cost one hop to the pool for a whole buffer of them.

Where batches are asked for, small files collect in a buffer that becomes one compressed unit. Larger chunks
pass it by: a batch is always as full as it can be, at the price that its members' indexes come later than
their place in the tree. Indexes and offsets are given out when a job is submitted, so both ascend as readers
demand (rafs-v6 4.4).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

import zstandard
from blake3 import blake3

from erofsd.build.chunks import CHUNK_BATCH, CHUNK_COMPRESSED, ImageChunks, add_row
from erofsd.build.compress import Compress, make_compress
from erofsd.build.digests import DIGEST_SIZE, DigestIndex
from erofsd.build.options import BuildOptions
from erofsd.build.source import Content
from erofsd.errors import UnsupportedImage
from erofsd.images.rafs6 import blobwriter
from erofsd.images.rafs6 import format as rafs
from erofsd.images.tree import HOLE, PackedBlob

# A job of this many bytes takes a few milliseconds, a hundred times what handing it over takes.
_BUFFER_SIZE = 1 << 20
# A job of tiny files ends here: each is some 500 bytes of objects while it waits.
_UNITS_MAX = 1024
# Jobs under way, beyond one for each thread, so that none waits while the caller reads or writes.
_SPARE_JOBS = 3
# Buffers under way may be 16 MiB each; with many threads they are what memory goes to.
_BUFFERS_MAX = 128 << 20
_CI_LEVEL = 3


@dataclass(slots=True)
class _Unit:
    # What is compressed as a whole: one chunk, or a batch of them. Places are in the job's buffer.
    start: int
    size: int
    chunks: array[int]


@dataclass(slots=True)
class _Job:
    buffer: bytearray
    used: int = 0
    units: list[_Unit] = field(default_factory=list)
    batch: bool = False
    packed: Future[list[memoryview | None]] | None = None


class Packer:
    """Writes one blob to a file. Use as a context manager: it owns threads.

    Args:
        image: Where the chunks are entered; nobody else may enter chunks meanwhile.
        out: Where the blob goes, from here on; only appended to.
        progress: Told the number of bytes of file content, as they are taken.

    Attributes:
        stored_size: Bytes written so far.
    """

    def __init__(
        self,
        options: BuildOptions,
        image: ImageChunks,
        out: BinaryIO,
        *,
        progress: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.options = options
        self.stored_size = 0
        self._image = image
        self._chunks = image.chunks
        self._out = out
        self._progress = progress
        self._hash = hashlib.sha256()
        self._digest: Callable[[memoryview], bytes] = _blake3 if options.digest == "blake3" else _sha256
        self._compress = make_compress(options)
        self._known = DigestIndex(self._chunks.digests)
        self._zeros: dict[int, int] = {}
        self._own: array[int] = array("I")  # our chunk numbers by index in the blob
        self._records = bytearray()
        self._contexts = bytearray()
        self._size = 0  # decoded size of the blob
        self._buffer_size = max(options.chunk_size, options.batch_size, _BUFFER_SIZE)
        self._jobs_max = max(min(options.jobs + _SPARE_JOBS, _BUFFERS_MAX // self._buffer_size), 2)
        self._free: list[bytearray] = []
        self._job = _Job(self._buffer())
        self._batch = _Job(self._buffer(), batch=True) if options.batch_size else None
        self._under_way: deque[_Job] = deque()
        self._pool = ThreadPoolExecutor(options.jobs, thread_name_prefix="compress")

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop; what was not written yet never is."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, content: Content) -> array[int]:
        """Take a file's content; returns its chunks for ``Node.chunks``.

        Raises:
            SourceError, CorruptImage: It cannot be read.
            UnsupportedImage: More than a blob can hold.
        """
        numbers: array[int] = array("q")
        try:
            extents = content.extents
            if extents is None:
                extents = [(0, content.size)] if content.size else []
            self._add_extents(content, extents, numbers)
        finally:
            content.close()
        return array("q", numbers)  # without the room that appending has left

    def finish(self) -> PackedBlob | None:
        """Write what is left; None, and nothing was written, if there was no content to store."""
        if self._batch is not None:
            self._submit(self._batch)
        self._submit(self._job)
        while self._under_way:
            self._collect()
        if not self._own:
            return None
        blob = self._write_tail()
        number = self._image.blob(blob)
        for chunk in self._own:
            self._chunks.blob[chunk] = number
        self._records = self._contexts = bytearray()
        self._free.clear()
        return blob

    # --- chunks ---

    def _add_extents(self, content: Content, extents: list[tuple[int, int]], numbers: array[int]) -> None:
        chunk_size, size = self.options.chunk_size, content.size
        offset = first = 0
        while offset < size:
            while first < len(extents) and sum(extents[first]) <= offset:
                first += 1
            data = extents[first][0] if first < len(extents) else size
            hole = max(min(data, size) - offset, 0) // chunk_size
            if data >= size and hole * chunk_size < size - offset:
                hole += 1  # the last chunk, too
            if hole:
                self._add_zeros(min(hole * chunk_size, size - offset), numbers)
                offset += hole * chunk_size
                continue
            length = min(chunk_size, size - offset)
            numbers.append(self._chunk(content, offset, length, extents, first))
            self._progress(length)
            offset += chunk_size

    def _chunk(
        self, content: Content, offset: int, length: int, extents: list[tuple[int, int]], first: int
    ) -> int:
        # Files of one chunk below half of a batch go into batches: rafs-v6 4.7.
        batch = self._batch
        small = batch is not None and content.size == length < self.options.batch_size // 2
        job = self._room(length, small)
        view = memoryview(job.buffer)[job.used : job.used + length]
        end = offset
        for start, size in extents[first:] if first else extents:
            if start >= offset + length:
                break
            start, stop = max(start, offset), min(start + size, offset + length)
            view[end - offset : start - offset] = bytes(start - end)
            content.readinto(start, view[start - offset : stop - offset])
            end = stop
        view[end - offset :] = bytes(offset + length - end)
        return self._take(job, view)

    def _add_zeros(self, size: int, numbers: array[int]) -> None:
        chunk_size = self.options.chunk_size
        whole, rest = divmod(size, chunk_size)
        if whole:
            numbers.extend(array("q", [self._zero_chunk(chunk_size)]) * whole)
        if rest:
            numbers.append(self._zero_chunk(rest))
        self._progress(size)

    def _zero_chunk(self, length: int) -> int:
        if self.options.holes:
            return HOLE
        number = self._zeros.get(length)
        if number is None:
            job = self._room(length, small=False)
            view = memoryview(job.buffer)[job.used : job.used + length]
            view[:] = bytes(length)
            number = self._zeros[length] = self._take(job, view)
        return number

    def _room(self, length: int, small: bool) -> _Job:
        """The job to put a chunk of *length* bytes into."""
        if small and self._batch is not None:
            if self._batch.used + length > self.options.batch_size:
                self._submit(self._batch)
                self._batch = _Job(self._buffer(), batch=True)
            return self._batch
        if self._job.used + length > self._buffer_size or len(self._job.units) >= _UNITS_MAX:
            self._submit(self._job)
            self._job = _Job(self._buffer())
        return self._job

    def _take(self, job: _Job, view: memoryview) -> int:
        """Keep the chunk that was put into *job*, unless it is known; returns its number."""
        length = len(view)
        digest = self._digest(view)
        number = self._known.find(digest)
        if number is not None:
            return number
        # Most chunks are told from zeros by one byte; the others by their digest.
        if self.options.holes and not view[0] and digest == self._digest(memoryview(bytes(length))):
            return HOLE
        number = self._image.find(digest, length)
        if number is None:
            number = add_row(self._chunks, digest, size=length)
            if job.batch and job.units:
                job.units[0].chunks.append(number)
                job.units[0].size += length
            else:
                job.units.append(_Unit(job.used, length, array("I", [number])))
            job.used += length
        self._known.add(number)
        return number

    # --- jobs ---

    def _buffer(self) -> bytearray:
        return self._free.pop() if self._free else bytearray(self._buffer_size)

    def _submit(self, job: _Job) -> None:
        """Give the job's chunks their place in the blob, and the job to the pool."""
        if not job.units:
            self._free.append(job.buffer)
            return
        chunks = self._chunks
        for unit in job.units:
            for number in unit.chunks:
                chunks.index[number] = len(self._own)
                chunks.offset[number] = self._size
                self._own.append(number)
                self._size += -(-chunks.size[number] // rafs.BLOCK_SIZE) * rafs.BLOCK_SIZE
        if len(self._own) > 1 << 24 or self._size > rafs.DECODED_SIZE_MAX:
            raise UnsupportedImage(
                f"{len(self._own)} chunks, {self._size} bytes: more than one blob can hold",
                hint="Use larger chunks (--chunk-size).",
            )
        job.packed = self._pool.submit(_run, self._compress, job)
        self._under_way.append(job)
        while len(self._under_way) >= self._jobs_max:
            self._collect()

    def _collect(self) -> None:
        """Wait for the oldest job and write what came of it."""
        job = self._under_way.popleft()
        assert job.packed is not None  # it was submitted
        pieces: list[memoryview] = []
        view = memoryview(job.buffer)
        for unit, packed in zip(job.units, job.packed.result(), strict=True):
            stored = view[unit.start : unit.start + unit.size] if packed is None else packed
            self._record(job, unit, self.stored_size, len(stored), packed is not None)
            self.stored_size += len(stored)
            pieces.append(stored)
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._hash.update(data)
        self._out.write(data)
        self._free.append(job.buffer)

    def _record(self, job: _Job, unit: _Unit, stored_offset: int, stored_size: int, compressed: bool) -> None:
        chunks = self._chunks
        at = 0
        for number in unit.chunks:
            chunks.stored_offset[number] = stored_offset
            chunks.stored_size[number] = stored_size
            chunks.flags[number] = (CHUNK_COMPRESSED if compressed else 0) | (CHUNK_BATCH if job.batch else 0)
            offset, size = chunks.offset[number], chunks.size[number]
            if job.batch:
                batch = len(self._contexts) // rafs.BATCH.size
                self._records += blobwriter.batch_record(offset, size, stored_offset, batch, at)
            elif self.options.chunk_info_v2:
                self._records += blobwriter.record_v2(
                    offset, size, stored_offset, stored_size, compressed=compressed
                )
            else:
                self._records += blobwriter.record_v1(offset, size, stored_offset, stored_size)
            at += size
        if job.batch:
            self._contexts += blobwriter.batch_context(stored_size, unit.size)

    def _own_digests(self) -> bytearray:
        """Digests in the order of our indexes."""
        column, digests = self._chunks.digests, bytearray()
        for number in self._own:
            digests += column[DIGEST_SIZE * number : DIGEST_SIZE * (number + 1)]
        return digests

    def _write_tail(self) -> PackedBlob:
        options = self.options
        # A TOC knows no gzip.
        ci_codec = "zstd" if options.compression == "gzip" else options.compression
        tail = blobwriter.blob_tail(
            data_size=self.stored_size,
            data_hash=self._hash,
            size=self._size,
            chunk_count=len(self._own),
            records=self._records,
            contexts=self._contexts,
            digests=self._own_digests(),
            ci_codec=ci_codec,
            compress=_ci_compress(options, ci_codec),
        )
        for piece in tail.pieces:
            self._hash.update(piece)
            self._out.write(piece)
            self.stored_size += len(piece)
        return PackedBlob(
            blob_id=self._hash.hexdigest(),
            stored_size=self.stored_size,
            size=self._size,
            codec=options.compression,
            digester=options.digest,
            features=tail.features,
            ci_offset=tail.ci_offset,
            ci_stored=tail.ci_stored,
            ci_size=tail.ci_size,
            ci_codec=tail.ci_codec,
            toc_size=tail.toc_size,
            toc_digest=tail.toc_digest,
            blob_meta=tail.blob_meta,
            chunk_count=len(self._own),
        )


def _run(compress: Compress, job: _Job) -> list[memoryview | None]:
    view = memoryview(job.buffer)
    return compress([view[unit.start : unit.start + unit.size] for unit in job.units])


def _blake3(data: memoryview) -> bytes:
    return blake3(data).digest()


def _sha256(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def _ci_compress(options: BuildOptions, codec: str) -> Callable[[bytes], bytes]:
    if codec == options.compression:
        compress = make_compress(options)
        return lambda data: bytes(compress([memoryview(data)])[0] or data)
    return zstandard.ZstdCompressor(level=_CI_LEVEL).compress
