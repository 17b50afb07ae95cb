"""Writes the two zones of a planned EROFS image: inodes, and whole blocks of directories and links."""

from __future__ import annotations

from collections.abc import Callable

from erofsd.images.erofs import encode
from erofsd.images.erofs import format as fmt
from erofsd.images.erofs.encode import BLOCK_SIZE
from erofsd.images.erofs.plan import WINDOW, Plan, Style
from erofsd.images.tree import Node

_FLUSH = 1 << 20

Write = Callable[[bytes], object]
"""Takes all of the bytes that it is given, in order."""


class NearlySequential:
    """Writes records that come nearly in order: at most ``WINDOW`` behind the furthest.

    Args:
        write: Takes the bytes from *start* on, in order.
        start: Offset of the first byte.
    """

    def __init__(self, write: Write, start: int) -> None:
        self._write = write
        self._start = start
        self._buffer = bytearray()

    def put(self, offset: int, data: bytes) -> None:
        """Write *data* at *offset*; what lies between records is zeros."""
        at = offset - self._start
        if at < 0:
            raise ValueError(f"{offset} has been written already")
        if at > len(self._buffer):
            self._buffer += bytes(at - len(self._buffer))
        self._buffer[at : at + len(data)] = data
        if len(self._buffer) > _FLUSH + 2 * WINDOW:
            self._flush(len(self._buffer) - 2 * WINDOW)

    def finish(self, end: int) -> None:
        """Write all that is left, and zeros up to *end*."""
        self._buffer += bytes(end - self._start - len(self._buffer))
        self._flush(len(self._buffer))

    def _flush(self, size: int) -> None:
        self._write(bytes(memoryview(self._buffer)[:size]))
        del self._buffer[:size]
        self._start += size


def write_inodes(plan: Plan, style: Style, start: int, write: Write) -> None:
    """Write the zone of inodes, which begins at *start* of the image; directory blocks follow it."""
    out = NearlySequential(write, start)
    first_block = (start + plan.inode_size) // BLOCK_SIZE
    for number, node in enumerate(plan.nodes):
        word, tail = 0, b""
        if node.type == "reg":
            word, tail = style.file_body(node, plan.layout[number])
        elif node.type in ("dir", "lnk"):
            word = first_block + plan.block[number]
            if plan.layout[number] == fmt.FLAT_INLINE:
                tail = _last_block(plan, number, node)
        head = encode.inode(
            node,
            compact=bool(plan.compact[number]),
            layout=plan.layout[number],
            xattr_size=plan.xattr_size[number],
            size=plan.size[number],
            word=word,
            serial=number + 1,
            nlink=plan.nlink[number],
        )
        head += style.xattrs(node)
        if plan.layout[number] == fmt.CHUNK_BASED:
            head += bytes(-len(head) % 8)  # indexes are aligned, and inodes are to 32
        out.put(start + plan.offset[number], head + tail)
    out.finish(start + plan.inode_size)


def _last_block(plan: Plan, number: int, node: Node) -> bytes:
    if node.type == "lnk":
        return node.target
    names = encode.directory_names(node)
    return _block(plan, number, node, names[encode.directory_blocks(names)[0][-1] :])


def _block(plan: Plan, number: int, node: Node, names: list[bytes]) -> bytes:
    entries = []
    for name in names:
        if name == b".":
            target, file_type = number, encode.FILE_TYPES["dir"]
        elif name == b"..":
            target, file_type = plan.parent[number], encode.FILE_TYPES["dir"]
        else:
            child = node.children[name]
            target, file_type = child.number, encode.FILE_TYPES[child.type]
        entries.append((name, plan.nid(target), file_type))
    return encode.directory_block(entries)


def write_blocks(plan: Plan, write: Write) -> None:
    """Write the second zone: blocks of directories and symbolic links that are not inline."""
    for number, node in enumerate(plan.nodes):
        inline = plan.layout[number] == fmt.FLAT_INLINE
        if node.type == "dir" and (not inline or plan.size[number] > BLOCK_SIZE):
            names = encode.directory_names(node)
            starts, _ = encode.directory_blocks(names)
            stops = [*starts[1:], len(names)]
            for first, last in list(zip(starts, stops, strict=True))[: len(starts) - inline]:
                write(_block(plan, number, node, names[first:last]).ljust(BLOCK_SIZE, b"\0"))
        elif node.type == "lnk" and not inline:
            write(node.target.ljust(BLOCK_SIZE, b"\0"))
