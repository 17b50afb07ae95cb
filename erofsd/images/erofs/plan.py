"""Decides where everything of a file tree goes in an EROFS image, before a byte is written.

Two zones follow one another: inodes (with attributes, chunk indexes and inline tails behind each), and whole
blocks of directories and long symbolic links. The inodes of one directory are neighbours, so that ``ls -l``
reads few blocks. What has an inline tail may not cross a block boundary; the gap which that leaves is filled
with what comes later. Gaps older than ``WINDOW`` are given up, so the image can be written front to back.

Nodes are numbered and everything about them is kept in columns: about 45 bytes a node.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from erofsd.images.erofs import encode
from erofsd.images.erofs import format as fmt
from erofsd.images.erofs.encode import BLOCK_SIZE
from erofsd.images.tree import NAME_MAX, TARGET_MAX, Node

WINDOW = 1 << 16
_GAPS_MAX = 8
# No inode gets number 0: readdir() of libc takes that for a deleted entry. So the first inode lies one block
# behind where numbers start; the root, whose number has only 16 bits in the superblock, goes first.
FIRST_NID = BLOCK_SIZE // fmt.INODE_SLOT_SIZE


class Shape(NamedTuple):
    """What an inode needs.

    Attributes:
        size: i_size.
        xattr_size: Bytes of attributes behind the inode.
        tail: Bytes behind those: an inline tail, or (aligned to 8 by the plan) a chunk index.
        block_count: Of blocks in the second zone.
    """

    compact: bool
    layout: int
    size: int
    xattr_size: int = 0
    tail: int = 0
    block_count: int = 0


class Style(Protocol):
    """What distinguishes one kind of EROFS image from another."""

    def compact(self, node: Node, size: int, nlink: int) -> bool:
        """True if *node*, with that i_size, shall have an inode of 32 bytes."""
        ...

    def xattr_size(self, node: Node) -> int:
        """Bytes of ``xattrs``."""
        ...

    def xattrs(self, node: Node) -> bytes:
        """What lies behind the inode of *node* for its extended attributes."""
        ...

    def file_shape(self, node: Node, nlink: int) -> Shape:
        """The shape of a regular file."""
        ...

    def file_body(self, node: Node, layout: int) -> tuple[int, bytes]:
        """The union i_u of a regular file of that layout, and its inline tail or chunk index.

        Asked for once, in the order of numbers: the moment to write the file's data elsewhere.
        """
        ...


class Numbering:
    """Every inode of a tree once, in the order of the image.

    Attributes:
        nodes: By number; the root is 0, children follow one another sorted by name.
        nlink: By number: names of a file, or two and one a subdirectory.
        parent: By number: of a directory the directory that it is in.

    Raises:
        ValueError: A name, link target or shape of tree that no file system has: a mistake of the caller.
    """

    def __init__(self, root: Node) -> None:
        self.nodes: list[Node] = [root]
        self.nlink = array("I", [2])
        self.parent = array("I", [0])
        if root.type != "dir":
            raise ValueError(f"the root is a {root.type}")
        root.number = 0
        waiting = [root]
        while waiting:
            directory = waiting.pop()
            below = [child for child in self._children(directory) if child.type == "dir"]
            self.nlink[directory.number] += len(below)
            waiting += reversed(below)

    def known(self, node: Node) -> bool:
        """True if *node* is in this tree: another writer may have left it a number."""
        return node.number < len(self.nodes) and self.nodes[node.number] is node

    def _children(self, directory: Node) -> Iterator[Node]:
        for name in sorted(directory.children):
            child = directory.children[name]
            _check(name, child)
            if self.known(child):
                if child.type == "dir":
                    raise ValueError(f"a directory with two names: {name!r}")
                self.nlink[child.number] += 1
                continue
            child.number = len(self.nodes)
            self.nodes.append(child)
            self.nlink.append(2 if child.type == "dir" else 1)
            self.parent.append(directory.number)
            yield child


def _check(name: bytes, node: Node) -> None:
    if not 0 < len(name) <= NAME_MAX or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise ValueError(f"no file can be called {name!r}")
    if node.type == "lnk" and (not 0 < len(node.target) <= TARGET_MAX or b"\0" in node.target):
        raise ValueError(f"{name!r}: no link can point to {node.target!r}")


class _Allocator:
    """Gives out places in the zone of inodes."""

    def __init__(self) -> None:
        self.end = 0
        self._gaps: list[tuple[int, int]] = []

    def place(self, header: int, size: int, whole: bool) -> int:
        """A place for *size* bytes, aligned to 32, whose first *header* bytes lie in one block.

        Args:
            whole: All of it lies in one block.
        """
        for i, (start, stop) in enumerate(self._gaps):
            if stop - start >= size and self.end - start <= WINDOW:
                self._keep(i, _aligned(start + size), stop)
                return start
        start = self.end
        room = BLOCK_SIZE - start % BLOCK_SIZE
        if room < (size if whole else header):
            self._gaps = [*self._gaps[1 - _GAPS_MAX :], (start, start + room)]
            start += room
        self.end = _aligned(start + size)
        return start

    def _keep(self, i: int, start: int, stop: int) -> None:
        if stop - start >= fmt.INODE_COMPACT.size:
            self._gaps[i] = (start, stop)
        else:
            del self._gaps[i]


def _aligned(size: int) -> int:
    return -(-size // fmt.INODE_SLOT_SIZE) * fmt.INODE_SLOT_SIZE


class Plan:
    """Where the inodes of a tree go, and their shapes, in columns by number.

    Attributes:
        offset: In the zone of inodes, bytes.
        block: First block in the second zone, counted from its beginning.
        inode_size: Of the zone of inodes, bytes, in whole blocks.
        block_count: Of the second zone.
    """

    def __init__(self, numbering: Numbering, style: Style) -> None:
        self.nodes, self.nlink, self.parent = numbering.nodes, numbering.nlink, numbering.parent
        self.offset = array("Q")
        self.block = array("I")
        self.size = array("Q")
        self.xattr_size = array("I")
        self.layout = bytearray()
        self.compact = bytearray()
        self.block_count = 0
        allocator = _Allocator()
        for number, node in enumerate(self.nodes):
            nlink = self.nlink[number]
            if node.type == "reg":
                shape = style.file_shape(node, nlink)
            else:
                size = _flat_size(node)
                shape = flat_shape(size, style.compact(node, size, nlink), style.xattr_size(node))
            self._add(allocator, shape)
        self.inode_size = -(-allocator.end // BLOCK_SIZE) * BLOCK_SIZE

    def _add(self, allocator: _Allocator, shape: Shape) -> None:
        header = (fmt.INODE_COMPACT if shape.compact else fmt.INODE_EXTENDED).size
        behind = header + shape.xattr_size
        if shape.layout == fmt.CHUNK_BASED:
            behind = -(-behind // 8) * 8
        inline = shape.layout == fmt.FLAT_INLINE
        self.offset.append(allocator.place(header, behind + shape.tail, inline))
        self.block.append(self.block_count)
        self.size.append(shape.size)
        self.xattr_size.append(shape.xattr_size)
        self.layout.append(shape.layout)
        self.compact.append(shape.compact)
        self.block_count += shape.block_count

    def nid(self, number: int) -> int:
        """The number by which directories name an inode."""
        return FIRST_NID + self.offset[number] // fmt.INODE_SLOT_SIZE


def _flat_size(node: Node) -> int:
    if node.type == "dir":
        return encode.directory_blocks(encode.directory_names(node))[1]
    return len(node.target) if node.type == "lnk" else 0


def flat_shape(size: int, compact: bool, xattr_size: int) -> Shape:
    """The last bytes of *size* go behind the inode where all of that fits into one block."""
    header = (fmt.INODE_COMPACT if compact else fmt.INODE_EXTENDED).size
    tail = size % BLOCK_SIZE
    if tail and header + xattr_size + tail <= BLOCK_SIZE:
        return Shape(compact, fmt.FLAT_INLINE, size, xattr_size, tail, size // BLOCK_SIZE)
    return Shape(compact, fmt.FLAT_PLAIN, size, xattr_size, 0, -(-size // BLOCK_SIZE))
