"""RAFS v6 bootstraps that we write: judged by the kernel, fsck.erofs, our reader, and by what Nydus asks."""

from __future__ import annotations

import io
import os
import struct
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erofsd.blobs.layout import BlobLayout
from erofsd.errors import UnsupportedImage
from erofsd.images.base import Entry
from erofsd.images.erofs import format as erofs
from erofsd.images.erofs.encode import refused_xattrs
from erofsd.images.erofs.reader import ErofsReader, Extent
from erofsd.images.erofs.tree import ErofsTree, walk_inodes
from erofsd.images.rafs6 import format as fmt
from erofsd.images.rafs6.bootstrap import Bootstrap, parse_bootstrap
from erofsd.images.rafs6.reader import RafsReader
from erofsd.images.rafs6.writer import write_bootstrap
from erofsd.images.tree import HOLE, Node
from tests.images.judges import fsck, mounted
from tests.images.nodes import Source, awkward, sources
from tests.images.nydusimages import TAGS, decoder, layouts_of, opened
from tests.images.packing import Packed
from tests.images.rebuilding import rebuilt
from tests.images.sourcetree import describe_directory, describe_tree

KINDS: dict[str, dict[str, object]] = {
    "zstd": {},
    "one large chunk": {"chunk_size": 1 << 20, "digester": "sha256"},
    "lz4 in three blobs": {"codec": "lz4_block", "groups": 3, "chunk_size": 4096},
    "batches": {"batch_size": 10_000},
    "raw": {"codec": "none", "groups": 2},
}


def write(source: Source, packed: Packed, **options: object) -> bytes:
    out = io.BytesIO()
    written = write_bootstrap(source.root, packed.chunks, out, chunk_size=packed.chunk_size, **options)
    assert written.size == len(out.getvalue())
    return out.getvalue()


def opened_image(data: bytes, packed: Packed) -> tuple[Bootstrap, tuple[BlobLayout, ...], RafsReader]:
    bootstrap = parse_bootstrap("written", data)
    shipped = {f"{blob.blob_id}.blob.meta": blob.blob_meta for blob in packed.chunks.blobs}
    layouts = layouts_of(bootstrap, shipped, packed.stored)
    return bootstrap, layouts, RafsReader(bootstrap, layouts, decoder(layouts, packed.stored))


def put(directory: Path, data: bytes, packed: Packed) -> tuple[Path, list[str]]:
    (directory / "image.boot").write_bytes(data)
    paths = {Path(path).name: path for path in packed.write_devices(directory)}
    slots = parse_bootstrap("written", data).super.devices
    return directory / "image.boot", [paths[slot.tag.decode()] for slot in slots]


@pytest.mark.parametrize("options", KINDS.values(), ids=list(KINDS))
def test_awkward_tree_is_what_reader_fsck_and_kernel_see(tmp_path: Path, options: dict[str, object]) -> None:
    source = awkward()
    packed = Packed(source, **options)
    data = write(source, packed)
    bootstrap, _, reader = opened_image(data, packed)
    check_what_nydus_requires(bootstrap)
    assert describe_tree(ErofsTree(reader)) == source.describe()
    path, devices = put(tmp_path, data, packed)
    fsck(path, devices)
    with mounted(path, tmp_path / "mnt", devices) as directory:
        assert describe_directory(directory) == source.describe()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=sources(), kind=st.sampled_from(list(KINDS)))
def test_any_tree_survives(tmp_path: Path, source: Source, kind: str) -> None:
    packed = Packed(source, **KINDS[kind])
    data = write(source, packed)
    bootstrap, _, reader = opened_image(data, packed)
    check_what_nydus_requires(bootstrap)
    assert describe_tree(ErofsTree(reader)) == source.describe()
    path, devices = put(tmp_path, data, packed)
    with mounted(path, tmp_path / "mnt", devices) as directory:
        assert describe_directory(directory) == source.describe()


