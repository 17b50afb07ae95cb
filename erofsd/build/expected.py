"""What an image has to be, in a file: so that the tree itself is gone from memory when they are compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from erofsd.build.compare import Item, node_items
from erofsd.build.record import messages, put
from erofsd.images.tree import Node


class _Row(msgspec.Struct, array_like=True):
    path: bytes
    type: str
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    rdev: int
    target: bytes | None
    xattrs: list[tuple[bytes, bytes]]
    inode: int | None
    digest: bytes


@dataclass(frozen=True, slots=True)
class Expected:
    """A tree in a file.

    Attributes:
        content_bytes: Sizes of all regular files, by name.
    """

    path: Path
    content_bytes: int

    def items(self) -> Iterator[Item]:
        """Its entries."""
        decoder = msgspec.msgpack.Decoder(_Row)
        with self.path.open("rb") as file:
            for message in messages(file):
                row = decoder.decode(message)
                yield Item(
                    row.path,
                    row.type,
                    row.mode,
                    row.uid,
                    row.gid,
                    row.mtime,
                    row.size,
                    row.rdev,
                    row.target,
                    dict(row.xattrs),
                    row.inode,
                    partial(_digest, row.digest),
                )


def _digest(digest: bytes) -> bytes:
    return digest


def write_expected(root: Node, path: Path) -> Expected:
    """Write the tree below *root* to *path*. Blocks."""
    return write_items(node_items(root), path)


def write_items(items: Iterable[Item], path: Path) -> Expected:
    """Write *items* to *path*; their digests are asked for. Blocks."""
    encoder = msgspec.msgpack.Encoder()
    content = 0
    with path.open("wb") as file:
        for item in items:
            row = _Row(
                item.path,
                item.type,
                item.mode,
                item.uid,
                item.gid,
                item.mtime,
                item.size,
                item.rdev,
                item.target,
                list(item.xattrs.items()),
                item.inode if isinstance(item.inode, int) else None,
                item.digest(),
            )
            put(file, encoder.encode(row))
            content += item.size if item.type == "reg" else 0
    return Expected(path, content)
