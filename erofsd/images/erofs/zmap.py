"""Where the data of natively compressed EROFS files lie: the cluster indexes, read from front to back.

A file is cut into logical clusters (lclusters) of one block. The index says of each whether an extent begins
in it (PLAIN, HEAD1, HEAD2), and where in the cluster and at which physical block, or that it only continues
one (NONHEAD). An extent ends where the next begins. Its physical cluster (pcluster) is one block long, unless
the NONHEAD entry that follows its head carries a block count (big pclusters).

The kernel looks positions up at random and follows distances back and forth; whoever reads a file from front
to back needs none of these distances.

Source: fs/erofs/zmap.c of Linux 6.18.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from erofsd.errors import CorruptImage, UnsupportedImage
from erofsd.images.erofs import format as fmt
from erofsd.images.erofs.format import Inode
from erofsd.images.source import corrupt

if TYPE_CHECKING:
    from erofsd.images.erofs.reader import ErofsReader

ADVISE_COMPACTED_2B = 0x01
ADVISE_EXTENTS = 0x01  # the same bit, for full indexes
ADVISE_BIG_PCLUSTER_1 = 0x02
ADVISE_BIG_PCLUSTER_2 = 0x04
ADVISE_INLINE_PCLUSTER = 0x08
ADVISE_INTERLACED = 0x10
ADVISE_FRAGMENT = 0x20

PLAIN, HEAD1, NONHEAD, HEAD2 = range(4)
PARTIAL_REF = 1 << 15
CBLKCNT = 1 << 11

EXTENT_PLEN_PARTIAL = 1 << 27
EXTENT_PLEN_FMT_SHIFT = 28
EXTENT_PLEN_MASK = (fmt.PCLUSTER_MAX_SIZE << 1) - 1

LZ4, LZMA, DEFLATE, ZSTD = range(4)
SHIFTED, INTERLACED = 4, 5  # not compressed; what the kernel calls Z_EROFS_COMPRESSION_SHIFTED, _INTERLACED
FRAGMENT, HOLE = 6, 7  # ours: bytes of the packed inode, zeros

MAP_HEADER = struct.Struct("<IHBB")
FULL_INDEX = struct.Struct("<HHI")
PIECE_BYTES = 32 << 10  # of index read at once: whole packs of every kind


class ZExtent(NamedTuple):
    """Bytes ``[start, start + length)`` of a file, and what they decode from.

    Attributes:
        offset: Of the encoded bytes in the primary, or of a FRAGMENT in the packed inode.
        stored: Encoded length, bytes; 0 for FRAGMENT and HOLE.
        method: LZ4 … HOLE.
        partial: The encoded bytes may decode to more than ``length``.
        inline: The encoded bytes are metadata (ztailpacking).
    """

    start: int
    length: int
    offset: int
    stored: int
    method: int
    partial: bool = False
    inline: bool = False


@dataclass(frozen=True, slots=True)
class MapHeader:
    """What precedes an inode's index.

    Attributes:
        offset: Of the header, bytes.
        index: Where the entries begin, bytes.
        index_end: Where they end, padding of the last pack included: inline data follow there.
        bits: log2 of the size of a logical cluster.
        cluster_count: Logical clusters of the file.
        inline_size: Encoded length of an extent that lies behind the index; 0 if there is none.
        whole_fragment: Offset in the packed inode if all of the file lies there.
    """

    offset: int
    index: int
    index_end: int
    advise: int
    bits: int
    cluster_count: int
    algorithms: tuple[int, int] = (0, 0)
    inline_size: int = 0
    fragment_offset: int = 0
    whole_fragment: int | None = None

    @property
    def record_size(self) -> int:
        """Bytes of one written-down extent; 0 where clusters are indexed."""
        return 4 << (self.advise >> 1 & 3)


class _Cluster(NamedTuple):
    # One entry of an index. at: where the extent begins in the cluster. blocks: the count in a NONHEAD, or 0.
    kind: int
    at: int = 0
    block: int = 0
    blocks: int = 0
    partial: bool = False


def map_header(reader: ErofsReader, inode: Inode) -> MapHeader:
    """Read and check the header of a compressed inode, and compute how far its index reaches.

    Raises:
        CorruptImage: A header no kernel accepts, or an index that reaches past the end of the image.
    """
    offset = -(-inode.tail // 8) * 8
    raw = reader.source.pread(offset, MAP_HEADER.size)
    low, advise, algorithms, cluster_bits = MAP_HEADER.unpack(raw)
    end = offset + MAP_HEADER.size
    bits = reader.super.block_bits + (cluster_bits & 15)
    count = (inode.size + (1 << bits) - 1) >> bits
    if cluster_bits >> 7:  # then all of the header is an offset in the packed inode
        at = int.from_bytes(raw, "little") & (1 << 63) - 1
        return MapHeader(offset, end, end, ADVISE_FRAGMENT, bits, count, whole_fragment=at)
    if inode.layout == fmt.COMPRESSED_FULL and advise & ADVISE_EXTENTS:
        record = 4 << (advise >> 1 & 3)
        index = -(-end // record) * record
        if record > 8:  # as many as the header says, else one a cluster
            index_end = index + record * (low | (algorithms | cluster_bits << 8) << 32)
        else:
            index_end = index + record * count + (8 if record == 4 else 0)
        header = MapHeader(offset, index, index_end, advise, bits, count)
    else:
        if inode.layout == fmt.COMPRESSED_FULL:
            index = end + 8
            index_end = index + FULL_INDEX.size * count
        else:
            index = end
            index_end = _packs(reader, inode, index, advise)[-1][1]
            if bool(advise & ADVISE_BIG_PCLUSTER_1) != bool(advise & ADVISE_BIG_PCLUSTER_2):
                raise corrupt(reader.name, offset + 4, "h_advise", f"{advise:#x} contradicts itself")
        fragment = advise & ADVISE_FRAGMENT
        header = MapHeader(
            offset,
            index,
            index_end,
            advise,
            bits,
            count,
            algorithms=(algorithms & 15, algorithms >> 4),
            inline_size=low >> 16 if advise & ADVISE_INLINE_PCLUSTER and not fragment else 0,
            fragment_offset=low if fragment else 0,
        )
    if header.index_end + header.inline_size > reader.source.size:
        raise corrupt(reader.name, offset, "cluster index", f"of nid {inode.nid} reaches past the end")
    return header


def extents(reader: ErofsReader, inode: Inode) -> Iterator[ZExtent]:
    """The extents of a compressed file, in order and without gaps, each in bounds.

    Raises:
        CorruptImage: The index contradicts itself, or points outside.
        UnsupportedImage: A pcluster larger than any kernel takes.
    """
    if inode.size:
        yield from _Index(reader, inode).extents()


def _packs(reader: ErofsReader, inode: Inode, index: int, advise: int) -> list[tuple[int, int, int]]:
    """The runs of packs in a compact index: start, end and entries a pack.

    2 entries share 8 bytes (4 each) until 32-byte alignment, then 16 share 32 bytes, then the rest by twos.
    """
    total = (inode.size + reader.block_size - 1) >> reader.super.block_bits
    first = (32 - index % 32) // 4 & 7
    if first >= total:
        return [(index, index + -(-total // 2) * 8, 2)]
    middle = (total - first) // 16 * 16 if advise & ADVISE_COMPACTED_2B else 0
    second = index + first * 4
    third = second + middle * 2
    end = third + -(-(total - first - middle) // 2) * 8
    return [(index, second, 2), (second, third, 16), (third, end, 2)]


def _unpack(pack: bytes, count: int, low_bits: int, big: bool) -> Iterator[_Cluster]:
    """One pack of a compact index: bit fields, then the block that its addresses are counted from.

    A head's block is that base plus the blocks of all pclusters before it in this pack. Without big pclusters
    each is one block long, and the base is one block low. Source: zmap.c, z_erofs_load_compact_lcluster().
    """
    fields = int.from_bytes(pack[:-4], "little")
    block = int.from_bytes(pack[-4:], "little") + (not big)
    width = (len(pack) - 4) * 8 // count
    mask = (1 << low_bits) - 1
    counted = True  # whether the blocks of the latest head are in `block` already
    for i in range(count):
        field = fields >> i * width
        low, kind = field & mask, field >> low_bits & 3
        if kind != NONHEAD:
            block += not counted
            counted = False
            yield _Cluster(kind, low, block & 0xFFFFFFFF)
        elif low & CBLKCNT:
            blocks = low & ~CBLKCNT
            if big:
                block += blocks
                counted = True
            yield _Cluster(NONHEAD, blocks=blocks)
        else:
            yield _Cluster(NONHEAD)


class _Index:
    """The index of one compressed inode."""

    def __init__(self, reader: ErofsReader, inode: Inode) -> None:
        self.reader = reader
        self.inode = inode
        self.header = map_header(reader, inode)
        self.advise = self.header.advise

    def extents(self) -> Iterator[ZExtent]:
        """See the function of this name."""
        header = self.header
        if header.whole_fragment is not None:
            yield self._fragment(0, header.whole_fragment)
        elif self.inode.layout == fmt.COMPRESSED_FULL and self.advise & ADVISE_EXTENTS:
            yield from map(self._checked, self._written_extents())
        else:
            yield from map(self._checked, self._joined_clusters())

    def _checked(self, extent: ZExtent) -> ZExtent:
        # zmap.c, z_erofs_map_sanity_check(), and what the decompressor would refuse later
        reader = self.reader
        if extent.method >= FRAGMENT:
            return extent
        if extent.method <= ZSTD and not reader.super.algorithms >> extent.method & 1:
            raise self._bad(f"algorithm {extent.method} is not announced in the superblock")
        if extent.stored > fmt.PCLUSTER_MAX_SIZE or extent.length > fmt.PCLUSTER_MAX_DSIZE:
            what = f"{extent.stored} bytes of nid {self.inode.nid} that decode to {extent.length}"
            raise UnsupportedImage(
                f"{reader.name}: at byte {extent.offset}: physical cluster: {what}: too large"
            )
        if extent.method in (SHIFTED, INTERLACED) and extent.length > extent.stored:
            raise self._bad(f"plain cluster at byte {extent.offset} is shorter than its data")
        if not extent.inline:
            reader.locate(self.inode, 0, extent.offset, extent.stored)
        return extent

    def _bad(self, problem: str) -> CorruptImage:
        where = f"cluster index of nid {self.inode.nid}"
        return corrupt(self.reader.name, self.header.index, where, problem)

    def _fragment(self, start: int, offset: int) -> ZExtent:
        if self.inode.nid == self.reader.super.packed_nid or not self.reader.super.packed_nid:
            raise self._bad("a fragment, but no packed inode to find it in")
        return ZExtent(start, self.inode.size - start, offset, 0, FRAGMENT)

    # -- indexed clusters

    def _joined_clusters(self) -> Iterator[ZExtent]:
        """Clusters joined to extents: one is complete when the next head, or the end of the file, is seen."""
        head = _Cluster(NONHEAD)
        start = 0  # of the extent that `head` began
        blocks: int | None = None  # what the NONHEAD right after `head` counts; None if there is none
        for lcn, cluster in enumerate(self._clusters()):
            if lcn == 0:
                if cluster.kind == NONHEAD or cluster.at:
                    raise self._bad("the first cluster does not begin an extent")
                head = cluster
                continue
            if cluster.kind == NONHEAD:
                if start >> self.header.bits == lcn - 1:
                    blocks = cluster.blocks
                continue
            here = lcn << self.header.bits | cluster.at
            if here >= self.inode.size:
                break
            yield self._extent(head, start, here, blocks)
            head, start, blocks = cluster, here, None
        yield self._last_extent(head, start, blocks)

    def _extent(self, head: _Cluster, start: int, stop: int, blocks: int | None) -> ZExtent:
        big = ADVISE_BIG_PCLUSTER_1 if head.kind == HEAD1 else ADVISE_BIG_PCLUSTER_2
        if blocks is None or not self.advise & big:
            blocks = 1
        if not blocks:
            raise self._bad(f"the cluster after the extent at {start} should count blocks, but does not")
        bits = self.reader.super.block_bits
        return ZExtent(
            start, stop - start, head.block << bits, blocks << bits, self._method(head), head.partial
        )

    def _last_extent(self, head: _Cluster, start: int, blocks: int | None) -> ZExtent:
        header = self.header
        if header.inline_size:
            if header.index_end % self.reader.block_size + header.inline_size > self.reader.block_size:
                raise self._bad(f"{header.inline_size} bytes of inline data cross a block boundary")
            length = self.inode.size - start
            stored = header.inline_size
            return ZExtent(
                start, length, header.index_end, stored, self._method(head), head.partial, inline=True
            )
        if self.advise & ADVISE_FRAGMENT:
            wide = self.inode.layout == fmt.COMPRESSED_FULL  # then the head's block is the upper half
            return self._fragment(start, header.fragment_offset | (head.block << 32 if wide else 0))
        return self._extent(head, start, self.inode.size, blocks)

    def _method(self, head: _Cluster) -> int:
        if head.kind == PLAIN:
            return INTERLACED if self.advise & ADVISE_INTERLACED else SHIFTED
        method = self.header.algorithms[head.kind == HEAD2]
        if method > ZSTD:
            raise UnsupportedImage(f"{self.reader.name}: unknown compression algorithm {method}")
        return method

    def _clusters(self) -> Iterator[_Cluster]:
        """The entries of the index, one a logical cluster."""
        full = self.inode.layout == fmt.COMPRESSED_FULL
        found = self._full_clusters() if full else self._compact_clusters()
        # the last pack has entries to spare
        for lcn, cluster in zip(range(self.header.cluster_count), found, strict=False):
            if cluster.kind != NONHEAD and cluster.at >> self.header.bits:
                raise self._bad(f"cluster {lcn}: its extent begins at {cluster.at}, behind its end")
            if cluster.blocks and not self.advise & (ADVISE_BIG_PCLUSTER_1 | ADVISE_BIG_PCLUSTER_2):
                raise self._bad(f"cluster {lcn} counts blocks, but no pcluster is larger than one")
            yield cluster

    def _full_clusters(self) -> Iterator[_Cluster]:
        for piece in self._pieces(self.header.index, self.header.index_end):
            for advise, offset, word in FULL_INDEX.iter_unpack(piece):
                kind = advise & 3
                if kind == NONHEAD:
                    delta = word & 0xFFFF
                    yield _Cluster(NONHEAD, blocks=delta & ~CBLKCNT if delta & CBLKCNT else 0)
                else:
                    yield _Cluster(kind, offset, word, partial=bool(advise & PARTIAL_REF))

    def _compact_clusters(self) -> Iterator[_Cluster]:
        bits = self.header.bits
        if bits > (12 if self.advise & ADVISE_COMPACTED_2B else 14):
            raise self._bad(f"clusters of {1 << bits} bytes are too large for a compact index")
        low_bits = max(bits, CBLKCNT.bit_length())
        big = bool(self.advise & ADVISE_BIG_PCLUSTER_1)
        for start, end, count in _packs(self.reader, self.inode, self.header.index, self.advise):
            size = 8 if count == 2 else 32
            for piece in self._pieces(start, end):
                for at in range(0, len(piece), size):
                    yield from _unpack(piece[at : at + size], count, low_bits, big)

    def _pieces(self, start: int, end: int) -> Iterator[bytes]:
        for at in range(start, end, PIECE_BYTES):
            yield self.reader.source.pread(at, min(PIECE_BYTES, end - at))

    # -- written-down extents (Linux 6.15 and later)

    def _written_extents(self) -> Iterator[ZExtent]:
        """Extents with all their fields, or of one size. Source: zmap.c, z_erofs_map_blocks_ext()."""
        records = self._fixed_records() if self.header.record_size <= 8 else self._free_records()
        previous: tuple[int, int, int] | None = None
        for record in records:
            if previous is None:
                if record[0]:
                    raise self._bad(f"the first extent begins at {record[0]}")
            elif not previous[0] < record[0] < self.inode.size:
                raise self._bad(f"extent at {record[0]} after the one at {previous[0]}")
            else:
                yield self._written(*previous, record[0] - previous[0])
            previous = record
        if previous is None:
            raise self._bad("there is no extent")
        start, plen, offset = previous
        if self.advise & ADVISE_FRAGMENT:
            offset = offset << 32 if self.header.record_size > 4 else 0
            yield self._fragment(start, (plen | offset) & (1 << 64) - 1)
        else:
            yield self._written(start, plen, offset, self.inode.size - start)

    def _written(self, start: int, plen: int, offset: int, length: int) -> ZExtent:
        stored = plen & EXTENT_PLEN_MASK
        if not stored:
            return ZExtent(start, length, 0, 0, HOLE)
        if encoded := plen >> EXTENT_PLEN_FMT_SHIFT:
            method = encoded - 1
            if method > ZSTD:
                raise UnsupportedImage(f"{self.reader.name}: unknown compression algorithm {method}")
        elif self.advise & ADVISE_INTERLACED and not (offset | stored) % self.reader.block_size:
            method = INTERLACED
        else:
            method = SHIFTED
        return ZExtent(start, length, offset, stored, method, bool(plen & EXTENT_PLEN_PARTIAL))

    def _fixed_records(self) -> Iterator[tuple[int, int, int]]:
        at = self.header.index
        start = 0
        if self.header.record_size == 8:
            for piece in self._pieces(at, self.header.index_end):
                for plen, low in struct.iter_unpack("<II", piece):
                    yield start, plen, low
                    start += 1 << self.header.bits
            return
        # Lengths only: the pclusters lie one behind the other.
        position = int.from_bytes(self.reader.source.pread(at, 8), "little")
        for piece in self._pieces(at + 8, self.header.index_end):
            for (plen,) in struct.iter_unpack("<I", piece):
                yield start, plen, position
                position += plen & EXTENT_PLEN_MASK
                start += 1 << self.header.bits

    def _free_records(self) -> Iterator[tuple[int, int, int]]:
        record = struct.Struct("<5I12x" if self.header.record_size == 32 else "<4I")
        for piece in self._pieces(self.header.index, self.header.index_end):
            for plen, low, high, start, *start_high in record.iter_unpack(piece):
                yield start | (start_high[0] << 32 if start_high else 0), plen, low | high << 32
