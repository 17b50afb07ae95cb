from __future__ import annotations

import hashlib
import io
import random
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erofsd.build.assemble import assemble
from erofsd.build.chunks import Dictionary, ImageChunks
from erofsd.build.options import BuildOptions
from erofsd.build.pack import Packer
from erofsd.build.record import LayerRecord
from erofsd.build.source import SourceEntry, make_node
from erofsd.errors import SourceError, UsageError
from erofsd.images.rafs6 import format as rafs
from erofsd.images.rafs6.bootstrap import parse_bootstrap
from erofsd.images.rafs6.writer import write_bootstrap
from erofsd.images.tree import HOLE, Node, PackedBlob
from tests.build.packed import SMALL, Image

NOISE = random.Random(3).randbytes(1 << 20)
TEXT = b"".join(b"line %d of some text\n" % (i % 1000) for i in range(50_000))


class Bytes:
    """Content in memory. See `erofsd.build.source.Content`."""

    def __init__(self, data: bytes, extents: list[tuple[int, int]] | None = None) -> None:
        self.size = len(data)
        self.extents = extents
        self.closed = False
        self._data = data

    def readinto(self, offset: int, view: memoryview) -> None:
        if self.extents is not None:
            assert any(start <= offset and offset + len(view) <= start + size for start, size in self.extents)
        view[:] = self._data[offset : offset + len(view)]

    def close(self) -> None:
        self.closed = True


def files(*contents: bytes) -> list[SourceEntry]:
    """A source of files called 0, 1, 2, …"""
    return [
        SourceEntry(b"%06d" % i, make_node("reg", 0o644, 0, 0, 0, size=len(data)), content=Bytes(data))
        for i, data in enumerate(contents)
    ]


def packed(options: BuildOptions, *contents: bytes) -> tuple[PackedBlob | None, list[Node], Image]:
    image = Image(options)
    layer = image.add(files(*contents))
    return layer.blob, [entry.node for entry in layer.entries], image


MIXTURE = [
    *(TEXT[i * 997 : i * 997 + i * 37] for i in range(150)),
    *(NOISE[i * 500 : i * 500 + i * 41] for i in range(100)),
    bytes(50_000), NOISE, TEXT, b"", b"x", NOISE[:300_000] + bytes(100_000) + TEXT, TEXT[:100],
]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        BuildOptions(),
        BuildOptions(chunk_size=65536, batch_size=262144),
        BuildOptions(chunk_size=8192, compression="gzip"),
        BuildOptions(chunk_size=65536, compression="lz4_block", digest="sha256"),
        BuildOptions(chunk_size=65536, compression="none"),
    ],
    ids=str,
)
def test_the_blob_is_the_same_whatever_the_number_of_threads(options: BuildOptions) -> None:
    blobs = {packed(replace(options, jobs=jobs), *MIXTURE)[0] for jobs in (1, 2, 7)}
    assert len(blobs) == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("tnz"), st.integers(0, 200_000), st.integers(0, 30_000)), max_size=30),
    st.sampled_from([4096, 16384, 1 << 20]),
    st.sampled_from([0, 4096, 65536]),
    st.sampled_from(["zstd", "lz4_block", "gzip", "none"]),
    st.sampled_from(["blake3", "sha256"]),
)
def test_what_is_packed_can_be_read(
    pieces: list[tuple[str, int, int]], chunk_size: int, batch_size: int, compression: str, digest: str
) -> None:
    source = {"t": TEXT, "n": NOISE, "z": bytes(len(TEXT))}
    contents = [source[kind][at : at + size] for kind, at, size in pieces]
    options = BuildOptions(
        chunk_size=chunk_size, batch_size=batch_size, compression=compression, digest=digest, jobs=2
    )
    _, nodes, image = packed(options, *contents)
    found = image.read(image.merge())  # verifies every chunk's digest
    for i, (node, data) in enumerate(zip(nodes, contents, strict=True)):
        assert found[b"/%06d" % i]["sha256"] == hashlib.sha256(data).hexdigest()
        assert len(node.chunks) == -(-len(data) // chunk_size)
        sizes = [image.image.chunks.size[chunk] for chunk in node.chunks]
        assert sizes == [len(data[at : at + chunk_size]) for at in range(0, len(data), chunk_size)]


def test_equal_chunks_are_stored_once() -> None:
    blob, nodes, _ = packed(SMALL, NOISE[:10_000], b"x" + NOISE[:5000], NOISE[:10_000], NOISE[4096:8192])
    assert blob
    assert blob.chunk_count == 5
    assert nodes[0].chunks == nodes[2].chunks
    assert nodes[3].chunks[0] == nodes[0].chunks[1]


def test_what_does_not_shrink_is_stored_as_it_is() -> None:
    blob, [node], image = packed(replace(SMALL, chunk_size=1 << 20), NOISE)
    assert blob
    assert image.blobs[blob.blob_id].startswith(NOISE)
    chunks = image.image.chunks
    assert (chunks.flags[node.chunks[0]], chunks.stored_size[node.chunks[0]]) == (0, len(NOISE))


def test_all_zeros_share_one_chunk_or_are_holes() -> None:
    contents = (bytes(20_000), NOISE[:4096] + bytes(8192) + NOISE[:4096], bytes(4096))
    blob, nodes, _ = packed(SMALL, *contents)
    assert blob
    assert blob.chunk_count == 3  # zeros whole, zeros at an end, noise
    assert len({nodes[0].chunks[0], nodes[1].chunks[1], nodes[1].chunks[2], nodes[2].chunks[0]}) == 1
    blob, nodes, _ = packed(replace(SMALL, holes=True), *contents)
    assert blob
    assert blob.chunk_count == 1
    assert [list(node.chunks) for node in nodes] == [[HOLE] * 5, [0, HOLE, HOLE, 0], [HOLE]]


def sparse_contents() -> st.SearchStrategy[tuple[bytes, list[tuple[int, int]]]]:
    def make(steps: list[tuple[int, int]], tail: int) -> tuple[bytes, list[tuple[int, int]]]:
        data, extents = b"", []
        for hole, size in steps:
            data += bytes(hole)
            extents.append((len(data), size))
            data += NOISE[hole : hole + size]
        return data + bytes(tail), extents

    return st.builds(
        make,
        st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 9000)), max_size=8),
        st.integers(0, 20_000),
    )


