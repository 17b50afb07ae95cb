"""Writes what surrounds the chunk data of a Nydus blob: chunk records, header, digests, tar headers, TOC.

A blob is written front to back, without knowing any size beforehand: chunk data, then ``blob_tail``. Every
payload is followed by its own tar header. Records and parts are pure functions; whoever packs chunks keeps
records and digests while it writes data, and appends the tail.

Source: rafs-v6 4.1 to 4.7; Nydus builder/src/core/blob.rs, dump_meta_data().
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from erofsd.images.rafs6 import format as fmt

_COMPRESSOR_NUMBERS = {name: number for number, name in fmt.COMPRESSORS.items()}
_TOC_FLAGS = {"none": 1, "zstd": 2, "lz4_block": 4}
_TAR_SIZE_MAX = 8**11
# Of every blob that is written here; V2 records and batches add their own.
FEATURES = fmt.ALIGNED | fmt.INLINED_CHUNK_DIGEST | fmt.HAS_TAR_HEADER | fmt.HAS_TOC | fmt.CAP_TAR_TOC

Bytes = bytes | bytearray | memoryview


class Hash(Protocol):
    """A hash of hashlib under way."""

    def copy(self) -> Hash: ...
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


def record_v1(offset: int, size: int, stored_offset: int, stored_size: int) -> bytes:
    """The 16 bytes for one chunk; it counts as compressed where the sizes differ. Source: rafs-v6 4.4.

    Args:
        offset: Decoded, a multiple of 4096.
        size: Decoded bytes, 1 to 16 MiB.
        stored_offset, stored_size: Place in the blob.
    """
    high, low = size - 1, stored_size - 1
    return fmt.CHUNK_V1.pack(
        offset | (high >> 20) << 8 | (high & 0xFFFFF) << 44,
        stored_offset | (low >> 20) << 40 | (low & 0xFFFFF) << 44,
    )


def record_v2(
    offset: int, size: int, stored_offset: int, stored_size: int, *, compressed: bool, crc: int = 0
) -> bytes:
    """The 24 bytes for one chunk that is a unit of its own. Source: rafs-v6 4.4.

    Args:
        stored_size: Less than 16 MiB: a raw chunk of 16 MiB cannot be said, so use smaller chunks.
        crc: crc32c of the decoded bytes; 0 leaves it out.
    """
    flags = (fmt.RECORD_COMPRESSED if compressed else 0) | (fmt.RECORD_CRC if crc else 0)
    return fmt.CHUNK_V2.pack(
        offset // fmt.BLOCK_SIZE | (size - 1) << 32 | flags << 56, stored_offset | stored_size << 40, crc
    )


def batch_record(offset: int, size: int, batch_offset: int, batch: int, at: int) -> bytes:
    """The 24 bytes for one chunk that lies *at* bytes into decoded batch *batch*. Source: rafs-v6 4.7.

    Args:
        batch_offset: Where the batch is stored.
    """
    flags = fmt.RECORD_COMPRESSED | fmt.RECORD_BATCH
    return fmt.CHUNK_V2.pack(
        offset // fmt.BLOCK_SIZE | (size - 1) << 32 | flags << 56, batch_offset, batch << 32 | at
    )


def batch_context(stored_size: int, size: int) -> bytes:
    """The 40 bytes for one batch, stored raw where both sizes are equal. Source: rafs-v6 4.7."""
    return fmt.BATCH.pack(stored_size, size)


@dataclass(frozen=True, slots=True)
class BlobTail:
    """What follows the chunk data, and what PackedBlob says of it.

    Attributes:
        pieces: To be appended to the blob in this order, with nothing between.
        blob_meta: Chunk information in cache form.
    """

    pieces: tuple[bytes, ...]
    features: int
    ci_offset: int
    ci_stored: int
    ci_size: int
    ci_codec: str
    toc_size: int
    toc_digest: bytes
    blob_meta: bytes


def blob_tail(
    *,
    data_size: int,
    data_hash: Hash,
    size: int,
    chunk_count: int,
    records: Bytes,
    contexts: Bytes = b"",
    digests: Bytes,
    ci_codec: str,
    compress: Callable[[bytes], bytes],
) -> BlobTail:
    """Everything after the chunk data of a blob with at least one chunk.

    Args:
        data_size: Bytes of chunk data, which begin the blob.
        data_hash: SHA-256 of those so far; it is left as it is.
        size: Decoded size of the blob, a multiple of 4096.
        records: All V1 or all V2, in the order of chunk indexes.
        contexts: One a batch.
        digests: 32 bytes a chunk, in the same order.
        ci_codec: ``zstd lz4_block none``: what *compress* makes. What does not shrink is stored as it is. A
            TOC knows no gzip.
        compress: Makes one unit of *ci_codec*.
    """
    features = FEATURES
    if len(records) == fmt.CHUNK_V2.size * chunk_count:
        features |= fmt.CHUNK_INFO_V2
    if contexts:
        features |= fmt.BATCH_CHUNKS
    data_header = tar_header("image.blob", data_size)
    ci_offset = data_size + len(data_header)
    array = bytes(records) + bytes(contexts)
    stored = compress(array) if ci_codec != "none" else array
    if len(stored) >= len(array):
        stored, ci_codec = array, "none"
    header = fmt.META_HEADER.pack(
        fmt.META_MAGIC,
        features,
        _COMPRESSOR_NUMBERS[ci_codec],
        chunk_count,
        ci_offset,
        len(stored),
        len(array),
        len(records) if contexts else 0,
        len(contexts),
        len(contexts) // fmt.BATCH.size,
        fmt.META_MAGIC,
    )
    meta_header = tar_header("blob.meta", len(stored) + len(header))
    digests_at = ci_offset + len(stored) + len(header) + len(meta_header)
    data_hash = data_hash.copy()
    data_hash.update(data_header)  # the digest of image.blob includes its tar header: rafs-v6 4.5
    toc = b"".join(
        (
            toc_entry("image.blob", "none", data_hash.digest(), 0, data_size, size),
            toc_entry("blob.meta", ci_codec, _sha256(array), ci_offset, len(stored), len(array)),
            toc_entry("blob.meta.header", "none", _sha256(header), ci_offset + len(stored), 4096, 4096),
            toc_entry("blob.digest", "none", _sha256(digests), digests_at, len(digests), len(digests)),
        )
    )
    toc += tar_header("rafs.blob.toc", len(toc))
    digests_header = tar_header("blob.digest", len(digests))
    return BlobTail(
        pieces=(data_header, stored, header, meta_header, bytes(digests), digests_header, toc),
        features=features,
        ci_offset=ci_offset,
        ci_stored=len(stored),
        ci_size=len(array),
        ci_codec=ci_codec,
        toc_size=len(toc),
        toc_digest=_sha256(toc),
        blob_meta=array + bytes(-len(array) % fmt.BLOCK_SIZE) + header,
    )


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes behind a payload of *size* bytes. Source: rafs-v6 4.1."""
    raw = bytearray(fmt.TAR_BLOCK)
    raw[: len(name)] = name.encode("ascii")
    if size < _TAR_SIZE_MAX:
        raw[124:136] = b"%011o\0" % size
    else:  # GNU's way: big-endian, first bit set
        raw[124:136] = (1 << 95 | size).to_bytes(12, "big")
    raw[136:148] = b"%011o\0" % 0
    raw[148:156] = b" " * 8
    raw[156:157] = b"0"
    raw[257:265] = b"ustar  \0"
    raw[148:156] = b"%07o\0" % sum(raw)
    return bytes(raw)


def toc_entry(name: str, codec: str, digest: bytes, offset: int, stored_size: int, size: int) -> bytes:
    """The 128 bytes for one payload. Source: rafs-v6 4.5."""
    return fmt.TOC_ENTRY.pack(_TOC_FLAGS[codec], 0, name.encode("ascii"), digest, offset, stored_size, size)


def _sha256(data: Bytes) -> bytes:
    return hashlib.sha256(data).digest()
