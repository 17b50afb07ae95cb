"""Images written by hand: features that no tool here makes, and what a hostile one may say."""

from __future__ import annotations

import random
import stat
import struct
import zlib

import lz4.block
import pytest
import zstandard

from erofsd.errors import CorruptImage, UnsupportedImage
from erofsd.images.erofs import format as fmt
from erofsd.images.erofs import zmap
from erofsd.images.erofs.metadata import metadata_ranges
from erofsd.images.erofs.reader import ErofsReader
from erofsd.images.erofs.tree import ErofsTree
from erofsd.images.source import BytesSource
from ondemand.ranges import Range
from tests.images.handmade import BLOCK, META_BLOCK, Image, one_file, superblock

DIR, REG, LNK, CHR = (kind | 0o755 for kind in (stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK, stat.S_IFCHR))
TEXT = b"".join(b"%d squared is %d\n" % (i, i * i) for i in range(9000))
NOISE = random.Random(3).randbytes(200_000)


def tree_of(image: bytes) -> ErofsTree:
    return ErofsTree(ErofsReader(BytesSource("image", image)))


def file_of(image: bytes) -> bytes:
    tree = tree_of(image)
    (entry,) = (entry for entry in tree.walk() if entry.path == b"/f")
    return b"".join(tree.content(entry))


def read_all(image: bytes) -> None:
    tree = tree_of(image)
    for entry in tree.walk():
        if entry.type == "reg":
            for _ in tree.content(entry):
                pass


def refused(image: bytes, match: str, error: type[Exception] = CorruptImage) -> None:
    """Some part of reading all of *image* must fail with *error*; metadata_ranges in no other way."""
    with pytest.raises(error, match=match):
        read_all(image)
    try:
        metadata_ranges(ErofsReader(BytesSource("image", image)))
    except (CorruptImage, UnsupportedImage):
        pass


# --- superblock


@pytest.mark.parametrize(
    ("fields", "match", "error"),
    [
        ({"block_bits": 8}, "blkszbits", CorruptImage),
        ({"block_bits": 17}, "blkszbits", CorruptImage),
        ({"dirblkbits": 1}, "dirblkbits", CorruptImage),
        ({"compat": fmt.COMPAT_SB_CHKSUM, "checksum": 7}, "checksum", CorruptImage),
        ({"incompat": fmt.INCOMPAT_METABOX}, "metabox", UnsupportedImage),
        ({"incompat": 0x10000}, "bit 16", UnsupportedImage),
        ({"incompat": fmt.INCOMPAT_COMPR_CFGS, "algorithms": 0x30}, "algorithms", UnsupportedImage),
        ({"incompat": fmt.INCOMPAT_DEVICE_TABLE, "devices": 65535}, "range", CorruptImage),
        ({"root_nid": 60000}, "nid 60000", CorruptImage),
        ({"meta_block": 0xFFFFFFFF}, "inode", CorruptImage),
    ],
)
def test_bad_superblocks_are_refused(fields: dict[str, int], match: str, error: type[Exception]) -> None:
    refused(superblock(**fields) + bytes(BLOCK), match, error)


def test_something_else_is_refused() -> None:
    refused(bytes(8192), "magic")


# --- directories


def test_directory_cycle_is_corrupt() -> None:
    image = Image()
    root = image.root()
    child = image.inode(DIR, 0, 0, nlink=2)
    image.directory(root, {b"a": (child, DIR)})
    image.directory(child, {b"b": (root, DIR)})
    refused(image.finish(), "two names")


def test_directory_with_two_names_is_corrupt() -> None:
    image = Image()
    root = image.root()
    child = image.inode(DIR, 0, 0, nlink=2)
    image.directory(child, {})
    image.directory(root, {b"a": (child, DIR), b"b": (child, DIR)})
    refused(image.finish(), "two names")


@pytest.mark.parametrize(
    "names",
    [
        [b"b", b"a"],
        [b"a", b"a"],
        [b"a/b"],
        [b"a", b""],
        [b"x" * 256],
        [b"a\0b", b"c"],
    ],
)
def test_bad_names_are_corrupt(names: list[bytes]) -> None:
    image = Image()
    root = image.root()
    nid = image.inode(REG, fmt.FLAT_PLAIN, 0)
    image.raw_directory(root, [(name, nid, REG) for name in names])
    refused(image.finish(), "dirent")