@settings(max_examples=60, deadline=None)
@given(sparse_contents(), st.booleans())
def test_holes_change_nothing_but_what_is_read(
    case: tuple[bytes, list[tuple[int, int]]], holes: bool
) -> None:
    data, extents = case
    options = replace(SMALL, holes=holes)
    _, [plain], _ = packed(options, data)
    chunks = ImageChunks()
    content = Bytes(data, extents)
    with Packer(options, chunks, io.BytesIO()) as packer:
        numbers = packer.add(content)
        packer.finish()
    assert content.closed
    digests = [chunks.chunks.digest(n) if n >= 0 else b"" for n in numbers]
    plain_image = Image(options)
    plain_image.add(files(data))
    plain_chunks = plain_image.image.chunks
    assert digests == [plain_chunks.digest(n) if n >= 0 else b"" for n in plain.chunks]


def test_small_files_may_be_kept_beside_their_inodes() -> None:
    blob, nodes, _ = packed(replace(SMALL, inline_max=100), b"x" * 100, b"y" * 101, b"")
    assert blob
    assert blob.chunk_count == 1
    assert [node.inline for node in nodes] == [b"x" * 100, None, None]
    assert [len(node.chunks) for node in nodes] == [0, 1, 0]


def test_batches_hold_small_files_and_let_others_pass() -> None:
    options = BuildOptions(chunk_size=65536, batch_size=16384)
    small = [TEXT[i * 100 : i * 100 + 1000] for i in range(40)]
    blob, nodes, image = packed(
        options, *small[:20], NOISE[:65536], *small[20:], NOISE[:8192], NOISE[:70_000]
    )
    assert blob
    assert blob.features & (rafs.BATCH_CHUNKS | rafs.CHUNK_INFO_V2) == rafs.BATCH_CHUNKS | rafs.CHUNK_INFO_V2
    layouts = image.bootstrap(image.merge())
    assert layouts.blobs[0].chunk_count == 40 + 1 + 1 + 1  # the first 64 KiB of noise are there once
    chunks = image.image.chunks
    units = {chunks.stored_offset[node.chunks[0]] for node in nodes[:20] + nodes[21:41]}
    assert len(units) == 3  # 16 of 1000 bytes go into one
    order = sorted(range(len(chunks)), key=lambda n: chunks.index[n])
    for column in (chunks.offset, chunks.stored_offset):
        assert [column[n] for n in order] == sorted(column)


def test_no_content_makes_no_blob() -> None:
    blob, _, image = packed(SMALL, b"", b"")
    assert blob is None
    assert image.bootstrap(image.merge()).blobs == ()


def dictionary_of(image: Image, options: BuildOptions) -> Dictionary:
    bootstrap = image.bootstrap(image.merge())
    dictionary = Dictionary(options.chunk_size, options.digest)
    metas = {b.blob_id: image.blobs[b.blob_id][slice(*_span(b.meta_range))] for b in bootstrap.blobs}
    dictionary.add_image(bootstrap, metas)
    return dictionary


def _span(place: tuple[int, int]) -> tuple[int, int]:
    return place[0], sum(place)


