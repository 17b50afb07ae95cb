"""Decodes native EROFS compression in software: LZ4, LZMA, DEFLATE, Zstandard, and what is stored plain.

Compressed bytes end at the end of their physical cluster: the unused bytes are zeros in front ("zero
padding"). Only images of before Linux 5.4, and ``mkfs.erofs -Elegacy-compress``, have them behind.

A reference may be partial (deduplication, or an extent that ends before its cluster does): then fewer bytes
are wanted than the cluster decodes to. The decoders here stop at what is wanted, so memory is bounded by the
length of an extent, at most 12 MiB.

Source: fs/erofs/decompressor*.c of Linux 6.18; lib/decompress.c of erofs-utils 1.9.3.
"""

from __future__ import annotations

import io
import lzma
import zlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import lz4.block  # type: ignore[import-untyped]
import zstandard

from erofsd.errors import CodecError, CorruptImage
from erofsd.images.erofs import format as fmt
from erofsd.images.erofs import zmap
from erofsd.images.erofs.format import Inode
from erofsd.images.erofs.zmap import ZExtent
from erofsd.images.source import corrupt

if TYPE_CHECKING:
    from erofsd.images.erofs.reader import ErofsReader

PIECE_SIZE = 1 << 20
LZMA_MAX_DICT_SIZE = 8 << 20
PACKED_CACHE_SIZE = 8 << 20


def content(reader: ErofsReader, inode: Inode) -> Iterator[bytes]:
    """The decoded bytes of a compressed file, in pieces of at most 1 MiB.

    Raises:
        CorruptImage: The index or the data are damaged.
    """
    for extent in zmap.extents(reader, inode):
        if extent.method >= zmap.FRAGMENT:
            for at in range(0, extent.length, PIECE_SIZE):
                length = min(PIECE_SIZE, extent.length - at)
                if extent.method == zmap.HOLE:
                    yield bytes(length)
                else:
                    yield reader.packed.read(extent.offset + at, length)
            continue
        data = decode_extent(reader, inode, extent)
        for at in range(0, len(data), PIECE_SIZE):
            yield data[at : at + PIECE_SIZE]


def decode_extent(reader: ErofsReader, inode: Inode, extent: ZExtent) -> bytes:
    """The bytes of an extent that is neither fragment nor hole.

    Raises:
        CorruptImage: They do not decode.
    """
    if extent.inline:
        stored = reader.source.pread(extent.offset, extent.stored)
    else:
        place = reader.locate(inode, 0, extent.offset, extent.stored)
        stored = reader.read(place.device, place.offset or 0, place.length)
    try:
        if extent.method == zmap.SHIFTED:
            return stored[: extent.length]
        if extent.method == zmap.INTERLACED:
            return _interlaced(stored, extent, reader.block_size)
        padded = bool(reader.super.feature_incompat & fmt.INCOMPAT_ZERO_PADDING)
        return decode(extent.method, stored, extent.length, partial=extent.partial, zero_padding=padded)
    except CodecError as exc:
        where = f"bytes [{extent.start}, {extent.start + extent.length}) of nid {inode.nid}"
        raise corrupt(reader.name, extent.offset, "compressed data", f"{exc}: {where}") from exc


def _interlaced(stored: bytes, extent: ZExtent, block_size: int) -> bytes:
    # The bytes lie where they would lie in an uncompressed block of the file, and wrap around.
    if len(stored) > block_size:
        raise CodecError("interlaced data of more than one block")
    skip = extent.start % block_size
    right = min(block_size - skip, extent.length)
    return stored[skip : skip + right] + stored[: extent.length - right]


def decode(method: int, stored: bytes, length: int, *, partial: bool, zero_padding: bool) -> bytes:
    """The first *length* bytes that *stored* decodes to; all of them unless *partial*.

    Raises:
        CodecError: Damaged, or not *length* bytes.
    """
    if zero_padding or method != zmap.LZ4:
        stored = stored.lstrip(b"\0")
        if not stored:
            raise CodecError("nothing but padding")
    if method == zmap.LZ4:
        data = _lz4(stored, length, partial or not zero_padding)
    elif method == zmap.LZMA:
        data = _micro_lzma(stored, length)
    elif method == zmap.DEFLATE:
        data = _deflate(stored, length)
    else:
        data = _zstd(stored, length)
    if len(data) != length:
        raise CodecError(f"decodes to {len(data)} bytes instead of {length}")
    return data


def _lz4(stored: bytes, length: int, may_go_on: bool) -> bytes:
    try:
        data: bytes = lz4.block.decompress(stored, uncompressed_size=length)
    except lz4.block.LZ4BlockError as exc:
        if not may_go_on:
            raise CodecError(f"lz4: {exc}") from exc
    else:
        return data
    return _lz4_partial(stored, length)


