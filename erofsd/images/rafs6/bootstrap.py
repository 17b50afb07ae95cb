"""Reads the tables of a RAFS v6 bootstrap: extended superblock, blobs, chunks, prefetch hints."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from erofsd.errors import CorruptImage, UnsupportedImage
from erofsd.images.base import ByteSource
from erofsd.images.erofs import format as erofs
from erofsd.images.erofs.format import SuperBlock
from erofsd.images.rafs6 import format as fmt
from erofsd.images.rafs6.format import BlobEntry
from erofsd.images.source import BytesSource, corrupt

# Blob ids become file names and URL parts.
_BLOB_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """A RAFS v6 bootstrap with its tables checked.

    Attributes:
        data: All of it.
        chunk_size: RAFS chunk size, bytes: what a chunk index counts in, whatever its format word says.
        digester: ``"blake3"`` or ``"sha256"``: of the chunk table.
        blobs: In the order of device slots.
        chunk_table: Raw records of ``format.CHUNK``.
        prefetch: nids to prefetch, in order; the root's means everything.
    """

    name: str
    data: bytes
    super: SuperBlock
    flags: int
    chunk_size: int
    digester: str
    blobs: tuple[BlobEntry, ...]
    chunk_table: memoryview
    chunk_table_offset: int
    prefetch: tuple[int, ...]


def refuse_other_formats(source: ByteSource) -> None:
    """Say what something is that is no RAFS v6 bootstrap, where we know it.

    Raises:
        UnsupportedImage: RAFS v5, Nydus v3 (RAFS v7), plain EROFS.
        CorruptImage: Too short for anything.
    """
    name = source.name
    head = source.pread(0, min(source.size, erofs.SUPER_OFFSET + erofs.SUPER.size))
    if int.from_bytes(head[:4], "little") == fmt.V5_MAGIC:
        raise UnsupportedImage(f"{name}: RAFS v5", hint="Convert it to RAFS v6 (nydus-image --fs-version 6).")
    if source.size >= fmt.V3_FOOTER_SIZE:
        tail = source.pread(source.size - fmt.V3_FOOTER_SIZE, len(fmt.V3_FOOTER_MAGIC))
        if tail == fmt.V3_FOOTER_MAGIC:
            raise UnsupportedImage(f"{name}: Nydus v3 (RAFS v7)")
    if not erofs.is_erofs(head):
        raise corrupt(name, erofs.SUPER_OFFSET, "magic", "neither EROFS nor RAFS")
    if not int.from_bytes(head[erofs.SUPER_OFFSET + 8 :][:4], "little") & erofs.COMPAT_RAFS:
        slots = erofs.parse_superblock(source).devices
        # Nydus v3 tags its devices with a raw SHA-256; others write text or nothing
        if slots and all(any(slot.tag[:32]) and not any(slot.tag[32:]) for slot in slots):
            raise UnsupportedImage(f"{name}: Nydus v3 (RAFS v7)")
        raise UnsupportedImage(f"{name}: plain EROFS, not RAFS v6")


def parse_bootstrap(name: str, data: bytes, blob_id: str | None = None) -> Bootstrap:
    """Read and check the tables of a bootstrap.

    Args:
        name: For error messages.
        data: The whole bootstrap.
        blob_id: The blob it was found in, if it was: a bootstrap cannot contain the digest of what contains
            it, so there the file name is the id [2.3]. The returned data say so, too.

    Raises:
        CorruptImage: Names offset and field.
        UnsupportedImage: A kind of image we do not serve, by name.
    """
    source = BytesSource(name, data)
    refuse_other_formats(source)
    sb = erofs.parse_superblock(source)
    # fmt: off
    (flags, blobs_at, blobs_size, chunk_size, chunks_at, chunks_size, prefetch_at, prefetch_size,
     _) = fmt.EXT_SUPER.unpack(source.pread(fmt.EXT_SUPER_OFFSET, fmt.EXT_SUPER.size))
    # fmt: on
    _check_flags(name, flags)
    _check_super(name, sb, data)
    if chunk_size & (chunk_size - 1) or not fmt.CHUNK_SIZE_MIN <= chunk_size <= fmt.CHUNK_SIZE_MAX:
        raise _bad(name, 20, "chunk_size", f"{chunk_size} is not a power of two in 4096…16777216")
    tables = _Tables(name, len(data))
    devices_end = fmt.DEVICE_TABLE_OFFSET + len(sb.devices) * erofs.DEVICE_SLOT.size
    tables.claim("device table", fmt.DEVICE_TABLE_OFFSET, devices_end - fmt.DEVICE_TABLE_OFFSET)
    if blobs_size != fmt.BLOB.size * len(sb.devices):
        raise _bad(name, 16, "blob_table_size", f"{blobs_size} bytes for {len(sb.devices)} devices")
    if blobs_size:
        tables.claim("blob table", blobs_at, blobs_size, alignment=fmt.BLOCK_SIZE)
    if chunks_size % fmt.CHUNK.size:
        raise _bad(name, 32, "chunk_table_size", f"{chunks_size} is not a multiple of {fmt.CHUNK.size}")
    if chunks_size:
        tables.claim("chunk table", chunks_at, chunks_size, alignment=fmt.BLOCK_SIZE)
    if prefetch_at and prefetch_size:  # images without data may have a size without an offset
        tables.claim("prefetch table", prefetch_at, prefetch_size)
    blobs = _parse_blobs(name, data, sb, blobs_at, chunk_size)
    if blob_id is not None:
        data, blobs = _rename(name, data, blobs, blob_id)
    ids = [blob.blob_id for blob in blobs]
    if len(set(ids)) != len(ids):
        raise corrupt(name, blobs_at, "blob table", "one blob id twice")
    return Bootstrap(
        name=name,
        data=data,
        super=sb,
        flags=flags,
        chunk_size=chunk_size,
        digester="blake3" if flags & fmt.FLAG_BLAKE3 else "sha256",
        blobs=blobs,
        chunk_table=memoryview(data)[chunks_at : chunks_at + chunks_size] if chunks_size else memoryview(b""),
        chunk_table_offset=chunks_at,
        prefetch=_parse_prefetch(data, prefetch_at, prefetch_size) if prefetch_at else (),
    )


def _bad(name: str, offset: int, field: str, problem: str) -> CorruptImage:
    return corrupt(name, fmt.EXT_SUPER_OFFSET + offset, field, problem)


class _Tables:
    # Where the tables lie; none may overlap another or reach past the end.

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.claimed = [("superblocks", 0, fmt.DEVICE_TABLE_OFFSET)]

    def claim(self, what: str, offset: int, size: int, alignment: int = 1) -> None:
        if offset % alignment or offset + size > self.size:
            raise corrupt(self.name, offset, what, f"{size} bytes, misplaced in {self.size}")
        for other, start, stop in self.claimed:
            if offset < stop and start < offset + size:
                raise corrupt(self.name, offset, what, f"overlaps the {other}")
        self.claimed.append((what, offset, offset + size))


def _check_flags(name: str, flags: int) -> None:
    if flags & fmt.FLAG_TARFS:
        raise UnsupportedImage(f"{name}: {fmt.REFUSED_FEATURES[fmt.TARFS]}")
    if flags & fmt.FLAG_AES_128_XTS:
        raise UnsupportedImage(f"{name}: {fmt.REFUSED_FEATURES[fmt.ENCRYPTED]}")
    if unknown := flags & ~fmt.FLAGS_KNOWN:
        raise UnsupportedImage(f"{name}: unknown RAFS flags {unknown:#x}")
    if (flags & fmt.FLAG_COMPRESSORS).bit_count() != 1:
        raise _bad(name, 0, "flags", f"{flags:#x} do not name one compressor")
    if (flags & (fmt.FLAG_BLAKE3 | fmt.FLAG_SHA256)).bit_count() != 1:
        raise _bad(name, 0, "flags", f"{flags:#x} do not name one digest")


def _check_super(name: str, sb: SuperBlock, data: bytes) -> None:
    # What Nydus' own reader demands [1.1]; more than EROFS does.
    wanted = erofs.INCOMPAT_CHUNKED_FILE | erofs.INCOMPAT_DEVICE_TABLE
    if sb.feature_incompat != wanted:
        problem = f"{sb.feature_incompat:#x} is not {wanted:#x}"
        raise corrupt(name, erofs.SUPER_OFFSET + 80, "feature_incompat", problem)
    if sb.block_size != fmt.BLOCK_SIZE or len(data) % fmt.BLOCK_SIZE:
        problem = f"{sb.block_size}, and the file has {len(data)} bytes"
        raise corrupt(name, erofs.SUPER_OFFSET + 12, "block size", problem)
    if sb.meta_block * fmt.BLOCK_SIZE > len(data):
        raise corrupt(name, erofs.SUPER_OFFSET + 40, "meta_blkaddr", f"{sb.meta_block} lies past the end")
    if sb.devices and sb.device_table_offset != fmt.DEVICE_TABLE_OFFSET:
        problem = f"the device table is at {sb.device_table_offset}"
        raise corrupt(name, erofs.SUPER_OFFSET + 88, "devt_slotoff", problem)
    if len(sb.devices) > fmt.BLOB_COUNT_MAX:
        raise UnsupportedImage(f"{name}: {len(sb.devices)} blobs; RAFS v6 can address {fmt.BLOB_COUNT_MAX}")


def _parse_blobs(
    name: str, data: bytes, sb: SuperBlock, start: int, chunk_size: int
) -> tuple[BlobEntry, ...]:
    blobs = []
    total = 0
    for i, slot in enumerate(sb.devices):
        blob = _parse_blob(name, data, start + i * fmt.BLOB.size, i, chunk_size)
        if blob.uncompressed_size != slot.block_count * fmt.BLOCK_SIZE:
            problem = f"{blob.uncompressed_size} bytes, but the device has {slot.block_count} blocks"
            raise corrupt(name, blob.offset + 96, "uncompressed_size", problem)
        if slot.tag.rstrip(b"\0").decode("latin-1") != blob.blob_id:
            at = fmt.DEVICE_TABLE_OFFSET + i * erofs.DEVICE_SLOT.size
            raise corrupt(name, at, "device tag", f"is not blob id {blob.blob_id}")
        total += blob.chunk_count
        blobs.append(blob)
    if total > fmt.CHUNK_COUNT_MAX:
        raise UnsupportedImage(f"{name}: {total} chunks; at most {fmt.CHUNK_COUNT_MAX} are supported")
    return tuple(blobs)


def _parse_blob(name: str, data: bytes, offset: int, index: int, chunk_size: int) -> BlobEntry:
    # fmt: off
    (raw_id, blob_index, blob_chunk_size, chunk_count, compressor, digester, features, compressed_size,
     uncompressed_size, toc_size, ci_compressor, ci_offset, ci_compressed, ci_uncompressed, toc_digest,
     _meta_digest, _meta_size, _iv, cipher) = fmt.BLOB.unpack_from(data, offset)
    # fmt: on

    def bad(at: int, field: str, problem: str) -> CorruptImage:
        return corrupt(name, offset + at, f"{field} of blob {index}", problem)

    for feature, what in fmt.REFUSED_FEATURES.items():
        if features & feature:
            raise UnsupportedImage(f"{name}: {what}")
    if cipher:
        raise UnsupportedImage(f"{name}: {fmt.REFUSED_FEATURES[fmt.ENCRYPTED]}")
    if unknown := features & 0xFFFF & ~fmt.INCOMPAT_KNOWN:
        raise UnsupportedImage(f"{name}: unknown features {unknown:#x} of blob {index}")
    if not features & fmt.ALIGNED or features & 0x80000000:
        raise bad(84, "features", f"{features:#x}")
    blob_id = raw_id.rstrip(b"\0").decode("latin-1")
    if not _BLOB_ID.fullmatch(blob_id):
        raise bad(0, "blob_id", f"{blob_id!r} is no name")
    if (blob_index, blob_chunk_size) != (index, chunk_size):
        raise bad(
            64, "blob_index, chunk_size", f"({blob_index}, {blob_chunk_size}) is not ({index}, {chunk_size})"
        )
    if compressor not in fmt.COMPRESSORS or ci_compressor not in fmt.COMPRESSORS:
        raise bad(76, "compressor", f"{compressor} or {ci_compressor} is unknown")
    if digester not in fmt.DIGESTERS:
        raise bad(80, "digester", f"{digester} is unknown")
    if compressor == fmt.GZIP and not features & fmt.CHUNK_INFO_V2:
        raise UnsupportedImage(f"{name}: gzip chunks of legacy eStargz (their sizes are not recorded)")
    if compressed_size > fmt.STORED_SIZE_MAX or uncompressed_size > fmt.DECODED_SIZE_MAX:
        raise bad(88, "compressed_size, uncompressed_size", f"{compressed_size}, {uncompressed_size}")
    if not uncompressed_size or uncompressed_size % fmt.BLOCK_SIZE:
        raise bad(96, "uncompressed_size", f"{uncompressed_size} is not a positive number of blocks")
    if chunk_count > uncompressed_size // fmt.BLOCK_SIZE:
        raise bad(72, "chunk_count", f"{chunk_count} in {uncompressed_size} bytes")
    record = fmt.CHUNK_V2.size if features & fmt.CHUNK_INFO_V2 else fmt.CHUNK_V1.size
    most = least = record * chunk_count
    if features & fmt.BATCH_CHUNKS:
        if not features & fmt.CHUNK_INFO_V2:
            raise bad(84, "features", "batches need V2 chunk information")
        most += fmt.BATCH.size * chunk_count
    if not least <= ci_uncompressed <= most or ci_compressed > ci_uncompressed:
        raise bad(128, "ci sizes", f"{ci_compressed}, {ci_uncompressed} bytes for {chunk_count} chunks")
    if ci_offset + ci_compressed > fmt.STORED_SIZE_MAX:
        raise bad(112, "ci_offset", f"{ci_offset}")
    if toc_size % 128 or (toc_size and not 512 <= toc_size <= 65536):
        raise bad(104, "blob_toc_size", f"{toc_size}")
    blob = BlobEntry(
        offset=offset,
        blob_id=blob_id,
        chunk_size=chunk_size,
        chunk_count=chunk_count,
        compressor=compressor,
        digester=digester,
        features=features,
        compressed_size=compressed_size,
        uncompressed_size=uncompressed_size,
        toc_size=toc_size,
        ci_compressor=ci_compressor,
        ci_offset=ci_offset,
        ci_compressed_size=ci_compressed,
        ci_uncompressed_size=ci_uncompressed,
        toc_digest=toc_digest,
    )
    if blob.data_end < 0:
        raise bad(112, "ci_offset", f"{ci_offset} leaves no room for a tar header")
    return blob


def _rename(
    name: str, data: bytes, blobs: tuple[BlobEntry, ...], blob_id: str
) -> tuple[bytes, tuple[BlobEntry, ...]]:
    """Give the entry of the blob that a bootstrap is embedded in its true name."""
    if not _BLOB_ID.fullmatch(blob_id):
        raise UnsupportedImage(f"{name}: {blob_id!r} cannot be a blob id")
    embedded = fmt.INLINED_FS_META | fmt.CAP_TAR_TOC
    own = [i for i, b in enumerate(blobs) if b.features & embedded != fmt.CAP_TAR_TOC]
    own = [i for i in own if blobs[i].blob_id == fmt.PLACEHOLDER_ID] or own[-1:]
    if not own:
        return data, blobs
    patched = bytearray(data)
    raw = blob_id.encode("ascii").ljust(64, b"\0")
    at = fmt.DEVICE_TABLE_OFFSET + own[0] * erofs.DEVICE_SLOT.size
    for start in (blobs[own[0]].offset, at):
        patched[start : start + 64] = raw
    renamed = list(blobs)
    renamed[own[0]] = replace(blobs[own[0]], blob_id=blob_id)
    return bytes(patched), tuple(renamed)


def _parse_prefetch(data: bytes, offset: int, size: int) -> tuple[int, ...]:
    nids = []
    for at in range(offset, offset + size // 4 * 4, 4):
        nid = int.from_bytes(data[at : at + 4], "little")
        if not nid:  # ends early
            break
        nids.append(nid)
    return tuple(nids)
