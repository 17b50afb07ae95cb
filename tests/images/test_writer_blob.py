"""The framing of blobs: what we write for the content of Nydus' own blobs is what Nydus wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from erofsd.images.rafs6 import blobwriter
from erofsd.images.rafs6 import format as fmt
from erofsd.images.rafs6.blobmeta import ChunkColumns, parse_blob_meta
from erofsd.images.rafs6.toc import parse_tar_header, read_chunk_digests, read_entry, read_toc, sections
from erofsd.images.source import BytesSource
from tests.images.nodes import awkward
from tests.images.nydusimages import blob_files, opened
from tests.images.packing import Packed


@pytest.mark.parametrize("tag", ["zstd", "lz4-128k", "batch"])
def test_records_and_tail_of_nydus_blobs_are_reproduced(testdata: Path, tag: str) -> None:
    bootstrap, _, _ = opened(testdata, tag)
    for entry in bootstrap.blobs:
        blob = blob_files(testdata, [entry.blob_id])[entry.blob_id]
        source = BytesSource("blob", blob)
        parts = {section.name: section for section in sections(source)}
        toc = read_toc(source)
        array = read_entry(source, toc["blob.meta"])
        packed = blob[entry.ci_offset :][: entry.ci_compressed_size]
        columns = parse_blob_meta("blob", entry, blob[entry.ci_offset :][: entry.meta_range[1]])
        records = encode_records(entry.features, columns, array)
        data = blob[: parts["image.blob"].size]
        tail = blobwriter.blob_tail(
            data_size=len(data),
            data_hash=hashlib.sha256(data),
            size=entry.uncompressed_size,
            chunk_count=entry.chunk_count,
            records=records,
            contexts=array[len(records) :],
            digests=read_chunk_digests(source, toc, entry.chunk_count),
            ci_codec=toc["blob.meta"].codec,
            compress=lambda _, packed=packed: packed,
        )
        assert array.startswith(records)
        written = bytearray(b"".join(tail.pieces[:-1]))  # the TOC: these blobs hold a bootstrap, too
        written[entry.ci_offset + entry.ci_compressed_size + 4 - len(data)] |= fmt.INLINED_FS_META
        assert written == blob[len(data) :][: len(written)]
        assert tail.features == entry.features
        theirs = blob[parts["rafs.blob.toc"].offset :]
        for i in (0, 1, 3):  # 2 is the header's digest
            assert tail.pieces[-1][128 * i :][:128] == theirs[128 * i :][:128]


def encode_records(features: int, columns: ChunkColumns, array: bytes) -> bytes:
    records = []
    for i, unit in enumerate(columns.chunk_unit):
        place = (columns.chunk_offset[i], columns.chunk_size[i], columns.unit_offset[unit])
        if not features & fmt.CHUNK_INFO_V2:
            records.append(blobwriter.record_v1(*place, columns.unit_stored[unit]))
            continue
        flags, data = array[24 * i + 7], int.from_bytes(array[24 * i + 16 :][:8], "little")
        if flags & fmt.RECORD_BATCH:
            records.append(blobwriter.batch_record(*place, data >> 32, columns.chunk_at[i]))
        else:
            packed = bool(columns.unit_packed[unit])
            records.append(
                blobwriter.record_v2(*place, columns.unit_stored[unit], compressed=packed, crc=data)
            )
    return b"".join(records)


@pytest.mark.parametrize("batch_size", [0, 10_000])
def test_toc_names_every_part_with_its_digest(batch_size: int) -> None:
    packed = Packed(awkward(), batch_size=batch_size)
    blob = packed.chunks.blobs[0]
    stored = packed.stored[blob.blob_id]
    source = BytesSource("blob", stored)
    toc = read_toc(source, blob.toc_size, blob.toc_digest)
    assert [entry.name for entry in toc.values()] == [
        "image.blob",
        "blob.meta",
        "blob.meta.header",
        "blob.digest",
    ]
    assert read_entry(source, toc["blob.meta"]) == blob.blob_meta[: blob.ci_size]
    assert read_entry(source, toc["blob.meta.header"]) == blob.blob_meta[-4096:]
    assert read_chunk_digests(source, toc, blob.chunk_count) == packed.chunks.digests
    end = toc["image.blob"].stored_size + 512
    assert hashlib.sha256(stored[:end]).digest() == toc["image.blob"].digest
    assert [s.name for s in sections(source)] == ["image.blob", "blob.meta", "blob.digest", "rafs.blob.toc"]


@pytest.mark.parametrize("size", [0, 1, 8**11 - 1])
def test_tar_headers_are_those_of_gnu_tar(size: int) -> None:
    assert parse_tar_header(blobwriter.tar_header("image.blob", size)) == ("image.blob", size)


def test_tar_header_of_more_than_eight_gigabytes_counts_in_binary() -> None:
    header = blobwriter.tar_header("image.blob", 8**11)
    assert header[124:136] == b"\x80" + (8**11).to_bytes(11, "big")


def test_largest_sizes_fit_into_records() -> None:
    raw = blobwriter.record_v1((1 << 44) - 4096, 1 << 24, (1 << 40) - 1, 1 << 24)
    decoded, packed = fmt.CHUNK_V1.unpack(raw)
    assert (decoded & 0xFFFFFFFF000, packed & 0xFFFFFFFFFF) == ((1 << 44) - 4096, (1 << 40) - 1)
    assert decoded >> 44 == packed >> 44 == 0xFFFFF