@pytest.mark.parametrize("nameoff", [0, 1, 11, 13, 4096, 65535])
def test_bad_name_offsets_are_corrupt(nameoff: int) -> None:
    image = Image()
    root = image.root()
    nid = image.inode(REG, fmt.FLAT_PLAIN, 0)
    image.directory(root, {b"f": (nid, REG)})
    data = bytearray(image.finish())
    struct.pack_into("<H", data, len(data) - BLOCK + 8, nameoff)
    refused(bytes(data), "dirent")


def test_directories_that_share_their_data_end() -> None:
    # each lists all of them: 64 levels deep that would be more names than any machine can count
    image = Image()
    root = image.root()
    nids = [image.inode(DIR, 0, 0, nlink=2) for _ in range(64)]
    for nid in [root, *nids]:
        image.directory(nid, {b"%02d" % i: (other, DIR) for i, other in enumerate(nids)})
    refused(image.finish(), "two names")


def test_endless_depth_is_corrupt() -> None:
    image = Image()
    image.root()
    for _ in range(400):
        image.inode(DIR, 0, 0, nlink=2)
    slots = BLOCK // 32
    for depth in range(400):
        image.directory(depth * slots, {b"d" * 255: ((depth + 1) * slots, DIR)})
    refused(image.finish(), "deeper")


def test_directory_of_impossible_size_is_corrupt() -> None:
    image = Image()
    image.inode(DIR, fmt.FLAT_PLAIN, 1 << 60, 1, nlink=2)
    refused(image.finish(), "block address")


# --- inodes


@pytest.mark.parametrize(
    ("inode", "match"),
    [
        ({"mode": 0o170000}, "i_mode"),
        ({"size": 1 << 63}, "i_size"),
        ({"layout": 5}, "i_format"),
        ({"layout": 16}, "i_format"),
        ({"size": 1 << 40, "word": 1}, "block address"),
        ({"size": 10, "word": 0xFFFFFFF0}, "block address"),
        ({"layout": fmt.FLAT_INLINE, "size": 4090}, "inline data"),
        ({"layout": fmt.CHUNK_BASED, "size": 10, "word": 0x80}, "i_u.c.format"),
        ({"layout": fmt.CHUNK_BASED, "size": 1 << 62, "word": 0x20}, "chunk index"),
        ({"layout": fmt.CHUNK_BASED, "size": 1 << 62, "word": 0}, "chunk index"),
        ({"layout": fmt.COMPRESSED_FULL, "size": 1 << 60}, "cluster index"),
        ({"layout": fmt.COMPRESSED_COMPACT, "size": 1 << 60}, "cluster index"),
        ({"mode": LNK, "size": 0}, "i_size"),
        ({"mode": LNK, "size": 5000, "word": 1}, "i_size"),
    ],
)
def test_bad_inodes_are_corrupt(inode: dict[str, object], match: str) -> None:
    image = Image()
    root = image.root()
    nid = image.inode(**({"mode": REG, "layout": 0, "size": 0} | inode))  # type: ignore[arg-type]
    image.directory(root, {b"f": (nid, REG)})
    refused(image.finish(), match)


def test_hole_of_a_plain_inode_reads_as_zeros() -> None:
    # 48-bit images: an all-ones address
    image = Image()
    root = image.root()
    nid = image.inode(REG, fmt.FLAT_PLAIN, 3 << 20, 0xFFFFFFFF)
    struct.pack_into("<H", image.data, META_BLOCK * BLOCK + nid * 32 + 6, 0xFFFF)
    image.directory(root, {b"f": (nid, REG)})
    assert file_of(image.finish()) == bytes(3 << 20)


