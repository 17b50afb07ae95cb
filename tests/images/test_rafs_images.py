"""Real RAFS v6 images read as their expected facts say, and what is no RAFS v6 is refused by name."""

from __future__ import annotations

import gzip
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from erofsd.errors import CorruptImage, UnsupportedImage
from erofsd.images.base import Image
from erofsd.images.erofs.tree import ErofsTree
from erofsd.images.open import open_tree
from erofsd.images.rafs6 import format as fmt
from erofsd.images.rafs6 import toc
from erofsd.images.rafs6.blobmeta import parse_blob_meta
from erofsd.images.rafs6.bootstrap import parse_bootstrap
from erofsd.images.rafs6.format import BlobEntry
from erofsd.images.rafs6.reader import RafsReader
from erofsd.images.source import BytesSource
from erofsd.images.summary import content_digest, summarize, tree_facts
from ondemand.ranges import RangeSet
from tests.images.nydusimages import TAGS, big_bootstrap, blob_files, decoder, layer_files, layouts_of, opened


@pytest.fixture(scope="module")
def facts(testdata: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (testdata / "nydusify" / "facts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(testdata: Path) -> dict[str, Any]:
    return json.loads((testdata / "nydus-texture" / "expected" / "expected.json").read_text())


@pytest.mark.parametrize("tag", TAGS)
def test_tree_and_contents_equal_the_facts(testdata: Path, facts: list[dict[str, Any]], tag: str) -> None:
    bootstrap, layouts, read = opened(testdata, tag)
    assert list(tree_facts(ErofsTree(RafsReader(bootstrap, layouts, read)), digests=True)) == facts


def test_summary_counts_what_is_used_of_other_images_blobs(testdata: Path) -> None:
    bootstrap, layouts, read = opened(testdata, "dict")
    image = Image("rafs6", bootstrap.data, None, RangeSet(), layouts, verified="blake3")
    summary = json.loads(json.dumps(asdict(summarize(image, open_tree(image, read)))))
    assert summary["entries"] == {"blk": 1, "chr": 1, "dir": 79, "lnk": 5, "reg": 385}
    assert (summary["chunks"], summary["used_chunks"]) == (395, 385)
    assert summary["metadata_size"] == len(bootstrap.data)
    assert [blob["codec"] for blob in summary["blobs"]] == ["zstd", "zstd"]
    assert summary["used_stored_size"] < sum(blob["stored_size"] for blob in summary["blobs"])


def test_batched_chunks_share_units(testdata: Path) -> None:
    _, layouts, _ = opened(testdata, "batch")
    assert [(layout.chunk_count, layout.unit_count) for layout in layouts] == [(387, 19), (8, 8)]
    for layout in layouts:
        for unit in range(layout.unit_count):
            chunks = layout.chunks_of(unit)
            assert sum(layout.chunk_size[c] for c in chunks) == layout.unit_size[unit]


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("nydusify/refuse/encrypted/boot", "encrypted"),
        ("nydusify/refuse/rafs-v5/boot", "RAFS v5"),
        ("nydusify/refuse/tarfs/boot", "tarfs"),
        ("nydus-texture/repeatable/blake3-lz4_block-non_repeatable", "RAFS v5"),
        ("nydus-texture/repeatable/sha256-nocompress-repeatable", "RAFS v5"),
    ],
)
def test_other_kinds_are_refused_by_name(testdata: Path, path: str, what: str) -> None:
    with pytest.raises(UnsupportedImage, match=what):
        parse_bootstrap(path, (testdata / path).read_bytes())


def test_zran_images_are_refused_by_name(testdata: Path) -> None:
    with pytest.raises(UnsupportedImage, match="zran"):
        parse_bootstrap("zran", layer_files(testdata, "zran")["image.boot"])