def check_what_nydus_requires(bootstrap: Bootstrap) -> None:
    """What Nydus' readers demand beyond ours: rafs-v6 6.1, and its sections on superblock and tables."""
    reader = RafsReader(bootstrap)
    rows = list(fmt.CHUNK.iter_unpack(bootstrap.chunk_table))
    assert rows == sorted(rows, key=lambda row: (row[0], row[1]))
    stated = {(row[1], row[8], row[6] // 4096) for row in rows}
    assert len(stated) == len(rows)
    used = set()
    for _, inode in walk_inodes(reader):
        assert inode.tail - inode.xattr_size - inode.offset == erofs.INODE_EXTENDED.size
        assert inode.nlink
        if inode.type == "reg":
            assert inode.layout == erofs.CHUNK_BASED
            used |= set(index_entries(bootstrap, reader, inode))
        elif inode.type not in ("dir", "lnk"):
            assert inode.layout == erofs.FLAT_PLAIN
    assert used == stated
    sb = bootstrap.super
    raw = bootstrap.data[1024:1152]
    assert raw[4:8] == bytes(4), "checksum"
    assert (sb.epoch, sb.fixed_nsec, sb.xattr_block, raw[48:80]) == (0, 0, 0, bytes(32))
    assert sb.block_count == sum(slot.block_count for slot in sb.devices)
    end = len(bootstrap.data)
    for slot, blob in zip(sb.devices, bootstrap.blobs, strict=True):
        assert slot.mapped_block * 4096 == -(-end // 0x80000) * 0x80000
        end = (slot.mapped_block + slot.block_count) * 4096
        assert blob.compressed_size
        assert blob.chunk_count
        assert blob.toc_size == 4 * 128 + 512
        assert any(blob.toc_digest)


def index_entries(
    bootstrap: Bootstrap, reader: RafsReader, inode: erofs.Inode
) -> Iterator[tuple[int, int, int]]:
    count = -(-inode.size // bootstrap.chunk_size)
    first = -(-inode.tail // 8) * 8
    for low, middle, block in struct.iter_unpack("<HHI", bootstrap.data[first : first + 8 * count]):
        yield (middle & 0xFF) - 1, low | (middle >> 8) << 16, block


def test_dotdot_is_found_by_binary_search_among_names_that_sort_before_it() -> None:
    source = Source()
    source.add(b"below", Node("dir"))
    for i in range(3000):
        source.add(b"below/!%d" % i, Node("fifo"))
    data = write(source, Packed(source))
    reader = RafsReader(parse_bootstrap("written", data))
    below = reader.inode(next(iter(reader.entries(reader.root))).nid)
    blocks = list(reader._blocks(below))
    assert len(blocks) > 10
    assert b"..." not in blocks[0]
    assert blocks[-1].endswith(b"!998!999...")


@pytest.mark.parametrize("tag", TAGS)
def test_nydus_own_image_written_again_is_the_same_image(testdata: Path, tag: str) -> None:
    bootstrap, layouts, _ = opened(testdata, tag)
    tree = ErofsTree(RafsReader(bootstrap, layouts))
    root, chunks = rebuilt(bootstrap, tree)
    out = io.BytesIO()
    write_bootstrap(root, chunks, out, chunk_size=bootstrap.chunk_size, prefetch=[root])
    again = parse_bootstrap("again", out.getvalue())
    assert places_of(RafsReader(again, layouts)) == places_of(tree.reader)
    assert [replace(blob, offset=0) for blob in again.blobs] == [
        replace(blob, offset=0) for blob in bootstrap.blobs
    ]
    assert again.super.devices == bootstrap.super.devices
    assert again.prefetch == (again.super.root_nid,)
    assert len(again.data) == len(bootstrap.data)
    # all but the offset in some file that uses the chunk
    assert table_of(again) == table_of(bootstrap)


def places_of(reader: ErofsReader) -> list[tuple[Entry, list[Extent]]]:
    """Everything in an image, and where in the blobs its files are."""
    return [
        (replace(entry, nid=0), list(reader.extents(reader.inode(entry.nid))) if entry.type == "reg" else [])
        for entry in ErofsTree(reader).walk()
    ]


def table_of(bootstrap: Bootstrap) -> list[tuple[object, ...]]:
    return [(*row[:7], *row[8:]) for row in fmt.CHUNK.iter_unpack(bootstrap.chunk_table)]


def test_only_blobs_and_chunks_in_use_are_written() -> None:
    source = Source()
    for i in range(6):
        source.add(b"%d" % i, Node("reg"), bytes([i]) * 5000)
    packed = Packed(source, groups=3, chunk_size=4096)
    for i in (1, 4, 2):
        del source.root.children[b"%d" % i]
    bootstrap, layouts, reader = opened_image(write(source, packed), packed)
    assert [blob.blob_id for blob in bootstrap.blobs] == [packed.chunks.blobs[i].blob_id for i in (0, 2)]
    assert [(sum(layout.stated), layout.chunk_count) for layout in layouts] == [(4, 4), (2, 4)]
    assert describe_tree(ErofsTree(reader)) == source.describe()


def test_blob_that_is_listed_twice_gets_one_slot() -> None:
    source = Source()
    one = source.add(b"one", Node("reg"), b"x" * 9000)
    two = source.add(b"two", Node("reg"), b"x" * 9000)
    packed = Packed(source)
    chunks = packed.chunks
    chunks.blobs.append(chunks.blobs[0])
    for column in (chunks.index, chunks.offset, chunks.size, chunks.stored_offset, chunks.stored_size):
        column.append(column[0])
    chunks.blob.append(1)
    chunks.flags.append(chunks.flags[0])
    chunks.crc.append(0)
    chunks.digests += chunks.digest(0)
    two.chunks = array("q", [1])
    bootstrap, _, reader = opened_image(write(source, packed), packed)
    check_what_nydus_requires(bootstrap)
    assert len(bootstrap.blobs) == 1
    assert one.chunks != two.chunks
    assert describe_tree(ErofsTree(reader)) == source.describe()


def test_image_without_data_has_no_devices(tmp_path: Path) -> None:
    source = Source()
    source.add(b"empty", Node("reg"), b"")
    packed = Packed(source)
    data = write(source, packed, codec="lz4_block", digester="sha256", prefetch=[source.root])
    bootstrap, _, reader = opened_image(data, packed)
    assert (bootstrap.blobs, bootstrap.prefetch, bootstrap.super.meta_block) == ((), (), 0)
    assert bootstrap.flags & 0xF == 0x2 | 0x8
    path, _ = put(tmp_path, data, packed)
    fsck(path)
    with mounted(path, tmp_path / "mnt") as directory:
        assert describe_directory(directory) == source.describe() == describe_tree(ErofsTree(reader))


def test_consecutive_chunks_are_one_extent_to_the_kernel() -> None:
    source = Source()
    source.add(b"long", Node("reg"), os.urandom(300_000))
    source.add(b"twice", Node("reg"), os.urandom(16384) * 2)
    packed = Packed(source)
    reader = RafsReader(parse_bootstrap("written", write(source, packed)))
    words = {entry.name: reader.inode(entry.nid).word for entry in reader.entries(reader.root)}
    assert words == {b"long": 0x20 | 19 - 12, b"twice": 0x20 | 14 - 12}


def test_huge_sparse_file_is_one_chunk_of_zeros_many_times(tmp_path: Path) -> None:
    source = Source()
    node = source.add(b"huge", Node("reg"), bytes(4096))
    packed = Packed(source, chunk_size=4096)
    node.size = (4 << 30) + 4096
    node.chunks = array("q", [0]) * (node.size // 4096)
    path, devices = put(tmp_path, write(source, packed), packed)
    with (
        mounted(path, tmp_path / "mnt", devices) as directory,
        (directory / "huge").open("rb") as file,
    ):
        assert os.fstat(file.fileno()).st_size == node.size
        assert os.pread(file.fileno(), 5000, node.size - 4096) == bytes(4096)


def test_chunk_numbers_of_more_than_sixteen_bits(tmp_path: Path) -> None:
    source = Source()
    numbers = [(1 << 24) - 1, 0, 65_536, 65_535]
    data = b"".join(number.to_bytes(4096, "big") for number in numbers)
    source.add(b"many", Node("reg"), data)
    packed = Packed(source, chunk_size=4096)
    packed.chunks.index = array("I", numbers)
    packed.chunks.offset = array("Q", [number * 4096 for number in numbers])
    packed.chunks.blobs[0] = replace(
        packed.chunks.blobs[0], size=4096 << 24, chunk_count=1 << 24, ci_size=16 << 24
    )
    image = write(source, packed)
    (tmp_path / "image.boot").write_bytes(image)
    with (tmp_path / "device").open("wb") as device:
        device.truncate(4096 << 24)
        for number in numbers:
            os.pwrite(device.fileno(), number.to_bytes(4096, "big"), number * 4096)
    assert {row[8] for row in fmt.CHUNK.iter_unpack(chunk_table(image))} == set(numbers)
    with mounted(tmp_path / "image.boot", tmp_path / "mnt", [str(tmp_path / "device")]) as directory:
        assert (directory / "many").read_bytes() == data


def chunk_table(image: bytes) -> bytes:
    """Of an image that is too large for our own reader."""
    fields = fmt.EXT_SUPER.unpack_from(image, fmt.EXT_SUPER_OFFSET)
    return image[fields[4] :][: fields[5]]


def test_same_tree_gives_the_same_bytes_in_whatever_order_it_was_filled() -> None:
    source = awkward()
    packed = Packed(source)
    data = write(source, packed)
    for node in [source.root, *source.root.children.values()]:
        if node.type == "dir":
            node.children = dict(reversed(node.children.items()))
    assert write(source, packed) == data


def test_tree_with_holes_or_other_chunks_than_its_size_is_a_mistake() -> None:
    source = Source()
    node = source.add(b"file", Node("reg"), b"x" * 20000)
    packed = Packed(source)
    for wrong, problem in (
        ([HOLE, 0], "holes"),
        ([0], "chunks for 20000 bytes"),
        ([1, 0], "has 3616 bytes"),
    ):
        node.chunks = array("q", wrong)
        with pytest.raises(ValueError, match=problem):
            write(source, packed)


def test_more_layers_than_an_index_can_name_are_refused() -> None:
    source = Source()
    for i in range(255):
        source.add(b"%d" % i, Node("reg"), b"%d" % i)
    packed = Packed(source, groups=255)
    with pytest.raises(UnsupportedImage, match="255 layers"):
        write(source, packed)
    del source.root.children[b"7"]
    bootstrap, _, reader = opened_image(write(source, packed), packed)
    check_what_nydus_requires(bootstrap)
    assert describe_tree(ErofsTree(reader)) == source.describe()


def test_xattrs_that_erofs_cannot_hold_are_named() -> None:
    held = {b"user.a": b"", b"user." + b"n" * 255: b"v", b"trusted.x": b"v" * 65535}
    refused = {
        b"user.": b"",
        b"user." + b"n" * 256: b"",
        b"system.other": b"",
        b"system.posix_acl_accessory": b"",
        b"btrfs.compression": b"",
        b"user.large": b"v" * 65536,
        b"user.a\0b": b"",
    }
    assert set(refused_xattrs(held | refused)) == set(refused)
    many = {b"user.%d" % i: b"v" * 65000 for i in range(9)}
    assert len(refused_xattrs(many)) == 5
