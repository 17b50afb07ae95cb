"""Which bytes of a primary image the kernel reads without asking anybody.

A mount of a plain EROFS image that is filled on demand tells about reads of file data only: metadata that
have not arrived are read as zeros, and the kernel keeps them (measured on Linux 6.18; 7.2 asks for metadata,
too). So everything below must be there before the mount. More than needed is harmless; less is corruption.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from erofsd.images.erofs import format as fmt
from erofsd.images.erofs import zmap
from erofsd.images.erofs.format import Inode
from erofsd.images.erofs.reader import ErofsReader
from erofsd.images.erofs.tree import walk_inodes
from ondemand.ranges import Range, RangeSet

PAGE_SIZE = 4096
_PENDING_MAX = 1 << 16


class _Collector:
    # Ranges come nearly sorted and mostly touch: joining them in bulk keeps the set small and fast.

    def __init__(self, size: int, unit: int) -> None:
        self.size = size
        self.unit = unit
        self.pending: list[tuple[int, int]] = []
        self.found: RangeSet = RangeSet()

    def add(self, start: int, stop: int) -> None:
        self.pending.append((start - start % self.unit, -(-stop // self.unit) * self.unit))
        if len(self.pending) >= _PENDING_MAX:
            self.flush()

    def flush(self) -> None:
        self.pending.sort()
        here: tuple[int, int] | None = None
        for start, stop in self.pending:
            if here and start <= here[1]:
                here = (here[0], max(here[1], stop))
                continue
            self._put(here)
            here = (start, stop)
        self._put(here)
        self.pending.clear()

    def _put(self, r: tuple[int, int] | None) -> None:
        if r:
            self.found.add(Range(*r).clamp(self.size))


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a walk over all inodes shows.

    Attributes:
        ranges: See metadata_ranges.
        compressed: Some file is compressed: the kernel has to decompress.
    """

    ranges: RangeSet
    compressed: bool


def metadata_ranges(reader: ErofsReader) -> RangeSet:
    """Every byte of the primary that the kernel takes for granted, in whole pages (or blocks, if larger).

    Reads all metadata of the image, as a walk over all inodes does.

    Raises:
        CorruptImage: The image cannot be walked to its end.

    Source: erofs_read_metabuf(), erofs_bread() and their callers in fs/erofs of Linux 6.18: super.c, inode.c,
    dir.c, namei.c, xattr.c, data.c (chunk indexes, inline tails), zmap.c, zdata.c (inline pclusters).
    """
    return survey(reader).ranges


def survey(reader: ErofsReader) -> Metadata:
    """Walk over all inodes once.

    Raises:
        As metadata_ranges.
    """
    found = _Collector(reader.source.size, max(PAGE_SIZE, reader.block_size))
    for start, stop in _superblock(reader):
        found.add(start, stop)
    packed = [reader.inode(reader.super.packed_nid)] if reader.super.packed_nid else []
    seen: set[int] = set()  # files with several names, and none of the others
    compressed = False
    for inode in chain((inode for _, inode in walk_inodes(reader)), packed):
        if inode.type != "dir" and inode.nlink != 1:
            if inode.nid in seen:
                continue
            seen.add(inode.nid)
        compressed = compressed or inode.compressed
        for start, stop in _inode(reader, inode):
            found.add(start, stop)
    found.flush()
    return Metadata(found.found, compressed)


def _superblock(reader: ErofsReader) -> Iterator[tuple[int, int]]:
    sb = reader.super
    at = sb.configs_offset
    if sb.feature_incompat & fmt.INCOMPAT_COMPR_CFGS:
        # one record an algorithm: its length in two bytes, aligned to four. z_erofs_parse_cfgs()
        for _ in range(sb.algorithms.bit_count()):
            at = -(-at // 4) * 4
            at += 2 + int.from_bytes(reader.source.pread(at, 2), "little")
    yield 0, at
    if sb.devices:
        yield sb.device_table_offset, sb.device_table_offset + len(sb.devices) * fmt.DEVICE_SLOT.size
    if sb.xattr_prefix_count:
        table = reader.long_prefix_range()
        if reader.prefixes_packed:
            # Read while mounting, as data of the packed inode: nobody answers for data that early.
            for extent in reader.packed.stored(table.start, len(table)):
                yield extent.offset, extent.offset + extent.stored
        else:
            yield table.start, table.stop


def _inode(reader: ErofsReader, inode: Inode) -> Iterator[tuple[int, int]]:
    stop = inode.tail
    if inode.compressed and inode.size:
        header = zmap.map_header(reader, inode)
        stop = header.index_end + header.inline_size
    elif inode.layout == fmt.CHUNK_BASED and inode.size:
        bits, first, unit = reader.chunk_indexes(inode)
        stop = first + unit * ((inode.size + (1 << bits) - 1) >> bits)
    elif inode.layout == fmt.FLAT_INLINE:
        stop = inode.tail + inode.size % reader.block_size
    yield inode.offset, stop
    for shared_id in reader.shared_xattr_ids(inode):
        offset, length = reader.shared_xattr_range(shared_id)
        yield offset, offset + length
    if inode.type in ("dir", "lnk"):
        yield from _contents(reader, inode)


def _contents(reader: ErofsReader, inode: Inode) -> Iterator[tuple[int, int]]:
    if not inode.compressed:
        for flat in reader.extents(inode):
            if flat.offset is not None and not flat.device:
                yield flat.offset, flat.offset + flat.length
        return
    for extent in zmap.extents(reader, inode):
        if extent.method == zmap.FRAGMENT:
            for part in reader.packed.stored(extent.offset, extent.length):
                yield part.offset, part.offset + part.stored
        else:
            yield extent.offset, extent.offset + extent.stored
