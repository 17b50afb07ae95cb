"""What every image format gives: something to mount, something to fill, something to list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from erofsd.blobs.layout import BlobLayout
from ondemand.ranges import RangeSet


class ByteSource(Protocol):
    """Random access to the bytes of an image, for readers. Blocking; give it a thread.

    Attributes:
        name: For error messages.
        size: In bytes.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly *length* bytes at *offset*.

        Raises:
            CorruptImage: The range reaches past the end; names the offset.
            SourceError: The bytes cannot be had.
        """
        ...


@dataclass(frozen=True, slots=True)
class Image:
    """An opened image: all that is needed to mount it, with all of its tables checked.

    Attributes:
        format: ``"rafs6"`` or ``"erofs"``.
        bootstrap: The primary EROFS image where it is pure metadata and complete (RAFS); else None.
        primary: The primary EROFS image where it is filled on demand (plain EROFS); else None.
        metadata: Bytes of ``primary`` that the kernel reads without asking anybody: they must be filled
            before the mount.
        devices: Device slots 1, 2, … in order.
        block_size: EROFS block size, bytes.
        compressed: True if the kernel decompresses (native EROFS compression).
        verified: What stands behind the bytes: ``"blake3"``, ``"sha256"``, or ``"none"``.
        prefetch: nids from the image's prefetch table.
    """

    format: str
    bootstrap: bytes | None
    primary: BlobLayout | None
    metadata: RangeSet
    devices: tuple[BlobLayout, ...]
    block_size: int = 4096
    compressed: bool = False
    verified: str = "none"
    prefetch: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in an image's tree, with the values that a lstat and friends would show.

    Attributes:
        path: Absolute, ``b"/"`` for the root.
        type: ``reg dir lnk chr blk fifo sock``.
        mode: Permission bits only (with setuid, setgid, sticky).
        mtime: Nanoseconds since 1970.
        size: Bytes; of a symbolic link the length of its target.
        rdev: As in ``st_rdev``; 0 where it means nothing.
        target: Of a symbolic link; else None.
        xattrs: Full name to value.
    """

    path: bytes
    nid: int
    type: str
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    nlink: int
    rdev: int = 0
    target: bytes | None = None
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


class Tree(Protocol):
    """The file tree of an image, read without the kernel. Blocking."""

    def walk(self) -> Iterator[Entry]:
        """Every entry, parents before children, siblings sorted bytewise.

        Raises:
            CorruptImage: Names offset and field.
        """
        ...

    def content(self, entry: Entry) -> Iterator[bytes]:
        """The bytes of a regular file, in pieces of at most 1 MiB (holes as zeros)."""
        ...
