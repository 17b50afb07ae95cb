"""Encodes EROFS records: inodes, directories, extended attributes, superblock. Pure functions.

What is encoded here ``erofsd.images.erofs.reader`` reads; the structs are shared. Source: include/erofs_fs.h
of erofs-utils 1.9.3; fs/erofs of Linux 6.18 for what a kernel demands.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence

from erofsd.images.erofs import format as fmt
from erofsd.images.tree import Node

BLOCK_BITS = 12
BLOCK_SIZE = 1 << BLOCK_BITS
NULL_BLOCK = 0xFFFFFFFF
XATTR_VALUE_MAX = 0xFFFF
XATTR_AREA_MAX = fmt.XATTR_HEADER.size + 4 * (0xFFFF - 1)

FILE_TYPES = {"reg": 1, "dir": 2, "chr": 3, "blk": 4, "fifo": 5, "sock": 6, "lnk": 7}
_MODES = {name: mode for mode, name in fmt.TYPE_NAMES.items()}
_PREFIXES = sorted(((prefix, index) for index, prefix in fmt.XATTR_PREFIXES.items()), reverse=True)


# -- extended attributes


def refused_xattrs(xattrs: Mapping[bytes, bytes]) -> dict[bytes, str]:
    """Which of *xattrs* EROFS cannot hold, and why: to be dropped with a warning before they are written."""
    refused: dict[bytes, str] = {}
    size = fmt.XATTR_HEADER.size
    for name in sorted(xattrs):
        index, suffix = _split_name(name)
        whole = index in (2, 3)
        if not index or bool(suffix) == whole or b"\0" in name:
            refused[name] = "EROFS has no such namespace"
        elif len(suffix) > fmt.NAME_MAX:
            refused[name] = f"the name has over {fmt.NAME_MAX} bytes"
        elif len(xattrs[name]) > XATTR_VALUE_MAX:
            refused[name] = f"the value has over {XATTR_VALUE_MAX} bytes"
        elif size + _entry_size(suffix, xattrs[name]) > XATTR_AREA_MAX:
            refused[name] = f"the attributes of the file take over {XATTR_AREA_MAX} bytes"
        else:
            size += _entry_size(suffix, xattrs[name])
    return refused


def _split_name(name: bytes) -> tuple[int, bytes]:
    for prefix, index in _PREFIXES:
        if name.startswith(prefix):
            return index, name[len(prefix) :]
    return 0, name


def _entry_size(suffix: bytes, value: bytes) -> int:
    return -(-(fmt.XATTR_ENTRY.size + len(suffix) + len(value)) // 4) * 4


def xattr_entry(name: bytes, value: bytes) -> bytes:
    """One entry, padded to 4 bytes. Source: fs/erofs/xattr.h, struct erofs_xattr_entry."""
    index, suffix = _split_name(name)
    raw = fmt.XATTR_ENTRY.pack(len(suffix), index, len(value)) + suffix + value
    return raw + bytes(-len(raw) % 4)


def xattr_area(xattrs: Mapping[bytes, bytes], shared: Sequence[int] = ()) -> bytes:
    """What follows an inode with *xattrs*, and with the *shared* ones by their ids; empty without any.

    Raises:
        ValueError: Some that ``refused_xattrs`` names.
    """
    if not xattrs and not shared:
        return b""
    parts = [fmt.XATTR_HEADER.pack(0, len(shared)), *(number.to_bytes(4, "little") for number in shared)]
    if refused := refused_xattrs(xattrs):
        raise ValueError(f"extended attributes that EROFS cannot hold: {refused}")
    parts += [xattr_entry(name, xattrs[name]) for name in sorted(xattrs)]
    return b"".join(parts)


def xattr_area_size(xattrs: Mapping[bytes, bytes], shared: int = 0) -> int:
    """Bytes of ``xattr_area``."""
    if not xattrs and not shared:
        return 0
    size = fmt.XATTR_HEADER.size + 4 * shared
    return size + sum(_entry_size(_split_name(name)[1], value) for name, value in xattrs.items())


# -- inodes


def inode(
    node: Node,
    *,
    compact: bool,
    layout: int,
    xattr_size: int,
    size: int,
    word: int,
    serial: int,
    nlink: int,
) -> bytes:
    """One inode.

    Args:
        compact: 32 bytes; the caller has checked ``fits_compact``.
        size: i_size; of a directory, of its data.
        word: The union i_u; of a device node it is made here.
        serial: i_ino, for 32-bit stat; informational.
    """
    i_format = layout << 1 | (0 if compact else 1)
    icount = (xattr_size - fmt.XATTR_HEADER.size) // 4 + 1 if xattr_size else 0
    mode = _MODES[node.type] | node.mode
    if node.type in ("chr", "blk"):
        word = node.rdev  # st_rdev of Linux is new_encode_dev() as long as it has 32 bits
    if compact:
        return fmt.INODE_COMPACT.pack(
            i_format, icount, mode, nlink, size, 0, word, serial, node.uid, node.gid, 0
        )
    seconds, nsec = divmod(node.mtime, 1_000_000_000)  # before 1970, too, nanoseconds count forward
    return fmt.INODE_EXTENDED.pack(
        i_format, icount, mode, 0, size, word, serial, node.uid, node.gid, seconds, nsec, nlink
    )


def fits_compact(node: Node, size: int, nlink: int, mtime: int) -> bool:
    """True if 32 bytes can say all of *node* in a file system whose one time is *mtime*."""
    return node.mtime == mtime and size < 1 << 32 and max(node.uid, node.gid, nlink) < 1 << 16


# -- directories


def directory_names(node: Node) -> list[bytes]:
    """The names in a directory as they are stored: with ``.`` and ``..``, which are sorted like others."""
    return sorted((b".", b"..", *node.children))


def directory_blocks(names: Sequence[bytes]) -> tuple[list[int], int]:
    """Where the blocks of a directory begin, as indexes of *names*, and the size of all its data in bytes.

    No entry straddles a block. Source: fs/erofs/dir.c; the same greedy rule in mkfs.erofs and Nydus.
    """
    starts, used = [0], 0
    for i, name in enumerate(names):
        need = fmt.DIRENT.size + len(name)
        if used + need > BLOCK_SIZE:
            starts.append(i)
            used = 0
        used += need
    return starts, (len(starts) - 1) * BLOCK_SIZE + used


def directory_block(entries: Sequence[tuple[bytes, int, int]]) -> bytes:
    """One block of a directory, without padding.

    Args:
        entries: Name, nid and file type.
    """
    at = fmt.DIRENT.size * len(entries)
    records = bytearray()
    for name, nid, file_type in entries:
        records += fmt.DIRENT.pack(nid, at, file_type, 0)
        at += len(name)
    return bytes(records) + b"".join([entry[0] for entry in entries])


# -- chunk indexes


def chunk_format(chunk_size: int) -> int:
    """The format word of a file with an index of 8 bytes a chunk.

    Source: fs/erofs/erofs_fs.h, struct erofs_inode_chunk_info.
    """
    return (chunk_size.bit_length() - 1 - BLOCK_BITS) | fmt.CHUNK_INDEXES


# -- superblock


def superblock(
    *,
    feature_compat: int,
    feature_incompat: int,
    root_nid: int,
    inode_count: int,
    mtime: int = 0,
    block_count: int,
    meta_block: int,
    xattr_block: int = 0,
    device_count: int = 0,
    device_slot: int = 0,
) -> bytes:
    """The 128 bytes at offset 1024, without checksum.

    Args:
        mtime: Of compact inodes, nanoseconds since 1970.
        block_count: Of the primary (EROFS) or of all devices (RAFS).
        device_slot: Offset of the device table in units of 128 bytes.
    """
    seconds, nsec = divmod(mtime, 1_000_000_000)
    # fmt: off
    return fmt.SUPER.pack(
        fmt.SUPER_MAGIC, 0, feature_compat, BLOCK_BITS, 0, root_nid, inode_count, seconds, nsec, block_count,
        meta_block, xattr_block, bytes(16), bytes(16), feature_incompat, 0, device_count, device_slot,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    )
    # fmt: on


def with_checksum(block: bytes) -> bytes:
    """The first block of an image, with the superblock's checksum. Source: fs/erofs/super.c, 6.18."""
    covered = bytearray(block)
    at = fmt.SUPER_OFFSET + 4
    covered[at : at + 4] = bytes(4)
    covered[at : at + 4] = fmt.crc32c(covered[fmt.SUPER_OFFSET :]).to_bytes(4, "little")
    return bytes(covered)


def device_slot(tag: bytes, block_count: int, mapped_block: int) -> bytes:
    """The 128 bytes for one extra device."""
    return fmt.DEVICE_SLOT.pack(tag, block_count, mapped_block, 0, 0)


def mapped_blocks(end: int, block_counts: Sequence[int]) -> Iterator[int]:
    """Where devices would begin if all were concatenated behind a primary of *end* bytes, in blocks.

    On 512 KiB each, as Nydus does (rafs-v6 1.8); whoever exports the image as one disk relies on it.
    """
    unit = 0x80000 // BLOCK_SIZE
    at = -(-end // BLOCK_SIZE)
    for count in block_counts:
        at = -(-at // unit) * unit
        yield at
        at += count


def little_endian(words: array[int]) -> bytes:
    """The bytes of *words* as they lie on disk."""
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