def test_nydus_v3_and_plain_erofs_are_refused_by_name(testdata: Path) -> None:
    boot = bytearray((testdata / "nydus-texture" / "bootstrap" / "rafs-v6-2.2.boot").read_bytes())
    with pytest.raises(UnsupportedImage, match="v3"):
        parse_bootstrap("footer", bytes(boot) + b"LPFOOTER".ljust(4096, b"\0"))
    boot[1032:1036] = bytes(4)  # feature_compat: no RAFS mark
    with pytest.raises(UnsupportedImage, match="plain EROFS"):
        parse_bootstrap("plain", bytes(boot))
    boot[1408:1472] = bytes(range(32)) + bytes(32)  # a raw digest as device tag
    with pytest.raises(UnsupportedImage, match="v3"):
        parse_bootstrap("v3", bytes(boot))


def test_bootstrap_of_2_2_has_the_expected_fields(testdata: Path, expected: dict[str, Any]) -> None:
    texture = testdata / "nydus-texture"
    want = expected["bootstrap/rafs-v6-2.2.boot"]
    bootstrap = parse_bootstrap("2.2", (texture / "bootstrap" / "rafs-v6-2.2.boot").read_bytes())
    sb = bootstrap.super
    super_fields = (sb.inode_count, sb.root_nid, sb.meta_block, sb.block_count, sb.feature_compat)
    names = ("inos", "root_nid", "meta_blkaddr", "blocks", "feature_compat")
    assert super_fields == tuple(want["superblock"][name] for name in names)
    assert bootstrap.flags == want["ext_superblock"]["flags"]
    assert_blob_entry(bootstrap.blobs[0], want["blobs"][0])
    for record, row in zip(fmt.CHUNK.iter_unpack(bootstrap.chunk_table), want["chunk_table"], strict=True):
        assert (record[0].hex(), record[8], record[9]) == (row["digest"], row["index"], row["crc32"])

    blob_id = bootstrap.blobs[0].blob_id
    blobs = {blob_id: (texture / "blobs" / blob_id).read_bytes()}
    layouts = layouts_of(bootstrap, {}, blobs)
    assert_tree(RafsReader(bootstrap, layouts, decoder(layouts, blobs)), want["inodes"])
    assert_blob(BytesSource(blob_id, blobs[blob_id]), expected["blobs/be7d77ee..."], bootstrap.blobs[0])


def test_bootstrap_embedded_in_a_blob_takes_the_blobs_name(testdata: Path, expected: dict[str, Any]) -> None:
    blob_id = "2fa78cad554b75ac91a4a125ed148d0ddeb25efa4aaa8bd80e5dc292690a4dca"
    data = (testdata / "nydus-texture" / "toc" / blob_id).read_bytes()
    want = expected["toc/2fa78cad... : embedded image.boot"]
    source = BytesSource(blob_id, data)
    embedded = toc.extract_bootstrap(source)
    assert parse_bootstrap("as it is", embedded).blobs[0].blob_id == want["blobs"][0]["blob_id"]
    bootstrap = parse_bootstrap("renamed", embedded, blob_id)
    assert bootstrap.blobs[0].blob_id == blob_id
    assert parse_bootstrap("again", bootstrap.data).blobs == bootstrap.blobs
    layouts = layouts_of(bootstrap, {}, {blob_id: data})
    assert_tree(RafsReader(bootstrap, layouts, decoder(layouts, {blob_id: data})), want["inodes"])
    assert_blob(source, expected["toc/2fa78cad..."], bootstrap.blobs[0])


def assert_blob_entry(blob: BlobEntry, want: dict[str, Any]) -> None:
    for name in ("blob_id", "chunk_count", "compressor", "digester", "features", "compressed_size"):
        assert getattr(blob, name) == want[name], name
    for name in ("uncompressed_size", "ci_offset", "ci_compressed_size", "ci_uncompressed_size"):
        assert getattr(blob, name) == want[name], name
    assert blob.toc_digest.hex() == want["blob_toc_digest"]