def test_chunks_holes_and_unified_addresses() -> None:
    image = Image(super={"incompat": fmt.INCOMPAT_CHUNKED_FILE | fmt.INCOMPAT_DEVICE_TABLE, "devices": 2})
    root = image.root()
    here = image.block(b"here".ljust(BLOCK, b"h"))
    entries = [(0, 0, here), (0, 1, 1), (0, 0, 0xFFFFFFFF), (0, 0, 5000 + 2), (0, 2, 3)]
    tail = b"".join(struct.pack("<HHI", *entry) for entry in entries)
    nid = image.inode(REG, fmt.CHUNK_BASED, 4 * BLOCK + 100, fmt.CHUNK_INDEXES, tail=tail)
    image.directory(root, {b"f": (nid, REG)})
    data = bytearray(image.finish())
    data[1408:1536] = struct.pack("<64sII", b"first", 10, 5000).ljust(128, b"\0")
    data[1536:1664] = struct.pack("<64sII", b"second", 0, 0).ljust(128, b"\0")

    def read(device: int, want: Range) -> bytes:
        return b"".join(b"%d" % device for _ in range(len(want)))

    reader = ErofsReader(BytesSource("image", bytes(data)), read)
    assert [slot.tag.rstrip(b"\0") for slot in reader.super.devices] == [b"first", b"second"]
    tree = ErofsTree(reader)
    entry = list(tree.walk())[1]
    blocks = [b"here".ljust(BLOCK, b"h"), b"1" * BLOCK, bytes(BLOCK), b"1" * BLOCK, b"2" * 100]
    assert b"".join(tree.content(entry)) == b"".join(blocks)
    assert [(e.device, e.offset) for e in reader.extents(reader.inode(nid))] == [
        (0, here * BLOCK),
        (1, BLOCK),
        (0, None),
        (1, 2 * BLOCK),
        (2, 3 * BLOCK),
    ]
    struct.pack_into("<HHI", data, META_BLOCK * BLOCK + nid * 32 + 64 + 8, 0, 1, 10)
    with pytest.raises(CorruptImage, match="block address"):
        list(ErofsReader(BytesSource("image", bytes(data)), read).extents(reader.inode(nid)))
    struct.pack_into("<HHI", data, META_BLOCK * BLOCK + nid * 32 + 64 + 8, 0, 3, 0)
    with pytest.raises(CorruptImage, match="device id"):
        list(ErofsReader(BytesSource("image", bytes(data)), read).extents(reader.inode(nid)))


# --- extended attributes


def test_xattrs_with_unknown_prefix_are_not_shown() -> None:
    entries = b"\3\1\2\0abcxy".ljust(12, b"\0") + b"\1\5\1\0zv".ljust(8, b"\0")
    tree = tree_of(one_file(layout=0, size=0, xattr=bytes(12) + entries))
    assert list(tree.walk())[1].xattrs == {b"user.abc": b"xy"}


def test_long_name_prefixes() -> None:
    image = Image(super={"incompat": fmt.INCOMPAT_XATTR_PREFIXES, "prefixes": 2})
    root = image.root()
    table = b"\x09\0\4overlay.".ljust(12, b"\0") + b"\1\0\1"
    image.super["prefix_at"] = image.block(table) * BLOCK // 4
    entries = b"\6\x80\1\0opaquey".ljust(12, b"\0") + b"\1\x81\1\0ab".ljust(8, b"\0")
    nid = image.inode(REG, 0, 0, xattr=bytes(12) + entries)
    image.directory(root, {b"f": (nid, REG)})
    data = image.finish()
    assert list(tree_of(data).walk())[1].xattrs == {b"trusted.overlay.opaque": b"y", b"user.a": b"b"}
    ranges = metadata_ranges(ErofsReader(BytesSource("image", data)))
    assert ranges.covers(Range.of(image.super["prefix_at"] * 4, len(table)))


@pytest.mark.parametrize(
    "xattr",
    [
        b"\0\0\0\0\x09".ljust(16, b"\0"),
        bytes(12) + b"\3\1\xff\xffabcd",
        bytes(12) + b"\xff\1\0\0abcd",
        bytes(12) + b"\1\x80\0\0abcd",
        b"\0\0\0\0\1".ljust(12, b"\0") + b"\xff\xff\xff\xff",
    ],
)
def test_bad_xattrs_are_corrupt(xattr: bytes) -> None:
    refused(one_file(layout=0, size=0, xattr=xattr), "xattr|shared|e_name_index|range")


# --- compression

