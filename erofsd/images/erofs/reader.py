"""Reads EROFS images: inodes, directories, extended attributes, where data lie.

Nothing an image says is believed: every address is checked against what it points into, every loop is bounded
by bytes that were really read, and everything wrong is CorruptImage with the place and the field.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

from erofsd.errors import CorruptImage, UnsupportedImage
from erofsd.images.base import ByteSource
from erofsd.images.erofs import compression
from erofsd.images.erofs import format as fmt
from erofsd.images.erofs.format import Inode, SuperBlock
from erofsd.images.source import corrupt
from ondemand.ranges import Range

PIECE_SIZE = 1 << 20
SHARED_XATTR_CACHE = 4 << 20

ReadDevice = Callable[[int, Range], bytes]
"""Gives decoded bytes of an extra device, slots counted from 1; raises what a ByteSource raises."""


class Extent(NamedTuple):
    """Consecutive bytes of a file that lie together.

    Attributes:
        device: Slot; 0 is the primary.
        offset: Bytes on that device; None is a hole.
        length: Bytes.
    """

    device: int
    offset: int | None
    length: int


class Dirent(NamedTuple):
    """A name in a directory; ``.`` and ``..`` are never shown."""

    name: bytes
    nid: int


class ErofsReader:
    """An EROFS image whose superblock is sound.

    Args:
        source: The primary image. Reads are small: wrap what is far away in a PagedSource.
        read_device: Gives the data of extra devices; without it only the primary's data can be read.
        flat: The extra devices are appended to the primary, at the addresses in the device table. So the
            kernel takes it when an image with a device table is mounted without devices.
    """

    def __init__(
        self, source: ByteSource, read_device: ReadDevice | None = None, *, flat: bool = False
    ) -> None:
        self.source = source
        self.name = source.name
        self.super: SuperBlock = fmt.parse_superblock(source)
        self.block_size = self.super.block_size
        # fs/erofs/super.c: device ids are masked before they are used
        self._device_mask = (1 << len(self.super.devices).bit_length()) - 1
        self._read_device = read_device
        self.flat = flat
        self._shared: dict[int, tuple[bytes, bytes] | None] = {}
        self._shared_size = 0

    # -- inodes and names

    def inode(self, nid: int) -> Inode:
        """The inode *nid*.

        Raises:
            CorruptImage: There is none.
        """
        return fmt.parse_inode(self.source, self.super, nid)

    @cached_property
    def root(self) -> Inode:
        """The root directory."""
        root = self.inode(self.super.root_nid)
        if root.type != "dir":
            raise corrupt(self.name, root.offset + 4, "i_mode", f"root nid {root.nid} is not a directory")
        return root

    def target(self, inode: Inode) -> bytes:
        """Where the symbolic link *inode* points."""
        if not 0 < inode.size <= fmt.SYMLINK_MAX:
            raise corrupt(self.name, inode.offset + 8, "i_size", f"a link of {inode.size} bytes")
        return b"".join(self.content(inode))

    def entries(self, directory: Inode) -> Iterator[Dirent]:
        """The names in *directory*, sorted bytewise as the kernel's binary search wants them.

        Raises:
            CorruptImage: Names out of order, twice, empty, too long, or with a NUL or slash in them.

        Source: fs/erofs/dir.c, erofs_readdir(); fs/erofs/namei.c, erofs_find_target_block().
        """
        previous = b""
        position = 0
        for block in self._blocks(directory):
            for dirent in self._parse_block(directory, position, block):
                if dirent.name <= previous:
                    raise self._bad_dirent(directory, position, f"{dirent.name!r} after {previous!r}")
                previous = dirent.name
                if previous not in (b".", b".."):
                    yield dirent
            position += len(block)

    def _blocks(self, inode: Inode) -> Iterator[bytes]:
        left = b""
        for piece in self.content(inode):
            left = left + piece if left else piece
            whole = len(left) - len(left) % self.block_size
            for at in range(0, whole, self.block_size):
                yield left[at : at + self.block_size]
            left = left[whole:]
        if left:
            yield left

    def _parse_block(self, directory: Inode, position: int, block: bytes) -> Iterator[Dirent]:
        if len(block) < fmt.DIRENT.size:
            raise self._bad_dirent(directory, position, "block is shorter than one entry")
        names = block[8] | block[9] << 8
        if not names or names % fmt.DIRENT.size or names > len(block):
            raise self._bad_dirent(directory, position, f"nameoff {names} of the first entry")
        records = list(fmt.DIRENT.iter_unpack(block[:names]))
        for i, (nid, start, _, _) in enumerate(records):
            if i + 1 < len(records):
                stop = records[i + 1][1]
            else:
                stop = block.find(b"\0", start)
                stop = len(block) if stop < 0 else stop
            if not (names <= start < stop <= len(block)) or stop - start > fmt.NAME_MAX:
                raise self._bad_dirent(directory, position, f"name {i} is [{start}, {stop})")
            name = block[start:stop]
            if b"\0" in name or b"/" in name:
                raise self._bad_dirent(directory, position, f"name {i} is {name!r}")
            yield Dirent(name, nid)

    def _bad_dirent(self, directory: Inode, position: int, problem: str) -> CorruptImage:
        where = f"dirent of nid {directory.nid}, byte {position} of its data"
        return corrupt(self.name, directory.offset, where, problem)

    # -- extended attributes

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """Full names to values, as listxattr and getxattr of the kernel would show them to root.

        Source: fs/erofs/xattr.c, erofs_init_inode_xattrs(), erofs_xattr_iter_inline(), _shared().
        """
        if not inode.xattr_size:
            return {}
        offset = inode.tail - inode.xattr_size
        area = self.source.pread(offset, inode.xattr_size)
        _, shared_count = fmt.XATTR_HEADER.unpack_from(area)
        at = fmt.XATTR_HEADER.size + 4 * shared_count
        if at > len(area):
            raise corrupt(self.name, offset + 4, "h_shared_count", f"{shared_count} ids in {len(area)} bytes")
        found: dict[bytes, bytes] = {}
        ids = _words(area[fmt.XATTR_HEADER.size : at])
        while at < len(area):
            size, pair = self._parse_xattr(area, at, offset)
            at += size
            if pair:
                found.setdefault(*pair)  # the kernel takes the first match, inline before shared
        for shared_id in ids:
            if pair := self._shared_xattr(shared_id):
                found.setdefault(*pair)
        return found

    def _parse_xattr(self, area: bytes, at: int, offset: int) -> tuple[int, tuple[bytes, bytes] | None]:
        """One entry: how many bytes it takes, and name and value unless nobody knows its prefix."""
        if at + fmt.XATTR_ENTRY.size > len(area):
            raise corrupt(self.name, offset + at, "xattr entry", "reaches past its area")
        name_size, index, value_size = fmt.XATTR_ENTRY.unpack_from(area, at)
        start = at + fmt.XATTR_ENTRY.size
        stop = start + name_size + value_size
        if stop > len(area):
            raise corrupt(self.name, offset + at, "xattr entry", "reaches past its area")
        prefix = self._xattr_prefix(index, offset + at)
        size = -(-(stop - at) // 4) * 4
        if prefix is None:
            return size, None
        return size, (prefix + area[start : start + name_size], area[start + name_size : stop])

    def _shared_xattr(self, shared_id: int) -> tuple[bytes, bytes] | None:
        if shared_id in self._shared:
            return self._shared[shared_id]
        offset, length = self.shared_xattr_range(shared_id)
        _, pair = self._parse_xattr(self.source.pread(offset, length), 0, offset)
        if self._shared_size < SHARED_XATTR_CACHE:
            self._shared[shared_id] = pair
            self._shared_size += length + 100
        return pair

    def shared_xattr_ids(self, inode: Inode) -> Sequence[int]:
        """Which shared entries *inode* refers to."""
        if not inode.xattr_size:
            return ()
        offset = inode.tail - inode.xattr_size
        _, count = fmt.XATTR_HEADER.unpack(self.source.pread(offset, fmt.XATTR_HEADER.size))
        if fmt.XATTR_HEADER.size + 4 * count > inode.xattr_size:
            raise corrupt(self.name, offset + 4, "h_shared_count", f"{count} ids in {inode.xattr_size} bytes")
        return _words(self.source.pread(offset + fmt.XATTR_HEADER.size, 4 * count))

    def shared_xattr_range(self, shared_id: int) -> tuple[int, int]:
        """Offset and length in the primary of one shared entry."""
        offset = (self.super.xattr_block << self.super.block_bits) + 4 * shared_id
        name_size, _, value_size = fmt.XATTR_ENTRY.unpack(self.source.pread(offset, fmt.XATTR_ENTRY.size))
        return offset, fmt.XATTR_ENTRY.size + name_size + value_size

    def _xattr_prefix(self, index: int, offset: int) -> bytes | None:
        if not index & fmt.XATTR_LONG_PREFIX:
            return fmt.XATTR_PREFIXES.get(index)
        long_index = index & ~fmt.XATTR_LONG_PREFIX
        if long_index >= len(self.long_prefixes):
            raise corrupt(self.name, offset + 1, "e_name_index", f"long prefix {long_index} does not exist")
        return self.long_prefixes[long_index]

    @cached_property
    def long_prefixes(self) -> tuple[bytes | None, ...]:
        """The table of long name prefixes; None where the base is unknown.

        Source: fs/erofs/xattr.c, erofs_xattr_prefixes_init().
        """
        return tuple(prefix for prefix, _ in self._long_prefixes())

    @property
    def prefixes_packed(self) -> bool:
        """True if the prefix table lies in the packed inode instead of the primary."""
        return bool(self.super.packed_nid) and not self.super.feature_compat & fmt.COMPAT_PLAIN_XATTR_PFX

    def long_prefix_range(self) -> Range:
        """Bytes of the prefix table, in the primary or (``prefixes_packed``) in the packed inode."""
        ends = [end for _, end in self._long_prefixes()]
        return Range(self.super.xattr_prefix_offset, ends[-1] if ends else self.super.xattr_prefix_offset)

    def _long_prefixes(self) -> Iterator[tuple[bytes | None, int]]:
        at = self.super.xattr_prefix_offset
        for _ in range(self.super.xattr_prefix_count):
            at = -(-at // 4) * 4
            size = int.from_bytes(self._read_prefix(at, 2), "little")
            if not 1 <= size <= fmt.NAME_MAX + 1:
                raise corrupt(self.name, at, "xattr prefix", f"{size} bytes long")
            item = self._read_prefix(at + 2, size)
            at += 2 + size
            base = fmt.XATTR_PREFIXES.get(item[0])
            yield (None if base is None else base + item[1:]), at

    def _read_prefix(self, offset: int, length: int) -> bytes:
        if self.prefixes_packed:
            return self.packed.read(offset, length)
        return self.source.pread(offset, length)

    # -- data

    def content(self, inode: Inode) -> Iterator[bytes]:
        """The bytes of *inode* in pieces of at most 1 MiB; holes as zeros."""
        if inode.compressed:
            yield from compression.content(self, inode)
            return
        for extent in self.extents(inode):
            for at in range(0, extent.length, PIECE_SIZE):
                length = min(PIECE_SIZE, extent.length - at)
                if extent.offset is None:
                    yield bytes(length)
                else:
                    yield self.read(extent.device, extent.offset + at, length)

    @cached_property
    def packed(self) -> compression.PackedFile:
        """The inode that holds the fragments of other files."""
        return compression.PackedFile(self, self.inode(self.super.packed_nid))

    def read(self, device: int, offset: int, length: int) -> bytes:
        """Bytes of a device, after ``locate``."""
        if device == 0:
            return self.source.pread(offset, length)
        if self._read_device is None:
            raise UnsupportedImage(f"{self.name}: data lie on device {device}, which is not at hand")
        return self._read_device(device, Range.of(offset, length))

    def extents(self, inode: Inode) -> Iterator[Extent]:
        """Where the data of an uncompressed inode lie, in order and without gaps; each extent is in bounds.

        Source: fs/erofs/data.c, erofs_map_blocks().
        """
        if inode.layout == fmt.CHUNK_BASED:
            yield from self.chunk_extents(inode)
            return
        if inode.layout == fmt.FLAT_PLAIN and inode.start_block is None:
            if inode.size:
                yield Extent(0, None, inode.size)
            return
        flat = inode.size
        if inode.layout == fmt.FLAT_INLINE and inode.size:
            flat = (inode.size - 1) // self.block_size * self.block_size
        if flat:
            assert inode.start_block is not None  # None is for plain inodes only
            yield self.locate(inode, 0, inode.start_block << self.super.block_bits, flat)
        if inode.size > flat:
            tail = inode.size - flat
            if inode.tail % self.block_size + tail > self.block_size:
                raise corrupt(
                    self.name, inode.tail, "inline data", f"of nid {inode.nid} cross a block boundary"
                )
            yield Extent(0, inode.tail, tail)

    def chunk_indexes(self, inode: Inode) -> tuple[int, int, int]:
        """Of a chunk-based inode: log2 of the chunk size, offset of its index and bytes of one entry.

        Raises:
            CorruptImage: Unknown format, or the index reaches past the end of the image.
        """
        word = inode.word & 0xFFFF
        if word & ~fmt.CHUNK_FORMAT_ALL:
            raise corrupt(
                self.name, inode.offset + 16, "i_u.c.format", f"{word:#x} of nid {inode.nid} is unknown"
            )
        bits = self.super.block_bits + (word & fmt.CHUNK_BLKBITS_MASK)
        unit = 8 if word & fmt.CHUNK_INDEXES else 4
        first = -(-inode.tail // unit) * unit
        count = (inode.size + (1 << bits) - 1) >> bits
        if first + count * unit > self.source.size:
            raise corrupt(
                self.name, first, "chunk index", f"{count} entries of nid {inode.nid} reach past the end"
            )
        return bits, first, unit

    def chunk_extents(self, inode: Inode) -> Iterator[Extent]:
        """Where a chunk-based file lies, as the kernel reads its index; neighbours are joined."""
        return joined(self._chunk_extents(inode))

    def _chunk_extents(self, inode: Inode) -> Iterator[Extent]:
        bits, first, unit = self.chunk_indexes(inode)
        left = inode.size
        for device, block in self._chunk_entries(inode, first, unit, (left + (1 << bits) - 1) >> bits):
            length = min(left, 1 << bits)
            left -= length
            if block is None:
                yield Extent(0, None, length)
            else:
                yield self.locate(inode, device, block << self.super.block_bits, length)

    def _chunk_entries(
        self, inode: Inode, first: int, unit: int, count: int
    ) -> Iterator[tuple[int, int | None]]:
        wide = inode.word & fmt.CHUNK_48BIT
        for start in range(0, count, 4096):
            some = self.source.pread(first + start * unit, min(4096, count - start) * unit)
            if unit == 4:
                for block in _words(some):
                    yield 0, None if block == 0xFFFFFFFF else block
                continue
            for (word,) in struct.iter_unpack("<Q", some):  # u16 block high bits, u16 device, u32 block
                block, hole = word >> 32, 0xFFFFFFFF
                if wide:
                    block, hole = block | (word & 0xFFFF) << 32, 0xFFFFFFFFFFFF
                yield word >> 16 & self._device_mask, None if block == hole else block

    def locate(self, inode: Inode, device: int, offset: int, length: int) -> Extent:
        """Find the device of an address and check that it holds *length* bytes there.

        Addresses on device 0 may lie in the unified address space of all devices. Where the devices are
        appended to the primary (``flat``), that is where all addresses lie.

        Source: fs/erofs/data.c, erofs_map_dev().
        """
        slots = self.super.devices
        if device > len(slots):
            raise corrupt(self.name, inode.offset, "device id", f"{device} of nid {inode.nid} does not exist")
        bits = self.super.block_bits
        if self.flat and device:
            device, offset = 0, offset + (slots[device - 1].mapped_block << bits)
        elif not device and not self.flat:
            for i, slot in enumerate(slots):
                start = slot.mapped_block << bits
                if slot.mapped_block and start <= offset < start + (slot.block_count << bits):
                    device, offset = i + 1, offset - start
                    break
        size = slots[device - 1].block_count << bits if device else self.source.size
        if offset + length > size and (size or not device):
            problem = f"{length} bytes of nid {inode.nid} at {offset} of device {device}, which has {size}"
            raise corrupt(self.name, inode.offset, "block address", problem)
        return Extent(device, offset, length)


def joined(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same bytes in as few extents as possible."""
    pending: Extent | None = None
    for extent in extents:
        if pending is None:
            pending = extent
        elif extent[:2] == (pending.device, _after(pending)):
            pending = Extent(pending.device, pending.offset, pending.length + extent.length)
        else:
            yield pending
            pending = extent
    if pending is not None:
        yield pending


def _after(extent: Extent) -> int | None:
    return None if extent.offset is None else extent.offset + extent.length


def _words(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 4}I", data)