def assert_tree(reader: RafsReader, inodes: list[dict[str, Any]]) -> None:
    tree = ErofsTree(reader)
    entries = {entry.path.decode(): entry for entry in tree.walk()}
    assert set(entries) == {inode["path"] for inode in inodes}
    for inode in inodes:
        entry = entries[inode["path"]]
        assert (entry.nid, entry.size, entry.nlink) == (inode["nid"], inode["size"], inode["nlink"])
        assert entry.mtime == inode["mtime"] * 10**9 + inode["mtime_nsec"]
        if entry.type == "reg":
            assert content_digest(tree, entry) == inode["sha256"]


def assert_blob(source: BytesSource, want: dict[str, Any], blob: BlobEntry) -> None:
    assert [s._asdict() for s in toc.sections(source)] == want["sections_by_tar_headers"]
    found = toc.read_toc(source, digest=bytes.fromhex(want["toc_digest_including_tar_header"]))
    for entry in want["toc"]:
        got = found[entry["name"]]
        assert (got.offset, got.stored_size, got.size) == (entry["off"], entry["csize"], entry["usize"])
        assert got.digest.hex() == entry["digest"]
    meta = parse_blob_meta("meta", blob, source.pread(*blob.meta_range))
    records = want["chunk_info_v1"]
    assert list(meta.chunk_offset) == [r["uncompressed_offset"] for r in records]
    assert list(meta.chunk_size) == [r["uncompressed_size"] for r in records]
    assert list(meta.unit_offset) == [r["compressed_offset"] for r in records]
    assert list(meta.unit_stored) == [r["compressed_size"] for r in records]
    if digests := want.get("blob_digest_array"):
        assert toc.read_chunk_digests(source, found, len(digests)).hex() == "".join(digests)


def test_toc_with_another_digest_is_refused(testdata: Path) -> None:
    path = testdata / "nydus-texture" / "blobs"
    blob_id = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"
    source = BytesSource(blob_id, (path / blob_id).read_bytes())
    assert set(toc.read_toc(source, 1024)) == {"image.blob", "blob.meta", "blob.meta.header", "blob.digest"}
    with pytest.raises(CorruptImage, match="TOC"):
        toc.read_toc(source, 1024, bytes(range(32)))
    with pytest.raises(UnsupportedImage, match="without a bootstrap"):
        toc.extract_bootstrap(source)


def test_nydusify_blobs_hold_their_own_bootstrap_and_digests(testdata: Path) -> None:
    bootstrap, layouts, _ = opened(testdata, "zstd")
    blobs = blob_files(testdata, [layout.blob_id for layout in layouts])
    for entry, layout in zip(bootstrap.blobs, layouts, strict=True):
        source = BytesSource(entry.blob_id, blobs[entry.blob_id])
        digests = toc.read_chunk_digests(source, toc.read_toc(source), entry.chunk_count)
        for chunk in range(entry.chunk_count):
            if layout.stated[chunk]:
                assert digests[32 * chunk : 32 * chunk + 32] == layout.digest(chunk)
        own = parse_bootstrap("own", toc.extract_bootstrap(source), entry.blob_id)
        assert [blob.blob_id for blob in own.blobs] == [entry.blob_id]


def test_zran_blob_meta_is_refused_by_its_records(testdata: Path, expected: dict[str, Any]) -> None:
    path = next((testdata / "nydus-texture" / "zran").glob("*.blob.meta"))
    header = expected["zran/233c72f2...blob.meta"]["header"]
    bootstrap = parse_bootstrap("", layer_files(testdata, "zstd")["image.boot"])
    blob = replace(
        bootstrap.blobs[0],
        features=fmt.ALIGNED | fmt.CHUNK_INFO_V2,
        chunk_count=header["entries"],
        ci_compressor=header["comp"],
        ci_offset=header["off"],
        ci_compressed_size=header["csize"],
        ci_uncompressed_size=header["usize"],
    )
    with pytest.raises(UnsupportedImage, match="flags 0x3"):
        parse_blob_meta("zran", blob, path.read_bytes())


