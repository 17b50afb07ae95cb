from __future__ import annotations

import gzip
import io
import random
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from erofsd.build import stream
from erofsd.build.stream import ByteStream
from erofsd.errors import CorruptImage, SourceError, UnsupportedImage

NOISE = random.Random(1).randbytes(300_000)
DATA = NOISE + bytes(5 << 20) + NOISE[:100_000]
CHECKED = zstandard.ZstdCompressor(write_checksum=True)
SIZELESS = zstandard.ZstdCompressor(write_content_size=False)


@pytest.fixture(params=["isal", "zlib"], autouse=True)
def inflater(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with each library that inflates."""
    if request.param == "zlib":
        monkeypatch.setattr(stream, "_new_inflater", zlib.decompressobj)
    else:
        pytest.importorskip("isal")


def skippable(size: int) -> bytes:
    return struct.pack("<II", 0x184D2A53, size) + b"x" * size


def members(data: bytes) -> bytes:
    parts = (data[:1000], data[1000:400_000], b"", data[400_000:])
    return b"".join(gzip.compress(part, 6, mtime=0) for part in parts)


def frames(data: bytes) -> bytes:
    parts = [skippable(5), CHECKED.compress(data[:1000]), skippable(0), SIZELESS.compress(data[1000:400_000])]
    parts += [CHECKED.compress(b""), SIZELESS.compress(data[400_000:]), skippable(300_000)]
    return b"".join(parts)


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "gzip members": members,
    "zstd": CHECKED.compress,
    "zstd frames": frames,
}


def read_all(packed: bytes) -> bytes:
    with ByteStream(io.BytesIO(packed), "archive") as source:
        return b"".join(iter(lambda: source.read(777_777), b""))


@pytest.mark.parametrize("kind", PACKINGS)
def test_all_packings_give_the_same_bytes(kind: str) -> None:
    assert read_all(PACKINGS[kind](DATA)) == DATA


@pytest.mark.parametrize("kind", ["gzip", "gzip members", "zstd", "zstd frames"])
def test_a_stream_cut_off_anywhere_is_an_error(kind: str) -> None:
    content = DATA[:2000]
    packed = PACKINGS[kind](content)[: None if kind != "zstd frames" else 2500]
    complete, problems = set(), set()
    inside = "member" if kind.startswith("gzip") else "frame"
    for length in range(6, len(packed)):
        try:
            complete.add(read_all(packed[:length]))
        except CorruptImage as exc:
            problems.add(re.sub("[0-9]+", "N", str(exc)))
    assert problems == {f"archive: at byte N: {kind[:4]}: ends inside a {inside}: the archive is cut off"}
    # Between members and frames a stream may end: that is for the archive's own format to notice.
    assert all(content.startswith(part) and len(part) in (0, 1000, 2000) for part in complete)


def test_zeros_after_the_last_member_are_padding() -> None:
    assert read_all(gzip.compress(DATA) + bytes(70_000)) == DATA


@pytest.mark.parametrize("junk", [b"junk", b"\x1f\x8bjunk", b"\0\0junk", gzip.compress(b"x")[:-1]])
def test_bytes_after_the_last_member_are_an_error(junk: bytes) -> None:
    with pytest.raises(CorruptImage, match="archive: at byte"):
        read_all(gzip.compress(DATA[:1000]) + junk)
    with pytest.raises(CorruptImage, match="archive: at byte"):
        read_all(CHECKED.compress(DATA[:1000]) + b"junk" + junk)


def test_flipped_bytes_are_found() -> None:
    for packed in (gzip.compress(DATA, mtime=0), CHECKED.compress(DATA)):
        damaged = bytearray(packed)
        damaged[-3] ^= 0x10
        with pytest.raises(CorruptImage, match="archive"):
            read_all(bytes(damaged))


@pytest.mark.parametrize(("magic", "kind"), [(b"\xfd7zXZ\0", "xz"), (b"BZh91AY&SY", "bzip2")])
def test_other_packings_are_refused_by_name(magic: bytes, kind: str) -> None:
    with pytest.raises(UnsupportedImage, match=kind):
        read_all(magic + bytes(100))


@pytest.mark.parametrize("kind", PACKINGS)
def test_little_memory_whatever_the_ratio(kind: str) -> None:
    with ByteStream(io.BytesIO(PACKINGS[kind](bytes(64 << 20))), "archive") as source:
        assert source.skip(64 << 20) == 64 << 20
        assert source.read(1) == b""


@settings(max_examples=40)
@given(st.lists(st.integers(0, 300_000), max_size=20), st.sampled_from(sorted(PACKINGS)))
def test_reading_and_skipping_keep_the_offset(steps: list[int], kind: str) -> None:
    content = NOISE + bytes(200_000)
    with ByteStream(io.BytesIO(PACKINGS[kind](content)), "archive") as source:
        at = 0
        for i, step in enumerate(steps):
            left = min(step, len(content) - at)
            if i % 3 == 0:
                assert source.read(step) == content[at : at + step]
            elif i % 3 == 1:
                assert source.skip(step) == left
            else:
                buffer = bytearray(step)
                assert source.readinto(memoryview(buffer)) == left
                assert buffer[:left] == content[at : at + left]
            at += left
            assert source.offset == at


class Failing:
    """Gives some bytes, then an error of the system."""

    def __init__(self) -> None:
        self.pieces: Iterator[bytes] = iter([NOISE])

    def read(self, size: int) -> bytes:
        for piece in self.pieces:
            return piece
        raise OSError(5, "Input/output error")


def test_errors_of_the_file_arrive_where_it_is_consumed() -> None:
    with ByteStream(Failing(), "archive") as source:
        assert source.read(len(NOISE)) == NOISE
        with pytest.raises(SourceError, match=f"archive: at byte {len(NOISE)}: Input/output error"):
            source.read(1)


def test_closing_early_ends_the_thread() -> None:
    before = threading.active_count()
    with ByteStream(io.BytesIO(gzip.compress(bytes(100 << 20), 1)), "archive") as source:
        source.read(10)
    assert threading.active_count() == before
