"""Records of RAFS v6: what is written is what is read, and what contradicts itself is refused."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from erofsd.blobs.layout import BlobLayout
from erofsd.errors import CorruptImage, UnsupportedImage
from erofsd.images.rafs6 import format as fmt
from erofsd.images.rafs6 import toc
from erofsd.images.rafs6.blobmeta import ChunkColumns, parse_blob_meta
from erofsd.images.rafs6.bootstrap import Bootstrap, parse_bootstrap
from erofsd.images.rafs6.format import BlobEntry
from erofsd.images.rafs6.layout import build_layouts
from erofsd.images.source import BytesSource

ENTRY = BlobEntry(
    offset=4096,
    blob_id="0" * 64,
    chunk_size=1 << 20,
    chunk_count=0,
    compressor=3,
    digester=0,
    features=fmt.ALIGNED,
    compressed_size=1 << 39,
    uncompressed_size=1 << 40,
    toc_size=0,
    ci_compressor=0,
    ci_offset=1 << 38,
    ci_compressed_size=0,
    ci_uncompressed_size=0,
    toc_digest=bytes(32),
)
# decoded size, stored size, gap before it in the blob and in the decoded blob
CHUNKS = st.lists(
    st.tuples(st.integers(1, 1 << 20), st.integers(1, 1 << 20), st.integers(0, 9999), st.integers(0, 3)),
    min_size=1,
    max_size=40,
)


def place(chunks: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Decoded offset and size, stored offset and size of chunks laid out in order."""
    placed, decoded_at, stored_at = [], 0, 0
    for size, stored, stored_gap, decoded_gap in chunks:
        decoded_at = -(-decoded_at // 4096) * 4096 + decoded_gap * 4096
        stored_at += stored_gap
        placed.append((decoded_at, size, stored_at, stored))
        decoded_at, stored_at = decoded_at + size, stored_at + stored
    return placed


def header_of(entry: BlobEntry, contexts: int = 0, count: int = 0) -> bytes:
    sizes = (entry.ci_offset, entry.ci_compressed_size, entry.ci_uncompressed_size)
    start = (fmt.META_MAGIC, entry.features, entry.ci_compressor, entry.chunk_count)
    return fmt.META_HEADER.pack(*start, *sizes, contexts, count * fmt.BATCH.size, count, fmt.META_MAGIC)


def entry_for(array: bytes, count: int, features: int = fmt.ALIGNED) -> BlobEntry:
    size = len(array)
    return replace(
        ENTRY, chunk_count=count, features=features, ci_compressed_size=size, ci_uncompressed_size=size
    )


def pack_v1(placed: list[tuple[int, int, int, int]]) -> bytes:
    return b"".join(
        fmt.CHUNK_V1.pack(
            at | (size - 1 & 0xFFFFF) << 44 | (size - 1 >> 20) << 8,
            stored_at | (stored - 1 & 0xFFFFF) << 44 | (stored - 1 >> 20) << 40,
        )
        for at, size, stored_at, stored in placed
    )


def pack_v2(at: int, size: int, stored_at: int, stored: int, flags: int, data: int = 0) -> bytes:
    return fmt.CHUNK_V2.pack(at // 4096 | size - 1 << 32 | flags << 56, stored_at | stored << 40, data)


def rows(columns: ChunkColumns) -> list[tuple[int, int, int, int]]:
    units = zip(columns.unit_offset, columns.unit_stored, strict=True)
    chunks = zip(columns.chunk_offset, columns.chunk_size, strict=True)
    return [(*chunk, *unit) for chunk, unit in zip(chunks, units, strict=True)]


@given(CHUNKS)
def test_v1_records_read_as_written(chunks: list[tuple[int, int, int, int]]) -> None:
    placed = place(chunks)
    array = pack_v1(placed)
    entry = entry_for(array, len(placed))
    columns = parse_blob_meta("meta", entry, array + header_of(entry))
    assert rows(columns) == placed
    assert list(columns.unit_packed) == [size != stored for _, size, _, stored in placed]
    cached = array.ljust(-(-len(array) // 4096) * 4096, b"\0") + header_of(entry)
    assert parse_blob_meta("meta", entry, cached) == columns


@given(CHUNKS)
def test_v2_records_read_as_written(chunks: list[tuple[int, int, int, int]]) -> None:
    placed = [(at, size, stored_at, min(size, stored)) for at, size, stored_at, stored in place(chunks)]
    array = b"".join(pack_v2(*chunk, flags=chunk[1] != chunk[3], data=7) for chunk in placed)
    entry = entry_for(array, len(placed), fmt.ALIGNED | fmt.CHUNK_INFO_V2)
    assert rows(parse_blob_meta("meta", entry, array + header_of(entry))) == placed


@pytest.mark.parametrize(
    ("compressor", "compress"),
    [
        (1, lambda data: lz4.block.compress(data, store_size=False)),
        (3, zstandard.ZstdCompressor().compress),
    ],
)
def test_compressed_arrays_are_decoded(compressor: int, compress: object) -> None:
    placed = place([(5000, 4000, 0, 0)] * 300)
    array = pack_v1(placed)
    packed = compress(array)  # type: ignore[operator]
    entry = replace(entry_for(array, 300), ci_compressor=compressor, ci_compressed_size=len(packed))
    assert rows(parse_blob_meta("meta", entry, packed + header_of(entry))) == placed
    with pytest.raises(CorruptImage, match="chunk info array"):
        parse_blob_meta("meta", entry, bytes(len(packed)) + header_of(entry))


BATCHED = fmt.ALIGNED | fmt.CHUNK_INFO_V2 | fmt.BATCH_CHUNKS
MEMBER = fmt.RECORD_COMPRESSED | fmt.RECORD_BATCH


def batched(*records: bytes, contexts: list[tuple[int, int]]) -> ChunkColumns:
    array = b"".join(records) + b"".join(fmt.BATCH.pack(*context) for context in contexts)
    entry = entry_for(array, len(records), BATCHED)
    header = header_of(entry, 24 * len(records), len(contexts))
    return parse_blob_meta("meta", entry, array + header)


def test_members_of_a_batch_share_its_unit() -> None:
    columns = batched(
        pack_v2(0, 100, 0, 0, MEMBER, 0),
        pack_v2(4096, 50, 0, 0, MEMBER, 100),
        pack_v2(8192, 9000, 80, 5000, fmt.RECORD_COMPRESSED),
        pack_v2(20480, 60, 5080, 0, MEMBER, 1 << 32),
        contexts=[(80, 150), (60, 60)],
    )
    assert list(columns.chunk_unit) == [0, 0, 1, 2]
    assert list(columns.chunk_at) == [0, 100, 0, 0]
    assert list(columns.unit_stored) == [80, 5000, 60]
    assert list(columns.unit_size) == [150, 9000, 60]
    assert list(columns.unit_packed) == [1, 1, 0]


@pytest.mark.parametrize(
    ("records", "contexts"),
    [
        ([pack_v2(0, 100, 0, 0, MEMBER, 51)], [(80, 150)]),  # past its batch
        ([pack_v2(0, 100, 0, 0, MEMBER, 1 << 32)], [(80, 150)]),  # no such batch
        ([pack_v2(0, 9, 0, 0, MEMBER), pack_v2(4096, 9, 5, 0, MEMBER, 9)], [(80, 150)]),  # elsewhere
        ([pack_v2(0, 9, 0, 0, MEMBER)], [(0, 150)]),
        ([pack_v2(0, 9, 0, 0, MEMBER)], [(160, 150)]),
        ([pack_v2(0, 9, 0, 0, MEMBER)], [(160, (16 << 20) + 1)]),
        (
            [
                pack_v2(0, 9, 0, 0, MEMBER),
                pack_v2(4096, 9, 80, 9, 0),
                pack_v2(8192, 9, 89, 0, MEMBER, 9),  # a batch that goes on after something else
            ],
            [(80, 150)],
        ),
    ],
)
def test_bad_batches_are_corrupt(records: list[bytes], contexts: list[tuple[int, int]]) -> None:
    with pytest.raises(CorruptImage):
        batched(*records, contexts=contexts)


@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 5000, 0, 10), (4096, 10, 10, 5)],  # decoded ranges overlap
        [(4096, 10, 0, 10), (0, 10, 10, 5)],  # out of order
        [(0, 10, 100, 10), (4096, 10, 105, 5)],  # stored ranges overlap
        [(0, (1 << 20) + 1, 0, 10)],  # larger than a chunk may be
        [(0, 10, (1 << 39) - 5, 10)],  # past the end of the data
        [((1 << 40) - 4096, 5000, 0, 10)],  # past the end of the decoded blob
    ],
)
def test_bad_layouts_are_corrupt(chunks: list[tuple[int, int, int, int]]) -> None:
    array = pack_v1(chunks)
    entry = entry_for(array, len(chunks))
    with pytest.raises(CorruptImage):
        parse_blob_meta("meta", entry, array + header_of(entry))


