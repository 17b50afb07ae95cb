"""Reads the chunk information of a blob (``blob.meta``): where every chunk lies, packed and decoded.

It comes in two forms: as it lies in the blob (the array, perhaps compressed, then a header of 4096 bytes),
and as a cache file (the array decoded and padded to 4096, then the header), which the bootstrap layer may
ship. The bootstrap's blob table states all sizes, so the form follows from the length.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from functools import partial

from erofsd.codecs.base import CODECS
from erofsd.errors import CodecError, CorruptImage, UnsupportedImage
from erofsd.images.rafs6 import format as fmt
from erofsd.images.rafs6.format import BlobEntry
from erofsd.images.source import corrupt

_longs = partial(array, "Q")
_words = partial(array, "I")


@dataclass(slots=True)
class ChunkColumns:
    """The layout columns of BlobLayout that blob.meta gives: see there."""

    chunk_offset: array[int] = field(default_factory=_longs)
    chunk_size: array[int] = field(default_factory=_words)
    chunk_unit: array[int] = field(default_factory=_words)
    chunk_at: array[int] = field(default_factory=_words)
    unit_offset: array[int] = field(default_factory=_longs)
    unit_stored: array[int] = field(default_factory=_longs)
    unit_size: array[int] = field(default_factory=_longs)
    unit_packed: bytearray = field(default_factory=bytearray)

    def add_unit(self, offset: int, stored: int, size: int, packed: bool) -> int:
        """Append a unit; returns its index."""
        self.unit_offset.append(offset)
        self.unit_stored.append(stored)
        self.unit_size.append(size)
        self.unit_packed.append(packed)
        return len(self.unit_offset) - 1

    def add_chunk(self, offset: int, size: int, unit: int, at: int) -> None:
        """Append a chunk that lies *at* bytes into the decoded unit."""
        self.chunk_offset.append(offset)
        self.chunk_size.append(size)
        self.chunk_unit.append(unit)
        self.chunk_at.append(at)


def usable(blob: BlobEntry, data: bytes) -> bool:
    """True if *data* have the length of a blob.meta of *blob*, in either form.

    nydusify ships files without the array for some images (the header alone): those are of no use.
    """
    return len(data) in (_cache_size(blob), blob.ci_compressed_size + fmt.META_HEADER.size)


def parse_blob_meta(name: str, blob: BlobEntry, data: bytes) -> ChunkColumns:
    """Read and check the chunk information of *blob*.

    Args:
        name: For error messages.
        data: blob.meta, in either form.

    Raises:
        CorruptImage: It contradicts itself or the blob table.
        UnsupportedImage: Chunks of a kind that we do not serve.
    """
    if not usable(blob, data):
        raise corrupt(name, 0, "blob.meta", f"{len(data)} bytes, expected {blob.meta_range[1]}")
    contexts, context_count = _check_header(name, blob, data)
    records = _array(name, blob, data)
    if blob.features & fmt.CHUNK_INFO_V2:
        columns = _parse_v2(name, blob, records, contexts, context_count)
    else:
        columns = _parse_v1(blob, records)
    _check(name, blob, columns)
    return columns


def cache_form(name: str, blob: BlobEntry, data: bytes) -> bytes:
    """The chunk information of *blob* as a cache file: what ships beside a bootstrap.

    Args:
        data: blob.meta, in either form, as ``parse_blob_meta`` accepted it.
    """
    if len(data) == _cache_size(blob):
        return data
    records = _array(name, blob, data)
    padding = bytes(-len(records) % fmt.BLOCK_SIZE)
    return b"".join((records, padding, data[-fmt.META_HEADER.size :]))


def _cache_size(blob: BlobEntry) -> int:
    return -(-blob.ci_uncompressed_size // fmt.BLOCK_SIZE) * fmt.BLOCK_SIZE + fmt.META_HEADER.size


def _check_header(name: str, blob: BlobEntry, data: bytes) -> tuple[int, int]:
    """Compare the header with the blob table; returns where in the array the contexts lie, and how many."""
    at = len(data) - fmt.META_HEADER.size
    # fmt: off
    (magic, _features, compressor, count, offset, compressed, uncompressed, contexts, contexts_size,
     context_count, magic2) = fmt.META_HEADER.unpack_from(data, at)
    # fmt: on
    if (magic, magic2) != (fmt.META_MAGIC, fmt.META_MAGIC):
        raise corrupt(name, at, "magic", f"{magic:#x}, {magic2:#x}")
    stated = (compressor, offset, compressed, uncompressed)
    table = (blob.ci_compressor, blob.ci_offset, blob.ci_compressed_size, blob.ci_uncompressed_size)
    if stated != table:
        raise corrupt(name, at + 8, "chunk info header", f"{stated}, but the blob table has {table}")
    if count != blob.chunk_count and not blob.features & fmt.CHUNK_DICT:
        raise corrupt(name, at + 12, "chunk count", f"{count}, but the blob table has {blob.chunk_count}")
    if blob.features & fmt.BATCH_CHUNKS:
        end = contexts + context_count * fmt.BATCH.size
        if contexts_size != context_count * fmt.BATCH.size or end > uncompressed:
            raise corrupt(name, at + 40, "batch contexts", f"{context_count} at {contexts} in {uncompressed}")
        return contexts, context_count
    return 0, 0


def _array(name: str, blob: BlobEntry, data: bytes) -> memoryview:
    """The decoded array: chunk records, and contexts behind them."""
    size = blob.ci_uncompressed_size
    if len(data) == _cache_size(blob):
        return memoryview(data)[:size]
    packed = memoryview(data)[: blob.ci_compressed_size]
    if blob.ci_compressed_size == size:  # what does not shrink is stored as it is
        return packed
    decoded = bytearray(size)
    try:
        CODECS[fmt.COMPRESSORS[blob.ci_compressor]]().decompress_into(packed, memoryview(decoded))
    except CodecError as exc:
        raise corrupt(name, 0, "chunk info array", str(exc)) from exc
    return memoryview(decoded)


def _parse_v1(blob: BlobEntry, records: memoryview) -> ChunkColumns:
    columns = ChunkColumns()
    units = range(blob.chunk_count)
    for unit, (decoded, packed) in zip(units, fmt.CHUNK_V1.iter_unpack(records), strict=True):
        size = (decoded >> 44 | (decoded >> 8 & 0xF) << 20) + 1
        stored = (packed >> 44 | (packed >> 40 & 0xF) << 20) + 1
        columns.add_unit(packed & 0xFFFFFFFFFF, stored, size, stored != size)
        columns.add_chunk(decoded & 0xFFFFFFFF000, size, unit, 0)
    return columns


def _parse_v2(
    name: str, blob: BlobEntry, records: memoryview, contexts: int, context_count: int
) -> ChunkColumns:
    columns = ChunkColumns()
    batch = -1  # the batch that the latest unit is, if it is one
    size = fmt.CHUNK_V2.size * blob.chunk_count
    for chunk, (decoded, packed, data) in enumerate(fmt.CHUNK_V2.iter_unpack(records[:size])):
        flags = decoded >> 56
        if flags & (fmt.RECORD_ZRAN | fmt.RECORD_ENCRYPTED) or flags >> 5:
            raise UnsupportedImage(f"{name}: chunk {chunk} has the flags {flags:#x}")
        start = (decoded & 0xFFFFFFFF) * fmt.BLOCK_SIZE
        length = (decoded >> 32 & 0xFFFFFF) + 1
        offset, stored = packed & 0xFFFFFFFFFF, packed >> 40
        at = 0
        if not flags & fmt.RECORD_BATCH:
            compressed = bool(flags & fmt.RECORD_COMPRESSED)
            if not stored or (not compressed and stored != length):
                raise _bad(name, chunk, f"{stored} stored bytes for {length}, flags {flags:#x}")
            unit = columns.add_unit(offset, stored, length, compressed)
        else:
            at, index = data & 0xFFFFFFFF, data >> 32
            if index != batch:
                if index < batch or index >= context_count or not blob.features & fmt.BATCH_CHUNKS:
                    raise _bad(name, chunk, f"batch {index} of {context_count} after batch {batch}")
                stored, total = fmt.BATCH.unpack_from(records, contexts + index * fmt.BATCH.size)
                if not 0 < stored <= total <= fmt.CHUNK_SIZE_MAX:
                    raise _bad(name, chunk, f"batch {index} of {stored} stored bytes, {total} decoded")
                columns.add_unit(offset, stored, total, stored != total)
                batch = index
            unit = len(columns.unit_offset) - 1
            if offset != columns.unit_offset[unit] or at + length > columns.unit_size[unit]:
                raise _bad(name, chunk, f"[{at}, {at + length}) does not lie in batch {index}")
        columns.add_chunk(start, length, unit, at)
    return columns


def _check(name: str, blob: BlobEntry, columns: ChunkColumns) -> None:
    end = 0
    for chunk, (offset, size) in enumerate(zip(columns.chunk_offset, columns.chunk_size, strict=True)):
        if offset < end or size > blob.chunk_size:
            raise _bad(name, chunk, f"{size} decoded bytes at {offset}, after {end}")
        end = offset + size
    if end > blob.uncompressed_size:
        raise _bad(name, blob.chunk_count - 1, f"reaches past the decoded size {blob.uncompressed_size}")
    end = 0
    for unit, (offset, stored) in enumerate(zip(columns.unit_offset, columns.unit_stored, strict=True)):
        if offset < end:
            raise corrupt(name, 0, f"unit {unit}", f"{stored} stored bytes at {offset}, before {end}")
        end = offset + stored
    if end > blob.data_end:
        raise corrupt(name, 0, "last unit", f"ends at {end}, past the end of data at {blob.data_end}")


def _bad(name: str, chunk: int, problem: str) -> CorruptImage:
    return corrupt(name, 0, f"chunk record {chunk}", problem)
