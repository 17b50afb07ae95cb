"""EROFS images written by hand, one record at a time: what no tool would make, or none here can."""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass, field

BLOCK = 4096
META_BLOCK = 1
ROOT_NID = 0
TYPES = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFLNK: 7}


def superblock(**fields: int) -> bytes:
    """The first block of an image: 128 bytes at 1024, and zeros."""
    values = {"meta_block": META_BLOCK, "root_nid": ROOT_NID, "block_bits": 12} | fields

    def get(name: str) -> int:
        return values.get(name, 0)

    raw = bytearray(BLOCK)
    struct.pack_into("<III", raw, 1024, 0xE0F5E1E2, get("checksum"), get("compat"))
    struct.pack_into("<BBHQ", raw, 1036, get("block_bits"), get("extslots"), get("root_nid"), 9)
    struct.pack_into("<III", raw, 1060, get("blocks"), get("meta_block"), get("xattr_block"))
    struct.pack_into("<IHHH", raw, 1104, get("incompat"), get("algorithms"), get("devices"), 11)
    struct.pack_into(
        "<BBIQ", raw, 1114, get("dirblkbits"), get("prefixes"), get("prefix_at"), get("packed_nid")
    )
    return bytes(raw)


@dataclass
class Image:
    """A growing image. The first inode made must be the root."""

    super: dict[str, int] = field(default_factory=dict)
    data: bytearray = field(default_factory=lambda: bytearray(BLOCK))

    def inode(
        self,
        mode: int,
        layout: int,
        size: int,
        word: int = 0,
        *,
        tail: bytes = b"",
        nlink: int = 1,
        xattr: bytes = b"",
    ) -> int:
        """Append an extended inode in a block of its own; returns its nid."""
        nid = (len(self.data) - META_BLOCK * BLOCK) // 32
        icount = (len(xattr) - 12) // 4 + 1 if xattr else 0
        self.data += struct.pack(
            "<HHHHQIIIIqII16x", layout << 1 | 1, icount, mode, 0, size, word, 1, 0, 0, 0, 0, nlink
        )
        self.data += xattr + tail
        self.pad()
        return nid

    def block(self, data: bytes) -> int:
        """Append *data*; returns the number of its first block."""
        number = len(self.data) // BLOCK
        self.data += data
        self.pad()
        return number

    def pad(self) -> None:
        """Fill the last block up."""
        self.data += bytes(-len(self.data) % BLOCK)

    def directory(self, nid: int, entries: dict[bytes, tuple[int, int]], parent: int = ROOT_NID) -> None:
        """Give inode *nid*, made as a plain directory of size 0, its names: name to nid and mode."""
        names = {b".": (nid, stat.S_IFDIR), b"..": (parent, stat.S_IFDIR)} | entries
        self.raw_directory(nid, [(name, *names[name]) for name in sorted(names)])

    def raw_directory(self, nid: int, entries: list[tuple[bytes, int, int]]) -> None:
        """As directory, with exactly these entries in this order."""
        offset = 12 * len(entries)
        records, names = b"", b""
        for name, target, mode in entries:
            records += struct.pack("<QHBB", target, offset + len(names), TYPES.get(stat.S_IFMT(mode), 0), 0)
            names += name
        at = META_BLOCK * BLOCK + nid * 32
        block = self.block(records + names)
        struct.pack_into("<Q", self.data, at + 8, len(records) + len(names))
        struct.pack_into("<I", self.data, at + 16, block)

    def root(self) -> int:
        """Append the root directory, still empty."""
        assert len(self.data) == BLOCK
        return self.inode(stat.S_IFDIR | 0o755, 0, 0, nlink=2)

    def finish(self) -> bytes:
        """The image."""
        return superblock(**self.super) + bytes(self.data[BLOCK:])


def one_file(**inode: object) -> bytes:
    """An image with one regular file ``/f``; *inode* as for Image.inode."""
    image = Image(super=inode.pop("super", {}))  # type: ignore[arg-type]
    root = image.root()
    nid = image.inode(stat.S_IFREG | 0o644, **inode)  # type: ignore[arg-type]
    image.directory(root, {b"f": (nid, stat.S_IFREG)})
    return image.finish()