HEADER = zmap.MAP_HEADER
CONFIGURED = {"incompat": fmt.INCOMPAT_ZERO_PADDING | fmt.INCOMPAT_COMPR_CFGS, "algorithms": 0xF}


def padded(data: bytes, blocks: int) -> bytes:
    return data.rjust(blocks * BLOCK, b"\0")


def packed_lz4(data: bytes) -> bytes:
    return lz4.block.compress(data, store_size=False)


def test_full_index_with_two_algorithms_and_big_pclusters() -> None:
    deflate = zlib.compressobj(9, wbits=-15)
    second = deflate.compress(TEXT[70000:100000]) + deflate.flush()
    image = Image(super=dict(CONFIGURED))
    root = image.root()
    first_at = image.block(padded(packed_lz4(TEXT[:70000]), 8))
    second_at = image.block(padded(second, 3))
    plain_at = image.block(NOISE[:4000])
    size = 104000
    index = []
    heads = {0: (zmap.HEAD1, 0, first_at, 8), 17: (zmap.HEAD2, 70000 % BLOCK, second_at, 3)}
    heads[24] = (zmap.PLAIN, 100000 % BLOCK, plain_at, 1)
    for lcn in range(-(-size // BLOCK)):
        if lcn in heads:
            kind, at, block, _ = heads[lcn]
            index.append(struct.pack("<HHI", kind, at, block))
        else:
            blocks = heads.get(lcn - 1, (0, 0, 0, 0))[3]
            index.append(struct.pack("<HHHH", zmap.NONHEAD, 0, blocks | zmap.CBLKCNT if blocks else 2, 1))
    advise = zmap.ADVISE_BIG_PCLUSTER_1 | zmap.ADVISE_BIG_PCLUSTER_2
    tail = HEADER.pack(0, advise, zmap.LZ4 | zmap.DEFLATE << 4, 0) + bytes(8) + b"".join(index)
    nid = image.inode(REG, fmt.COMPRESSED_FULL, size, tail=tail)
    image.directory(root, {b"f": (nid, REG)})
    assert file_of(image.finish()) == TEXT[:100000] + NOISE[:4000]


@pytest.mark.parametrize("record_size", [4, 8, 16, 32])
def test_written_down_extents(record_size: int) -> None:
    zstd = zstandard.ZstdCompressor(level=3).compress
    cut = BLOCK if record_size <= 8 else 5000
    pieces = [TEXT[i * cut : (i + 1) * cut] for i in range(3)]
    encoded = [(packed_lz4(pieces[0]), zmap.LZ4), (zstd(pieces[1]), zmap.ZSTD), (pieces[2], None)]
    image = Image(super=dict(CONFIGURED))
    root = image.root()
    start = image.block(b"".join(data for data, _ in encoded)) * BLOCK
    records, at = [], start
    for i, (data, method) in enumerate(encoded):
        plen = len(data) | (0 if method is None else (method + 1) << zmap.EXTENT_PLEN_FMT_SHIFT)
        fields = struct.pack("<5I12x", plen, at, 0, i * cut, 0)
        records.append(fields[:record_size])
        at += len(data)
    size = 3 * cut
    advise = zmap.ADVISE_EXTENTS | {4: 0, 8: 1, 16: 2, 32: 3}[record_size] << 1
    header = HEADER.pack(3, advise, 0, 0)
    padding = bytes((-(64 + 8)) % record_size)
    first = struct.pack("<Q", start) if record_size == 4 else b""
    nid = image.inode(REG, fmt.COMPRESSED_FULL, size, tail=header + padding + first + b"".join(records))
    image.directory(root, {b"f": (nid, REG)})
    assert file_of(image.finish()) == TEXT[:size]


def test_partial_references_take_what_they_need() -> None:
    image = Image(super=dict(CONFIGURED))
    root = image.root()
    at = image.block(padded(packed_lz4(TEXT[:20000]), 2))
    index = struct.pack("<HHI", zmap.HEAD1 | zmap.PARTIAL_REF, 0, at)
    index += struct.pack("<HHHH", zmap.NONHEAD, 0, 2 | zmap.CBLKCNT, 1)
    tail = HEADER.pack(0, zmap.ADVISE_BIG_PCLUSTER_1, 0, 0) + bytes(8) + index
    nid = image.inode(REG, fmt.COMPRESSED_FULL, 5000, tail=tail)
    image.directory(root, {b"f": (nid, REG)})
    assert file_of(image.finish()) == TEXT[:5000]


@pytest.mark.parametrize(
    ("index", "header", "match"),
    [
        (struct.pack("<HHI", zmap.NONHEAD, 0, 1), (0, 0, 0, 0), "begin an extent"),
        (struct.pack("<HHI", zmap.HEAD1, 7, 1), (0, 0, 0, 0), "begin an extent"),
        (struct.pack("<HHI", zmap.HEAD1, 5000, 1), (0, 0, 0, 0), "behind its end"),
        (struct.pack("<HHI", zmap.HEAD1, 0, 0xFFFFFF), (0, 0, 0, 0), "block address"),
        (struct.pack("<HHI", zmap.HEAD1, 0, 0), (0, 0, 0, 0), "compressed data"),
        (struct.pack("<HHI", zmap.HEAD1, 0, 1), (9, zmap.ADVISE_FRAGMENT, 0, 0), "packed inode"),
        (struct.pack("<HHI", zmap.HEAD1, 0, 1), (0, 0, 0, 0x80), "packed inode"),
        (
            struct.pack("<HHI", zmap.HEAD1, 0, 1),
            (4090 << 16, zmap.ADVISE_INLINE_PCLUSTER, 0, 0),
            "inline data",
        ),
        (b"", (0, zmap.ADVISE_EXTENTS | 6, 0, 0), "no extent"),
        (b"", (0xFFFFFFFF, zmap.ADVISE_EXTENTS | 6, 0, 0), "cluster index"),
    ],
)
def test_bad_cluster_indexes_are_corrupt(index: bytes, header: tuple[int, ...], match: str) -> None:
    tail = HEADER.pack(*header) + bytes(8) + index
    refused(one_file(super=dict(CONFIGURED), layout=fmt.COMPRESSED_FULL, size=3000, tail=tail), match)


def test_unknown_algorithms_are_refused() -> None:
    index = struct.pack("<HHI", zmap.HEAD1, 0, 1)
    for algorithm in range(4, 16):
        tail = HEADER.pack(0, 0, algorithm, 0) + bytes(8) + index
        image = one_file(super=dict(CONFIGURED), layout=fmt.COMPRESSED_FULL, size=3000, tail=tail)
        refused(image, f"algorithm {algorithm}", UnsupportedImage)
    unannounced = CONFIGURED | {"algorithms": 1 << zmap.LZ4}
    tail = HEADER.pack(0, 0, zmap.ZSTD, 0) + bytes(8) + index
    refused(one_file(super=unannounced, layout=fmt.COMPRESSED_FULL, size=3000, tail=tail), "not announced")


def test_fragments_come_from_the_packed_inode() -> None:
    incompat = CONFIGURED["incompat"] | fmt.INCOMPAT_FRAGMENTS
    image = Image(super=CONFIGURED | {"incompat": incompat})
    root = image.root()
    block = image.block(NOISE[:9000])
    image.super["packed_nid"] = image.inode(REG, fmt.FLAT_PLAIN, 9000, block)
    whole = struct.pack("<Q", 1 << 63 | 1234)
    nid = image.inode(REG, fmt.COMPRESSED_COMPACT, 5000, tail=whole)
    image.directory(root, {b"f": (nid, REG)})
    assert file_of(image.finish()) == NOISE[1234:6234]
    struct.pack_into("<Q", image.data, META_BLOCK * BLOCK + nid * 32 + 64, 1 << 63 | 4001)
    refused(image.finish(), "packed inode")


def test_packed_inode_cannot_hold_its_own_fragments() -> None:
    incompat = CONFIGURED["incompat"] | fmt.INCOMPAT_FRAGMENTS
    image = Image(super=CONFIGURED | {"incompat": incompat})
    root = image.root()
    nid = image.inode(REG, fmt.COMPRESSED_COMPACT, 5000, tail=struct.pack("<Q", 1 << 63))
    image.super["packed_nid"] = nid
    image.directory(root, {b"f": (nid, REG)})
    refused(image.finish(), "packed inode")