@pytest.mark.parametrize("batch_size", [0, 16384])
def test_chunks_of_a_dictionary_are_not_stored_again(batch_size: int) -> None:
    options = replace(SMALL, batch_size=batch_size)
    _, _, old = packed(options, *MIXTURE)
    changed = [*MIXTURE[:70], b"one new line\n" + MIXTURE[70], *MIXTURE[71:]]
    image = Image(options, dictionary_of(old, options))
    layer = image.add(files(*changed))
    assert layer.blob
    assert layer.blob.chunk_count == 1
    assert layer.blob.stored_size < 12_000  # what frames any blob
    root = image.merge()
    wanted = Image(options)
    wanted.add(files(*changed))
    assert image.read(root, old.blobs) == wanted.read(wanted.merge())
    [foreign] = old.blobs
    assert {blob.blob_id for blob in image.image.chunks.blobs} == {foreign, layer.blob.blob_id}
    shipped = {blob.blob_id: blob.blob_meta for blob in image.image.chunks.blobs}
    assert shipped[foreign] == old.image.chunks.blobs[0].blob_meta


def test_nothing_new_makes_no_blob_and_a_chunk_enters_an_image_once() -> None:
    _, _, old = packed(SMALL, *MIXTURE)
    image = Image(SMALL, dictionary_of(old, SMALL))
    assert image.add(files(*MIXTURE)).blob is None
    count = len(image.image.chunks)
    assert image.add(files(*MIXTURE)).blob is None
    assert len(image.image.chunks) == count
    assert image.read(image.merge(), old.blobs)


def test_a_chunk_that_two_layers_take_from_a_dictionary_is_stated_once() -> None:
    _, _, old = packed(SMALL, *MIXTURE)
    dictionary = dictionary_of(old, SMALL)
    records = []
    for own in (b"own 1", b"own 2"):
        image = Image(SMALL, dictionary)
        records.append(LayerRecord(image.add(files(*MIXTURE[:30], own)), image.image.chunks))
    assembly = assemble(records, warn=pytest.fail)
    out = io.BytesIO()
    write_bootstrap(assembly.root, assembly.chunks, out, chunk_size=SMALL.chunk_size)
    table = parse_bootstrap("image", out.getvalue()).chunk_table
    places = [(blob, index) for _, blob, *_, index, _ in rafs.CHUNK.iter_unpack(table)]
    assert len(places) == len(set(places)) > 20


def test_dictionaries_must_count_as_the_image_does() -> None:
    for field, value, problem in (
        ("chunk_size", 8192, "chunks of 4096 bytes, not of 8192"),
        ("digest", "sha256", "digests of blake3, not of sha256"),
    ):
        _, _, old = packed(SMALL, NOISE)
        with pytest.raises(UsageError, match=problem):
            dictionary_of(old, replace(SMALL, **{field: value}))  # type: ignore[arg-type]


class Broken(Bytes):
    def readinto(self, offset: int, view: memoryview) -> None:
        if offset >= 50_000:
            raise SourceError("gone")
        super().readinto(offset, view)


def test_a_source_that_fails_ends_the_build_and_its_threads() -> None:
    content = Broken(NOISE)
    with (
        pytest.raises(SourceError, match="gone"),
        Packer(SMALL, ImageChunks(), io.BytesIO()) as packer,
    ):
        packer.add(content)
    assert content.closed


def test_memory_stays_bounded_by_the_number_of_chunks() -> None:
    class Sink(io.RawIOBase):
        def write(self, data: object) -> int:
            return len(data)  # type: ignore[arg-type]

    options = replace(SMALL, compression="none", level=None)
    count = 20_000
    with Packer(options, ImageChunks(), Sink()) as packer:  # type: ignore[arg-type]
        packer.add(Bytes(b"warm"))
        tracemalloc.start()
        for i in range(count):
            packer.add(Bytes(b"%d" % i))
        packer.finish()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < count * 600 + (4 << 20)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"chunk_size": 5000}, "chunk size 5000: a power of two, 4096 to 16777216"),
        ({"chunk_size": 2048}, "chunk size 2048"),
        ({"chunk_size": 32 << 20}, "chunk size 33554432"),
        ({"compression": "brotli"}, "'brotli': one of zstd, lz4_block, gzip, none"),
        ({"digest": "md5"}, "'md5': one of blake3, sha256"),
        ({"level": 23}, "level 23: zstd has -7 to 22"),
        ({"compression": "none", "level": 1}, "level 1: none has 0 to 0"),
        ({"batch_size": 100}, "batch size 100"),
        ({"batch_size": 16 << 20}, "batch size 16777216"),
        ({"batch_size": 4096, "chunk_size": 16 << 20}, "with batch size 4096 at most 8388608"),
        ({"compression": "gzip", "chunk_size": 16 << 20}, "with gzip at most 8388608"),
        ({"jobs": -1}, "-1 jobs"),
        ({"inline_max": 5000}, "inline files of 5000 bytes"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(fields: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        BuildOptions(**fields)  # type: ignore[arg-type]


def test_the_fingerprint_tells_all_but_the_threads() -> None:
    assert BuildOptions(jobs=1).fingerprint == BuildOptions(jobs=9, level=3).fingerprint
    assert BuildOptions(level=4).fingerprint != BuildOptions().fingerprint
