"""EROFS on disk: numbers and records, little-endian.

Sources: include/erofs_fs.h of erofs-utils 1.9.3 (the same file as Linux fs/erofs/erofs_fs.h) and, for what
the kernel refuses, fs/erofs/{super,inode,data,zmap}.c of Linux 6.18.
"""

from __future__ import annotations

import stat
import struct
from array import array
from dataclasses import dataclass

from erofsd.errors import UnsupportedImage
from erofsd.images.base import ByteSource
from erofsd.images.source import corrupt

SUPER_OFFSET = 1024
SUPER_MAGIC = 0xE0F5E1E2
SUPER = struct.Struct("<3I2BH2Q4I16s16sI3H2BIQ2BHI2Q")
EXTSLOT_SIZE = 16

COMPAT_SB_CHKSUM = 0x00000001
COMPAT_PLAIN_XATTR_PFX = 0x00000010
COMPAT_RAFS = 0x40000000  # Nydus' mark, which the kernel ignores: rafs-v6 1.1

INCOMPAT_ZERO_PADDING = 0x001
INCOMPAT_COMPR_CFGS = 0x002
INCOMPAT_CHUNKED_FILE = 0x004
INCOMPAT_DEVICE_TABLE = 0x008
INCOMPAT_ZTAILPACKING = 0x010
INCOMPAT_FRAGMENTS = 0x020
INCOMPAT_XATTR_PREFIXES = 0x040
INCOMPAT_48BIT = 0x080
INCOMPAT_METABOX = 0x100
# Two names share a bit where one feature came with the other.
INCOMPAT_NAMES = {
    INCOMPAT_ZERO_PADDING: "zero_padding",
    INCOMPAT_COMPR_CFGS: "compr_cfgs, big_pcluster",
    INCOMPAT_CHUNKED_FILE: "chunked_file",
    INCOMPAT_DEVICE_TABLE: "device_table, compr_head2",
    INCOMPAT_ZTAILPACKING: "ztailpacking",
    INCOMPAT_FRAGMENTS: "fragments, dedupe",
    INCOMPAT_XATTR_PREFIXES: "xattr_prefixes",
    INCOMPAT_48BIT: "48bit",
    INCOMPAT_METABOX: "metabox",
}
INCOMPAT_READ = 0x0FF

DEVICE_SLOT = struct.Struct("<64sIIHH52x")

FLAT_PLAIN, COMPRESSED_FULL, FLAT_INLINE, COMPRESSED_COMPACT, CHUNK_BASED = range(5)
INODE_SLOT_SIZE = 32
INODE_COMPACT = struct.Struct("<4H4I2HI")
INODE_EXTENDED = struct.Struct("<4HQ4IqII16x")
I_FORMAT_ALL = 0x1F
I_NLINK_1 = 0x10  # compact, not a directory: nlink is 1 and its field holds address bits

CHUNK_BLKBITS_MASK = 0x1F
CHUNK_INDEXES = 0x20
CHUNK_48BIT = 0x40
CHUNK_FORMAT_ALL = 0x7F

DIRENT = struct.Struct("<QHBB")
NAME_MAX = 255
SYMLINK_MAX = 4096

XATTR_HEADER = struct.Struct("<IB7x")
XATTR_ENTRY = struct.Struct("<BBH")
XATTR_LONG_PREFIX = 0x80
XATTR_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}

# What a chunk or pcluster may be at most: Z_EROFS_PCLUSTER_MAX_SIZE and _DSIZE.
PCLUSTER_MAX_SIZE = 1 << 20
PCLUSTER_MAX_DSIZE = 12 << 20

TYPE_NAMES = {
    stat.S_IFREG: "reg",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "lnk",
    stat.S_IFCHR: "chr",
    stat.S_IFBLK: "blk",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "sock",
}


@dataclass(frozen=True, slots=True)
class DeviceSlot:
    """One extra device.

    Attributes:
        tag: What names the device, as stored: 64 bytes.
        block_count: Blocks on the device; 0 where the writer did not say (mkfs.erofs 1.5).
        mapped_block: First block of the device in the unified address space; 0 means none.
    """

    tag: bytes
    block_count: int
    mapped_block: int


