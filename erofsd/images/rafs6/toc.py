"""Reads the framing of a Nydus blob: tar headers behind each payload, the table of contents at the end.

The file is written front to back with every payload *followed* by its tar header, so it is parsed from the
end: either through the TOC, whose own header is the last 512 bytes, or header by header.

Source: rafs-v6 4.1, 4.5; Nydus storage/src/meta/toc.rs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from erofsd.codecs.base import CODECS
from erofsd.errors import CodecError, CorruptImage, UnsupportedImage
from erofsd.images.base import ByteSource
from erofsd.images.rafs6 import format as fmt
from erofsd.images.rafs6.bootstrap import refuse_other_formats
from erofsd.images.source import corrupt

TOC_NAME = "rafs.blob.toc"
BOOTSTRAP_NAME = "image.boot"
DIGESTS_NAME = "blob.digest"
SECTION_NAMES = ("image.blob", "blob.meta", DIGESTS_NAME, BOOTSTRAP_NAME, TOC_NAME)
TOC_PROBE_SIZE = 4096
BOOTSTRAP_SIZE_MAX = 1 << 30
# What shrinks more than this is no bootstrap: inodes hold times and numbers that differ.
BOOTSTRAP_RATIO_MAX = 1024
_CODECS = {1: "none", 2: "zstd", 4: "lz4_block"}


class Section(NamedTuple):
    """A payload of a blob: ``size`` stored bytes at ``offset``."""

    name: str
    offset: int
    size: int


class TocEntry(NamedTuple):
    """One entry of a TOC.

    Attributes:
        codec: Name in CODECS.
        digest: SHA-256 of the payload decoded; of ``image.blob``, of the payload and its tar header.
        offset: Of the payload; meaningless for ``image.blob`` (old writers put a size there).
    """

    name: str
    codec: str
    digest: bytes
    offset: int
    stored_size: int
    size: int


def parse_tar_header(header: bytes) -> tuple[str, int] | None:
    """Name and payload size from one of Nydus' tar headers; None if it is none.

    Source: rafs-v6 4.1; GNU tar, src/tar.h, struct posix_header.
    """
    if (
        len(header) != fmt.TAR_BLOCK
        or header[257:265] != b"ustar  \0"
        or header[156:157] not in (b"0", b"\0")
    ):
        return None
    try:
        size = int(header[124:136].rstrip(b" \0"), 8)
        checksum = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return None
    if size < 0 or checksum != sum(header) - sum(header[148:156]) + 8 * 0x20:
        return None
    return header[:100].rstrip(b"\0").decode("latin-1"), size


def sections(source: ByteSource) -> list[Section]:
    """The payloads of a framed blob in the order of the file; empty for a blob without framing.

    Raises:
        CorruptImage: The framing begins, but does not reach the beginning of the file.
    """
    found: list[Section] = []
    position = source.size
    while position:
        parsed = None
        if position >= fmt.TAR_BLOCK:
            parsed = parse_tar_header(source.pread(position - fmt.TAR_BLOCK, fmt.TAR_BLOCK))
        if parsed is None and not found:
            return []
        if parsed is None or parsed[0] not in SECTION_NAMES or parsed[1] > position - fmt.TAR_BLOCK:
            raise corrupt(source.name, position, "tar framing", f"no header of a known section: {parsed}")
        if any(section.name == parsed[0] for section in found):
            raise corrupt(source.name, position, "tar framing", f"{parsed[0]} twice")
        position -= fmt.TAR_BLOCK + parsed[1]
        found.append(Section(parsed[0], position, parsed[1]))
    return found[::-1]


def read_toc(source: ByteSource, size: int = 0, digest: bytes = b"") -> dict[str, TocEntry]:
    """The table of contents of a blob, by name; empty if it has none.

    Args:
        source: The blob.
        size: Bytes of TOC and its tar header, where the blob table states them; 0 looks for it.
        digest: SHA-256 of those bytes, where it is stated; zeros or nothing are not compared.

    Raises:
        CorruptImage: Not what the blob table states, or entries that cannot be.
    """
    length = size or min(TOC_PROBE_SIZE, source.size // fmt.TOC_ENTRY.size * fmt.TOC_ENTRY.size)
    start = source.size - length
    tail = source.pread(start, length)
    parsed = parse_tar_header(tail[-fmt.TAR_BLOCK :])
    if parsed is None or parsed[0] != TOC_NAME:
        if size:
            raise corrupt(source.name, start, "TOC", "the blob table states one, but there is none")
        return {}
    payload_size = parsed[1]
    if payload_size % fmt.TOC_ENTRY.size or payload_size + fmt.TAR_BLOCK > length:
        raise corrupt(source.name, start, "TOC", f"{payload_size} bytes of entries")
    tail = tail[-fmt.TAR_BLOCK - payload_size :]
    if any(digest) and hashlib.sha256(tail).digest() != digest:
        raise corrupt(
            source.name, source.size - len(tail), "TOC", "is not the one that the blob table states"
        )
    return {entry.name: entry for entry in _entries(source, tail[:payload_size])}


def _entries(source: ByteSource, table: bytes) -> Iterator[TocEntry]:
    for flags, _, raw_name, digest, offset, stored, size in fmt.TOC_ENTRY.iter_unpack(table):
        name = raw_name.rstrip(b"\0").decode("latin-1")
        codec = _CODECS.get(flags & 0xF)
        if codec is None:
            raise corrupt(source.name, offset, "TOC", f"{name!r}: unknown compression {flags & 0xF}")
        if name != "image.blob" and offset + stored > source.size:
            raise corrupt(source.name, offset, "TOC", f"{name!r}: {stored} bytes reach past the end")
        yield TocEntry(name, codec, digest, offset, stored, size)


def read_entry(source: ByteSource, entry: TocEntry) -> bytes:
    """The decoded payload of *entry*, compared with its digest.

    Raises:
        CorruptImage: It does not decode, or not to what the TOC states.
    """
    if entry.size > BOOTSTRAP_SIZE_MAX or entry.size > entry.stored_size * BOOTSTRAP_RATIO_MAX:
        problem = f"{entry.name}: {entry.size} bytes from {entry.stored_size}"
        raise corrupt(source.name, entry.offset, "TOC", f"{problem}: too large")
    stored = source.pread(entry.offset, entry.stored_size)
    decoded = bytearray(entry.size)
    try:
        CODECS[entry.codec]().decompress_into(memoryview(stored), memoryview(decoded))
    except CodecError as exc:
        raise corrupt(source.name, entry.offset, entry.name, str(exc)) from exc
    if hashlib.sha256(decoded).digest() != entry.digest:
        raise corrupt(source.name, entry.offset, entry.name, "is not the one that the TOC states")
    return bytes(decoded)


def extract_bootstrap(source: ByteSource) -> bytes:
    """The bootstrap that is embedded in a blob.

    It may name its own blob by a placeholder: pass the name under which the blob was found to
    ``parse_bootstrap``.

    Raises:
        CorruptImage: The blob's framing, or the bootstrap's digest, is wrong.
        UnsupportedImage: There is no bootstrap in it, or it is one of Nydus v3.
    """
    if source.size < fmt.TAR_BLOCK:
        raise corrupt(source.name, 0, "blob", f"{source.size} bytes hold nothing")
    toc = read_toc(source)
    if entry := toc.get(BOOTSTRAP_NAME):
        return read_entry(source, entry)
    parsed = parse_tar_header(source.pread(source.size - fmt.TAR_BLOCK, fmt.TAR_BLOCK))
    if (
        parsed
        and parsed[0] == BOOTSTRAP_NAME
        and parsed[1] <= min(source.size - fmt.TAR_BLOCK, BOOTSTRAP_SIZE_MAX)
    ):
        return source.pread(source.size - fmt.TAR_BLOCK - parsed[1], parsed[1])
    try:
        refuse_other_formats(source)
    except CorruptImage:
        pass  # it is nothing that we know by another name either
    raise UnsupportedImage(f"{source.name}: a blob without a bootstrap in it")


def read_chunk_digests(source: ByteSource, toc: Mapping[str, TocEntry], chunk_count: int) -> bytes:
    """The blob's own digests (``blob.digest``), 32 bytes a chunk in the order of chunk indexes.

    Raises:
        CorruptImage: There are none, or not one a chunk.
    """
    entry = toc.get(DIGESTS_NAME)
    if entry is None or entry.size != 32 * chunk_count:
        raise corrupt(source.name, 0, DIGESTS_NAME, f"not {chunk_count} digests")
    return read_entry(source, entry)