@pytest.mark.parametrize("flags", [fmt.RECORD_ZRAN, fmt.RECORD_ENCRYPTED, 0x20, 0x80])
def test_chunks_of_other_kinds_are_refused(flags: int) -> None:
    array = pack_v2(0, 10, 0, 10, flags)
    entry = entry_for(array, 1, fmt.ALIGNED | fmt.CHUNK_INFO_V2)
    with pytest.raises(UnsupportedImage, match="flags"):
        parse_blob_meta("meta", entry, array + header_of(entry))


@settings(max_examples=300)
@given(st.binary(min_size=512, max_size=512), st.integers(0, 8**11 - 1))
def test_any_512_bytes_are_a_tar_header_or_not(noise: bytes, size: int) -> None:
    assert toc.parse_tar_header(noise) is None
    assert toc.parse_tar_header(tar_header("image.boot", size)) == ("image.boot", size)


def tar_header(name: str, size: int) -> bytes:
    """As Nydus writes it."""
    header = bytearray(512)
    header[: len(name)] = name.encode()
    header[124:136] = b"%011o\0" % size
    header[136:148] = b"00000000000\0"
    header[156:157] = b"0"
    header[257:265] = b"ustar  \0"
    header[148:156] = b" " * 8
    header[148:156] = b"%07o\0" % sum(header)
    return bytes(header)