@dataclass(frozen=True, slots=True)
class SuperBlock:
    """The superblock, checked; sizes and addresses in the units their names say.

    Attributes:
        algorithms: Bit set of compression algorithms that may be used.
        configs_offset: Where the compression configurations begin, bytes; they exist if ``algorithms`` came
            with the feature compr_cfgs.
        device_table_offset: Bytes.
        packed_nid: The inode that holds fragments; 0 means none.
    """

    feature_compat: int
    feature_incompat: int
    block_bits: int
    root_nid: int
    inode_count: int
    epoch: int
    fixed_nsec: int
    block_count: int
    meta_block: int
    xattr_block: int
    algorithms: int
    configs_offset: int
    devices: tuple[DeviceSlot, ...]
    device_table_offset: int
    xattr_prefix_count: int
    xattr_prefix_offset: int
    packed_nid: int

    @property
    def block_size(self) -> int:
        """Bytes."""
        return 1 << self.block_bits


def is_erofs(head: bytes) -> bool:
    """True if *head*, the first 1028 bytes or more of something, has the magic of EROFS."""
    return head[SUPER_OFFSET : SUPER_OFFSET + 4] == SUPER_MAGIC.to_bytes(4, "little")


def parse_superblock(source: ByteSource) -> SuperBlock:
    """Read and check the superblock and the device table.

    Raises:
        CorruptImage: No magic, wrong checksum, or a value no kernel accepts.
        UnsupportedImage: A feature we cannot read; names it.

    Source: fs/erofs/super.c, erofs_read_superblock().
    """
    name = source.name
    raw = source.pread(SUPER_OFFSET, SUPER.size)
    # fmt: off
    (magic, checksum, compat, block_bits, extslots, root_2b, inodes, epoch, fixed_nsec, blocks, meta_block,
     xattr_block, _uuid, _volume, incompat, u1, extra_devices, slot_offset, dirblkbits, prefix_count,
     prefix_start, packed_nid, _filter, _ishare, _reserved, _build_time, root_8b, _) = SUPER.unpack(raw)
    # fmt: on
    if magic != SUPER_MAGIC:
        raise corrupt(name, SUPER_OFFSET, "magic", f"{magic:#x} is not EROFS")
    if not 9 <= block_bits <= 16:
        raise corrupt(name, SUPER_OFFSET + 12, "blkszbits", f"{block_bits} is not in 9…16")
    if compat & COMPAT_SB_CHKSUM:
        _check_checksum(source, block_bits, checksum)
    if unread := incompat & ~INCOMPAT_READ:
        names = [INCOMPAT_NAMES.get(1 << i, f"bit {i}") for i in range(32) if unread >> i & 1]
        raise UnsupportedImage(f"{name}: EROFS feature not supported: {'; '.join(names)}")
    if dirblkbits:
        raise corrupt(name, SUPER_OFFSET + 90, "dirblkbits", f"{dirblkbits} is not 0")
    if incompat & INCOMPAT_48BIT and root_8b:
        root_nid, blocks = root_8b, blocks | root_2b << 32
    else:
        root_nid = root_2b
    configured = bool(incompat & INCOMPAT_COMPR_CFGS)
    if configured and u1 >> 4:
        raise UnsupportedImage(f"{name}: unknown compression algorithms in the set {u1:#x}")
    return SuperBlock(
        feature_compat=compat,
        feature_incompat=incompat,
        block_bits=block_bits,
        root_nid=root_nid,
        inode_count=inodes,
        epoch=epoch,
        fixed_nsec=fixed_nsec,
        block_count=blocks,
        meta_block=meta_block,
        xattr_block=xattr_block,
        algorithms=u1 if configured else 1,  # before compr_cfgs there was LZ4 only
        configs_offset=SUPER_OFFSET + SUPER.size + extslots * EXTSLOT_SIZE,
        devices=_parse_devices(source, incompat, extra_devices, slot_offset * DEVICE_SLOT.size),
        device_table_offset=slot_offset * DEVICE_SLOT.size,
        xattr_prefix_count=prefix_count,
        xattr_prefix_offset=prefix_start << 2,
        packed_nid=packed_nid if incompat & INCOMPAT_FRAGMENTS else 0,
    )


def _parse_devices(source: ByteSource, incompat: int, count: int, offset: int) -> tuple[DeviceSlot, ...]:
    if not incompat & INCOMPAT_DEVICE_TABLE or not count:
        return ()
    wide = incompat & INCOMPAT_48BIT
    table = source.pread(offset, count * DEVICE_SLOT.size)
    return tuple(
        DeviceSlot(tag, lo | (hi << 32 if wide else 0), at_lo | (at_hi << 32 if wide else 0))
        for tag, lo, at_lo, hi, at_hi in DEVICE_SLOT.iter_unpack(table)
    )


