"""What each compression algorithm of EROFS decodes to, padded, partial, damaged."""

from __future__ import annotations

import lzma
import random
import zlib

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from erofsd.errors import CodecError
from erofsd.images.erofs import zmap
from erofsd.images.erofs.compression import decode
from erofsd.images.erofs.format import crc32c

TEXT = b"".join(b"%d squared is %d\n" % (i, i * i) for i in range(3000))


def micro_lzma(data: bytes) -> bytes:
    """As liblzma's lzma_microlzma_encoder: the properties' complement in place of the first byte."""
    filters = [{"id": lzma.FILTER_LZMA1, "lc": 3, "lp": 0, "pb": 2, "dict_size": 65536}]
    raw = lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters)
    assert raw[0] == 0
    return bytes([~(2 * 45 + 3) & 0xFF]) + raw[1:]


def raw_deflate(data: bytes) -> bytes:
    encoder = zlib.compressobj(9, wbits=-15)
    return encoder.compress(data) + encoder.flush()


ENCODERS = {
    zmap.LZ4: lambda data: lz4.block.compress(data, store_size=False),
    zmap.LZMA: micro_lzma,
    zmap.DEFLATE: raw_deflate,
    zmap.ZSTD: zstandard.ZstdCompressor(level=5).compress,
}


@pytest.mark.parametrize("method", ENCODERS)
def test_padding_in_front_is_skipped(method: int) -> None:
    stored = bytes(777) + ENCODERS[method](TEXT)
    assert decode(method, stored, len(TEXT), partial=False, zero_padding=True) == TEXT


@pytest.mark.parametrize("method", ENCODERS)
@pytest.mark.parametrize("length", [1, 13, 4096, len(TEXT) - 1])
def test_partial_references_decode_the_beginning(method: int, length: int) -> None:
    stored = ENCODERS[method](TEXT)
    assert decode(method, stored, length, partial=True, zero_padding=True) == TEXT[:length]


@pytest.mark.parametrize("method", ENCODERS)
def test_too_few_bytes_are_an_error(method: int) -> None:
    with pytest.raises(CodecError):
        decode(method, ENCODERS[method](TEXT), len(TEXT) + 1, partial=False, zero_padding=True)
    with pytest.raises(CodecError):
        decode(method, ENCODERS[method](TEXT)[:-40], len(TEXT), partial=False, zero_padding=True)
    with pytest.raises(CodecError):
        decode(method, bytes(4096), 10, partial=False, zero_padding=True)


@pytest.mark.parametrize("method", ENCODERS)
def test_noise_never_crashes_a_decoder(method: int) -> None:
    rng = random.Random(method)
    good = ENCODERS[method](TEXT)
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 9)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        partial = rng.random() < 0.5
        try:
            assert len(decode(method, bytes(bad), len(TEXT), partial=partial, zero_padding=True)) == len(TEXT)
        except CodecError:
            pass


@given(
    st.lists(st.sampled_from([b"a", b"bc", b"0123456789", b"\0" * 50, b"xyzxyz"]), max_size=200).map(b"".join)
)
def test_lz4_before_zero_padding_ends_where_the_data_do(data: bytes) -> None:
    if not data:
        return
    stored = ENCODERS[zmap.LZ4](data).ljust(8192, b"\0")
    assert decode(zmap.LZ4, stored, len(data), partial=False, zero_padding=False) == data


def test_crc32c_is_castagnolis() -> None:
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283  # RFC 3720, B.4 and the catalogues
