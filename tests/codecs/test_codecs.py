"""One suite over every codec."""

from __future__ import annotations

import gzip
import random
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from erofsd.codecs.base import CODECS, Codec
from erofsd.errors import CodecError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "lz4_block": lambda data: lz4.block.compress(data, store_size=False),
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
}

PACKED = [name for name in PACK if name != "none"]


def codec(name: str) -> Codec:
    return CODECS[name]()


def unpack(name: str, packed: bytes, size: int) -> bytes:
    target = bytearray(size)
    codec(name).decompress_into(memoryview(packed), memoryview(target))
    return bytes(target)


def text(size: int) -> bytes:
    words = random.Random(size).choices(
        [b"erofs ", b"chunk ", b"blob ", b"\0\0\0", b"digest "], k=size // 3 + 1
    )
    return b"".join(words)[:size]


def test_every_builtin_codec_is_covered() -> None:
    assert list(CODECS) == list(PACK)
    assert [codec(name).name for name in CODECS] == list(PACK)


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("size", [1, 17, 4096, 100_000, 1 << 20, 5 << 20])
def test_gives_back_what_was_packed(name: str, size: int) -> None:
    data = text(size)
    assert unpack(name, PACK[name](data), size) == data


@pytest.mark.parametrize("name", PACK)
def test_incompressible_data_round_trips(name: str) -> None:
    data = random.Random(1).randbytes(300_000)
    assert unpack(name, PACK[name](data), len(data)) == data


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("off", [-4096, -1, 1, 4096])
def test_another_size_than_stated_is_refused(name: str, off: int) -> None:
    data = text(50_000)
    with pytest.raises(CodecError):
        unpack(name, PACK[name](data), len(data) + off)


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("tail", [b"\0", b"x", b"\0" * 12, b"garbage behind the end"])
def test_trailing_bytes_are_refused(name: str, tail: bytes) -> None:
    data = text(50_000)
    with pytest.raises(CodecError):
        unpack(name, PACK[name](data) + tail, len(data))


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_a_second_frame_is_refused_even_an_empty_one(name: str) -> None:
    data = text(10_000)
    for second in (b"", data):
        with pytest.raises(CodecError):
            unpack(name, PACK[name](data) + PACK[name](second), len(data))


@pytest.mark.parametrize("name", PACK)
def test_every_truncation_is_refused(name: str) -> None:
    data = text(3_000)
    packed = PACK[name](data)
    for length in range(len(packed)):
        with pytest.raises(CodecError):
            unpack(name, packed[:length], len(data))


@pytest.mark.parametrize("name", PACKED)
@given(packed=st.binary(max_size=200), size=st.integers(1, 10_000))
def test_any_bytes_decompress_or_are_refused(name: str, packed: bytes, size: int) -> None:
    try:
        unpack(name, packed, size)
    except CodecError:
        return


@pytest.mark.parametrize("name", ["gzip", "zstd"])
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_never_crashes(name: str, at: int, bit: int) -> None:
    packed = bytearray(PACK[name](text(20_000)))
    packed[at % len(packed)] ^= 1 << bit
    try:
        unpack(name, bytes(packed), 20_000)
    except CodecError:
        return


def test_zstd_checksum_is_verified() -> None:
    data = random.Random(2).randbytes(5_000)  # stored raw in the frame: only the checksum can notice
    packed = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(data))
    assert unpack("zstd", bytes(packed), len(data)) == data
    packed[2_000] ^= 1
    with pytest.raises(CodecError):
        unpack("zstd", bytes(packed), len(data))


def test_zstd_without_content_size_is_read_and_bounded() -> None:
    data = text(200_000)
    packed = zstandard.ZstdCompressor(write_content_size=False).compress(data)
    assert unpack("zstd", packed, len(data)) == data
    with pytest.raises(CodecError):
        unpack("zstd", packed, len(data) - 1)


def test_zstd_window_beyond_the_limit_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(19, window_log=27, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = packer.compress(b"x" * 100_000) + packer.flush()
    with pytest.raises(CodecError, match="window"):
        unpack("zstd", packed, 100_000)


@pytest.mark.parametrize("name", PACKED)
def test_a_bomb_costs_no_memory(name: str) -> None:
    packed = PACK[name](bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            unpack(name, packed, 64 << 10)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", PACK)
def test_one_instance_serves_many_threads(name: str) -> None:
    shared = codec(name)
    samples = [text(10_000 + 777 * i) for i in range(40)]

    def work(data: bytes) -> bool:
        target = bytearray(len(data))
        shared.decompress_into(memoryview(PACK[name](data)), memoryview(target))
        return bytes(target) == data

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, samples))