def _check_checksum(source: ByteSource, block_bits: int, checksum: int) -> None:
    # From the superblock to the end of its block, the field itself as zeros, without a final inversion.
    length = 1 << block_bits
    if length > SUPER_OFFSET:
        length -= SUPER_OFFSET
    block = bytearray(source.pread(SUPER_OFFSET, length))
    block[4:8] = bytes(4)
    if (computed := crc32c(block)) != checksum:
        problem = f"{checksum:#010x}, but the block gives {computed:#010x}"
        raise corrupt(source.name, SUPER_OFFSET + 4, "checksum", problem)


def crc32c(data: bytes | bytearray, crc: int = 0xFFFFFFFF) -> int:
    """CRC-32C (Castagnoli, reflected) as the kernel's crc32c(): no final inversion."""
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc


def _crc_table() -> array[int]:
    table = array("I")
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    return table


_CRC_TABLE = _crc_table()


@dataclass(frozen=True, slots=True)
class Inode:
    """One inode, checked for what can be seen from it alone.

    Attributes:
        offset: Of the inode in the primary, bytes.
        tail: Where its inline data, chunk indexes or cluster indexes may begin (before alignment), bytes.
        layout: FLAT_PLAIN and its kin.
        mode: As in ``st_mode``.
        mtime: Nanoseconds since 1970.
        start_block: First block of flat data; None is a hole.
        word: The union i_u: chunk format, or device number.
    """

    nid: int
    offset: int
    tail: int
    xattr_size: int
    layout: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    mtime: int
    start_block: int | None
    word: int

    @property
    def type(self) -> str:
        """``reg dir lnk chr blk fifo sock``."""
        return TYPE_NAMES[stat.S_IFMT(self.mode)]

    @property
    def rdev(self) -> int:
        """As in ``st_rdev``, which the kernel makes with new_encode_dev(), too; 0 where it means nothing."""
        return self.word if self.type in ("chr", "blk") else 0

    @property
    def compressed(self) -> bool:
        """True if the kernel decompresses its data."""
        return self.layout in (COMPRESSED_FULL, COMPRESSED_COMPACT)


def parse_inode(source: ByteSource, sb: SuperBlock, nid: int) -> Inode:
    """Read inode *nid*.

    Raises:
        CorruptImage: No such place, or a format, mode or size no kernel accepts.

    Source: fs/erofs/inode.c, erofs_read_inode().
    """
    offset = (sb.meta_block << sb.block_bits) + nid * INODE_SLOT_SIZE
    if offset + INODE_COMPACT.size > source.size:
        raise corrupt(source.name, offset, "inode", f"nid {nid} lies past the end")
    raw = source.pread(offset, INODE_COMPACT.size)
    i_format = raw[0] | raw[1] << 8
    layout = i_format >> 1 & 7
    if i_format & ~I_FORMAT_ALL or layout > CHUNK_BASED:
        raise corrupt(source.name, offset, "i_format", f"{i_format:#x} of nid {nid} is unknown")
    if i_format & 1:
        raw += source.pread(offset + INODE_COMPACT.size, INODE_EXTENDED.size - INODE_COMPACT.size)
        isize = INODE_EXTENDED.size
        _, icount, mode, hi, size, word, _, uid, gid, seconds, nsec, nlink = INODE_EXTENDED.unpack(raw)
        none = (1 << 48) - 1
    else:
        isize = INODE_COMPACT.size
        _, icount, mode, hi, size, seconds, word, _, uid, gid, _ = INODE_COMPACT.unpack(raw)
        nlink, none = hi, (1 << 32) - 1
        if i_format & I_NLINK_1 and not stat.S_ISDIR(mode):
            nlink, none = 1, (1 << 48) - 1
        else:
            hi = 0
        seconds, nsec = sb.epoch + seconds, sb.fixed_nsec
    if stat.S_IFMT(mode) not in TYPE_NAMES:
        raise corrupt(source.name, offset + 4, "i_mode", f"{mode:#o} of nid {nid} is no file type")
    if size >> 63:
        raise corrupt(source.name, offset + 8, "i_size", f"{size:#x} of nid {nid} is negative")
    start = word | hi << 32
    xattr_size = XATTR_HEADER.size + 4 * (icount - 1) if icount else 0
    return Inode(
        nid=nid,
        offset=offset,
        tail=offset + isize + xattr_size,
        xattr_size=xattr_size,
        layout=layout,
        mode=mode,
        uid=uid,
        gid=gid,
        nlink=nlink,
        size=size,
        mtime=seconds * 1_000_000_000 + nsec,
        # erofs_init_inode_..: an all-ones address of a plain inode is a hole, however wide it is
        start_block=None if layout == FLAT_PLAIN and start & none == none else start,
        word=word,
    )