def framed(*sections: tuple[str, bytes]) -> BytesSource:
    return BytesSource("blob", b"".join(data + tar_header(name, len(data)) for name, data in sections))


def test_framing_is_walked_from_the_end() -> None:
    source = framed(("image.blob", b"x" * 700), ("blob.meta", b"y" * 33), ("image.boot", b"z" * 9))
    assert toc.sections(source) == [("image.blob", 0, 700), ("blob.meta", 1212, 33), ("image.boot", 1757, 9)]
    assert toc.extract_bootstrap(source) == b"z" * 9
    assert toc.sections(BytesSource("plain", bytes(5000))) == []
    for bad in (b"\0" + source.pread(0, source.size), source.pread(5, source.size - 5)):
        with pytest.raises(CorruptImage, match="framing"):
            toc.sections(BytesSource("cut", bad))
    with pytest.raises(CorruptImage, match="twice"):
        toc.sections(framed(("image.blob", b"x"), ("image.blob", b"x")))


@pytest.mark.parametrize(
    ("codec", "stored", "size", "match"),
    [
        (1, b"abc", 3, None),
        (2, zstandard.ZstdCompressor().compress(b"abc"), 3, None),
        (3, b"abc", 3, "compression"),
        (1, b"abc", 4, "image.boot"),
        (1, b"abd", 3, "not the one"),
        (2, b"abc", 1 << 40, "too large"),
        (2, b"not zstd", 3, "image.boot"),
    ],
)
def test_toc_entries_are_verified(codec: int, stored: bytes, size: int, match: str | None) -> None:
    digest = hashlib.sha256(b"abc").digest()
    entry = struct.pack("<II16s32sQQQ", codec, 0, b"image.boot", digest, 0, len(stored), size)
    source = framed(("image.boot", stored), ("rafs.blob.toc", entry + b"\xff" * 48))
    if match is None:
        assert toc.extract_bootstrap(source) == b"abc"
        return
    with pytest.raises(CorruptImage, match=match):
        toc.extract_bootstrap(source)


# --- the bootstrap's tables


@pytest.fixture(scope="module")
def boot(testdata: Path) -> bytes:
    return (testdata / "nydus-texture" / "bootstrap" / "rafs-v6-2.2.boot").read_bytes()