def test_image_of_3517_inodes_lists_as_the_kernel_does(testdata: Path, expected: dict[str, Any]) -> None:
    bootstrap = parse_bootstrap("big", big_bootstrap(testdata))
    key = "snapshotter/v6-bootstrap-chunk-pos-438272.tar.gz : image/image.boot"
    assert bootstrap.prefetch == tuple(expected[key]["prefetch_nids"])
    assert_blob_entry(bootstrap.blobs[0], expected[key]["blobs"][0])
    reader = RafsReader(bootstrap)
    lines = []
    for entry in sorted(ErofsTree(reader).walk(), key=lambda entry: entry.path):
        inode = reader.inode(entry.nid)
        extents = reader.extents(inode) if entry.type == "reg" else ()
        places = ",".join(f"{e.device}:{e.offset}+{e.length}" for e in extents)
        numbers = [inode.mode, entry.uid, entry.gid, entry.size, entry.mtime // 10**9, entry.nlink, entry.nid]
        lines.append([entry.path.decode(), *numbers, (entry.target or b"").decode(), places])
    listing = testdata / "nydus-texture" / "expected" / "v6-bootstrap-chunk-pos-438272.listing.tsv.gz"
    want = []
    for line in gzip.decompress(listing.read_bytes()).decode().splitlines():
        path, mode, uid, gid, size, mtime, nlink, _ino, nid, target, chunks = line.split("\t")
        numbers = [int(mode, 8), int(uid), int(gid), int(size), int(mtime), int(nlink), int(nid)]
        want.append([path, *numbers, target, joined_places(chunks, int(size))])
    assert lines == sorted(want, key=lambda row: str(row[0]).encode())


def joined_places(chunks: str, size: int) -> str:
    """``device:chunk:block,…`` with chunks of 1 MiB as ``device:offset+length,…`` with neighbours joined."""
    places: list[list[int]] = []
    for chunk in filter(None, chunks.split(",")):
        device, _, block = map(int, chunk.split(":"))
        length = min(size, 1 << 20)
        size -= length
        if places and places[-1][0] == device and sum(places[-1][1:]) == block * 4096:
            places[-1][2] += length
        else:
            places.append([device, block * 4096, length])
    return ",".join(f"{device}:{offset}+{length}" for device, offset, length in places)


def test_hundred_thousand_chunks_open_quickly(testdata: Path) -> None:
    bootstrap = parse_bootstrap("", layer_files(testdata, "zstd")["image.boot"])
    count = 100_000
    blob = replace(
        bootstrap.blobs[0],
        chunk_count=count,
        uncompressed_size=count * 8192,
        ci_compressor=0,
        ci_offset=count * 5000,
        ci_compressed_size=count * 16,
        ci_uncompressed_size=count * 16,
        features=fmt.ALIGNED | fmt.CAP_TAR_TOC,
    )
    word = (8191 & 0xFFFFF) << 44, 4999 << 44
    records = b"".join(fmt.CHUNK_V1.pack(word[0] | i * 8192, word[1] | i * 5000) for i in range(count))
    header = fmt.META_HEADER.pack(
        fmt.META_MAGIC, 0, 0, count, count * 5000, count * 16, count * 16, 0, 0, 0, fmt.META_MAGIC
    )
    table = b"".join(
        fmt.CHUNK.pack(i.to_bytes(32, "big"), 0, 1, 5000, 8192, i * 5000, i * 8192, 0, i, 0)
        for i in range(count)
    )
    image = replace(bootstrap, blobs=(blob,), chunk_table=memoryview(table))
    started = time.process_time()
    (layout,) = layouts_of(image, {f"{blob.blob_id}.blob.meta": records + header}, {})
    assert time.process_time() - started < 5  # about 0.4 s on an idle machine
    assert layout.chunk_count == count
    assert layout.digest(77_777) == (77_777).to_bytes(32, "big")