def _lz4_partial(stored: bytes, length: int) -> bytes:
    """Decode an LZ4 block until *length* bytes are there, whatever follows.

    The library decodes whole blocks only. This is slow, and used for partial references and for padding
    behind the data.

    Source: lz4 doc/lz4_Block_format.md.
    """
    out = bytearray()
    at = 0
    try:
        while len(out) < length:
            token = stored[at]
            at += 1
            literals = token >> 4
            if literals == 15:
                literals, at = _lz4_length(stored, at, literals)
            if at + literals > len(stored):
                break
            out += stored[at : at + literals]
            at += literals
            if len(out) >= length or at == len(stored):
                break
            distance = stored[at] | stored[at + 1] << 8
            at += 2
            match = token & 15
            if match == 15:
                match, at = _lz4_length(stored, at, match)
            match += 4
            if not 0 < distance <= len(out):
                raise CodecError(f"lz4: distance {distance} after {len(out)} bytes")
            match = min(match, length - len(out))
            source = bytes(out[-distance:][:match])
            out += (source * (match // distance + 1))[:match] if distance < match else source
    except IndexError as exc:
        raise CodecError("lz4: ends in the middle") from exc
    return bytes(out[:length])


def _lz4_length(stored: bytes, at: int, length: int) -> tuple[int, int]:
    while True:
        more = stored[at]
        at += 1
        length += more
        if more != 255:
            return length, at


def _micro_lzma(stored: bytes, length: int) -> bytes:
    # An LZMA1 stream whose first byte, always 0, is replaced by the complement of the properties byte.
    # Source: xz, src/liblzma/api/lzma/container.h, lzma_microlzma_decoder().
    properties = ~stored[0] & 0xFF
    if properties >= 9 * 5 * 5:
        raise CodecError(f"lzma: properties {properties:#x}")
    pb, rest = divmod(properties, 9 * 5)
    lp, lc = divmod(rest, 9)
    if lc + lp > 4:
        raise CodecError(f"lzma: properties {properties:#x}")
    dict_size = min(max(length, 4096), LZMA_MAX_DICT_SIZE)
    filters = [{"id": lzma.FILTER_LZMA1, "dict_size": dict_size, "lc": lc, "lp": lp, "pb": pb}]
    try:
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=filters)
        return decoder.decompress(b"\0" + stored[1:], max_length=length)
    except lzma.LZMAError as exc:
        raise CodecError(f"lzma: {exc}") from exc


def _deflate(stored: bytes, length: int) -> bytes:
    try:
        return zlib.decompressobj(-15).decompress(stored, length)
    except zlib.error as exc:
        raise CodecError(f"deflate: {exc}") from exc


def _zstd(stored: bytes, length: int) -> bytes:
    decoder = zstandard.ZstdDecompressor(max_window_size=8 << 20)
    try:
        with decoder.stream_reader(io.BytesIO(stored)) as stream:
            return stream.read(length)
    except zstandard.ZstdError as exc:
        raise CodecError(f"zstd: {exc}") from exc


class PackedFile:
    """The packed inode: a file that holds the fragments of others, read at random.

    What is kept: where its extents lie, 32 bytes each, and the extents decoded last.
    """

    def __init__(self, reader: ErofsReader, inode: Inode) -> None:
        self._reader = reader
        self._inode = inode
        self._decoded: OrderedDict[int, bytes] = OrderedDict()
        self._decoded_size = 0
        self._columns = tuple(array(code) for code in "QQQIBBB")
        for extent in zmap.extents(reader, inode) if inode.compressed else self._flat():
            for column, value in zip(self._columns, extent, strict=True):
                column.append(value)

    def _flat(self) -> Iterator[ZExtent]:
        start = 0
        for extent in self._reader.extents(self._inode):
            if extent.device:
                raise self._bad("lies on an extra device")
            method = zmap.HOLE if extent.offset is None else zmap.SHIFTED
            for at in range(0, extent.length, PIECE_SIZE):
                length = min(PIECE_SIZE, extent.length - at)
                yield ZExtent(start, length, (extent.offset or 0) + at, length, method)
                start += length

    def _bad(self, problem: str) -> CorruptImage:
        return corrupt(self._reader.name, self._inode.offset, "packed inode", problem)

    def stored(self, offset: int, length: int) -> Iterator[ZExtent]:
        """The extents that hold *length* bytes at *offset*.

        Raises:
            CorruptImage: The packed inode is shorter.
        """
        if offset + length > self._inode.size:
            raise self._bad(f"a fragment of {length} bytes at {offset} reaches past its {self._inode.size}")
        starts = self._columns[0]
        for i in range(max(bisect_right(starts, offset) - 1, 0), len(starts)):
            if starts[i] >= offset + length:
                return
            start, size, at, stored, method, partial, inline = (column[i] for column in self._columns)
            yield ZExtent(start, size, at, stored, method, bool(partial), bool(inline))

    def read(self, offset: int, length: int) -> bytes:
        """The decoded bytes at *offset* of the packed inode."""
        parts = []
        for extent in self.stored(offset, length):
            first = max(offset - extent.start, 0)
            last = min(offset + length - extent.start, extent.length)
            if extent.method == zmap.HOLE:
                parts.append(bytes(last - first))
            elif extent.method == zmap.SHIFTED:
                parts.append(self._reader.source.pread(extent.offset + first, last - first))
            else:
                parts.append(self._decode(extent)[first:last])
        return b"".join(parts)

    def _decode(self, extent: ZExtent) -> bytes:
        data = self._decoded.get(extent.start)
        if data is not None:
            self._decoded.move_to_end(extent.start)
            return data
        data = decode_extent(self._reader, self._inode, extent)
        self._decoded[extent.start] = data
        self._decoded_size += len(data)
        while self._decoded_size > PACKED_CACHE_SIZE and len(self._decoded) > 1:
            self._decoded_size -= len(self._decoded.popitem(last=False)[1])
        return data