BLOB_AT = 4096
CASES = [
    (1028, "<I", 5, None, None),  # checksum, without the bit that says it counts
    (1036, "<B", 9, CorruptImage, "block size"),
    (1064, "<I", 999, CorruptImage, "meta_blkaddr"),
    (1104, "<I", 0x4, CorruptImage, "feature_incompat"),
    (1110, "<H", 2, CorruptImage, "blob_table_size"),
    (1112, "<H", 12, CorruptImage, "devt_slotoff"),
    (1152, "<Q", 0x194 | 0x200, UnsupportedImage, "tarfs"),
    (1152, "<Q", 0x194 | 0x02000000, UnsupportedImage, "encrypted"),
    (1152, "<Q", 0x194 | 1 << 40, UnsupportedImage, "flags"),
    (1152, "<Q", 0x195, CorruptImage, "one compressor"),
    (1152, "<Q", 0x198 | 4, CorruptImage, "one digest"),
    (1160, "<Q", 4097, CorruptImage, "blob table"),
    (1160, "<Q", 1 << 62, CorruptImage, "blob table"),
    (1172, "<I", 1 << 25, CorruptImage, "chunk_size"),
    (1172, "<I", 12345, CorruptImage, "chunk_size"),
    (1176, "<Q", 4096, CorruptImage, "overlaps"),
    (1184, "<Q", 81, CorruptImage, "chunk_table_size"),
    (1184, "<Q", 80 << 40, CorruptImage, "chunk table"),
    (1408, "<Q", 1, CorruptImage, "device tag"),
    (1472, "<I", 8, CorruptImage, "uncompressed_size"),
    (BLOB_AT, "<Q", 0x2F2F2F2F2F2F2F2F, CorruptImage, "device tag|blob_id"),
    (BLOB_AT + 64, "<I", 1, CorruptImage, "blob_index"),
    (BLOB_AT + 68, "<I", 4096, CorruptImage, "chunk_size"),
    (BLOB_AT + 72, "<I", 3, CorruptImage, "ci sizes"),
    (BLOB_AT + 72, "<I", 1 << 24, CorruptImage, "chunk_count"),
    (BLOB_AT + 76, "<I", 4, CorruptImage, "compressor"),
    (BLOB_AT + 76, "<I", 2, UnsupportedImage, "eStargz"),
    (BLOB_AT + 80, "<I", 2, CorruptImage, "digester"),
    (BLOB_AT + 84, "<I", 0x70000029, UnsupportedImage, "zran"),
    (BLOB_AT + 84, "<I", 0x70000821, UnsupportedImage, "external"),
    (BLOB_AT + 84, "<I", 0x70000121, UnsupportedImage, "encrypted"),
    (BLOB_AT + 84, "<I", 0x70001021, UnsupportedImage, "features"),
    (BLOB_AT + 84, "<I", 0x70000020, CorruptImage, "features"),
    (BLOB_AT + 84, "<I", 0x700000A1, CorruptImage, "V2"),
    (BLOB_AT + 88, "<Q", 1 << 41, CorruptImage, "compressed_size"),
    (BLOB_AT + 104, "<I", 129, CorruptImage, "blob_toc_size"),
    (BLOB_AT + 112, "<Q", 1 << 60, CorruptImage, "ci_offset"),
    (BLOB_AT + 112, "<Q", 100, CorruptImage, "ci_offset"),
    (BLOB_AT + 216, "<I", 1, UnsupportedImage, "encrypted"),
]


@pytest.mark.parametrize(("offset", "code", "value", "error", "match"), CASES)
def test_each_field_of_the_tables_is_checked(
    boot: bytes, offset: int, code: str, value: int, error: type[Exception] | None, match: str | None
) -> None:
    changed = bytearray(boot)
    struct.pack_into(code, changed, offset, value)
    if error is None:
        parse_bootstrap("boot", bytes(changed))
        return
    with pytest.raises(error, match=f"boot: .*{match}" if match else None):
        parse_bootstrap("boot", bytes(changed))


def test_more_blobs_than_a_device_id_can_name_are_refused(boot: bytes) -> None:
    changed = bytearray(boot + bytes(1 << 16))
    struct.pack_into("<H", changed, 1110, 255)
    with pytest.raises(UnsupportedImage, match="255 blobs"):
        parse_bootstrap("boot", bytes(changed))


def meta_of(testdata: Path, bootstrap: Bootstrap) -> list[ChunkColumns]:
    (blob,) = bootstrap.blobs
    data = (testdata / "nydus-texture" / "blobs" / blob.blob_id).read_bytes()
    return [parse_blob_meta("meta", blob, BytesSource("", data).pread(*blob.meta_range))]


def test_chunks_that_the_image_does_not_state_have_no_digest(boot: bytes, testdata: Path) -> None:
    changed = bytearray(boot)
    struct.pack_into("<Q", changed, 1184, 80)  # one entry of the chunk table instead of two
    bootstrap = parse_bootstrap("boot", bytes(changed))
    (layout,) = build_layouts(bootstrap, meta_of(testdata, bootstrap))
    assert isinstance(layout, BlobLayout)
    assert layout.stated == b"\0\1"
    assert layout.digest(1) != bytes(32)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(32, 1), (44, 5), (56, 4096), (72, 2), (72, 0)],
)
def test_chunk_table_must_agree_with_the_blob(boot: bytes, testdata: Path, offset: int, value: int) -> None:
    changed = bytearray(boot)
    struct.pack_into("<I", changed, 16384 + offset, value)
    bootstrap = parse_bootstrap("boot", bytes(changed))
    with pytest.raises(CorruptImage, match="chunk table"):
        build_layouts(bootstrap, meta_of(testdata, bootstrap))


def test_two_digests_for_one_chunk_are_corrupt(boot: bytes, testdata: Path) -> None:
    changed = bytearray(boot)
    changed[16384 + 80 : 16384 + 160] = changed[16384 : 16384 + 80]
    bootstrap = parse_bootstrap("boot", bytes(changed))
    build_layouts(bootstrap, meta_of(testdata, bootstrap))  # the same twice is no contradiction
    changed[16384 + 80] ^= 1
    bootstrap = parse_bootstrap("boot", bytes(changed))
    with pytest.raises(CorruptImage, match="two digests"):
        build_layouts(bootstrap, meta_of(testdata, bootstrap))
