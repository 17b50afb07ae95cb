"""The file tree of an image under construction: what sources fill, layers merge and writers write.

Names are bytes without slash; a path is names joined with ``/`` and begins without one. A hard link is one
``Node`` under several names. File content is not here: when a file enters a tree its bytes have been chunked
and packed, and the node says which chunks it has.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast

NAME_MAX = 255
TARGET_MAX = 4095


@dataclass(slots=True, eq=False)
class Node:
    """An inode.

    Attributes:
        type: ``reg dir lnk chr blk fifo sock``.
        mode: Permission bits with setuid, setgid and sticky.
        mtime: Nanoseconds since 1970; may be negative.
        size: Of a regular file, bytes.
        rdev: As in ``st_rdev``, for ``chr`` and ``blk``.
        target: Of a symbolic link.
        xattrs: Full name to value.
        chunks: Of a regular file, in order: global chunk numbers of the ``ChunkSet`` that the tree is written
            with; ``HOLE`` where a whole chunk is zeros that are not stored. Chunk k holds bytes from
            ``k * chunk_size``. Empty for other types, and for an empty file.
        inline: Content of a small regular file that the writer may put beside the inode (plain EROFS), if it
            was kept.
        children: Of a directory.
        opaque: Of a directory in a layer: it hides what lower layers have in it.
        digest: Of a regular file, BLAKE3 of its content as the source gave it, where somebody compares.
        number: Belongs to the writer at work: a column index without a dictionary of all nodes.
    """

    type: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    rdev: int = 0
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    chunks: array[int] = field(default_factory=lambda: array("q"))
    inline: bytes | None = None
    children: dict[bytes, Node] = field(default_factory=dict)
    opaque: bool = False
    digest: bytes = b""
    number: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        # Most nodes are no directories, and an empty dict each is a tenth of the memory of a large tree.
        if self.type != "dir" and not self.children:
            self.children = _NO_CHILDREN


HOLE = -1
_NO_CHILDREN = cast("dict[bytes, Node]", MappingProxyType({}))


@dataclass(slots=True, frozen=True)
class PackedBlob:
    """A finished data blob.

    Attributes:
        blob_id: 64 hex digits: sha256 of the whole stored object, which is its OCI layer digest.
        stored_size: Of the whole object, bytes.
        size: Decoded, a multiple of 4096: the device that the kernel sees.
        codec: ``zstd lz4_block gzip none``: of compressed units.
        digester: ``blake3`` or ``sha256``.
        features: RAFS blob features as written in its chunk information.
        ci_offset, ci_stored, ci_size: Chunk information: offset in the object, stored and decoded bytes.
        ci_codec: Codec of the chunk information.
        toc_size, toc_digest: As in the RAFS blob table; 0 and zeros without a TOC.
        blob_meta: The ``.blob.meta`` file in cache form (array padded to 4096, header), to ship beside the
            bootstrap.
        chunk_count: Chunks in the blob, used or not.
    """

    blob_id: str
    stored_size: int
    size: int
    codec: str
    digester: str
    features: int
    ci_offset: int
    ci_stored: int
    ci_size: int
    ci_codec: str
    toc_size: int
    toc_digest: bytes
    blob_meta: bytes
    chunk_count: int


class ChunkSet:
    """All chunks that a tree may refer to, in columns; a global chunk number is an index into them.

    Chunks of one blob need not be neighbours here: a chunk dictionary adds chunks of foreign blobs as they
    are first used.

    Attributes:
        blobs: In the order of device slots, slot 1 first.
        blob: Index into ``blobs``.
        index: Number of the chunk in its blob.
        offset, size: Decoded place in the blob, bytes; the offset is 4096-aligned.
        stored_offset, stored_size: Place in the stored object; of a batch member, of the batch.
        flags: RAFS chunk flags (compressed 0x1, batch 0x8, crc 0x10).
        crc: crc32c of the decoded bytes, valid with flag 0x10.
        digests: 32 bytes a chunk.
    """

    def __init__(self) -> None:
        self.blobs: list[PackedBlob] = []
        self.blob = array("H")
        self.index = array("I")
        self.offset = array("Q")
        self.size = array("I")
        self.stored_offset = array("Q")
        self.stored_size = array("I")
        self.flags = array("I")
        self.crc = array("I")
        self.digests = bytearray()

    def __len__(self) -> int:
        return len(self.blob)

    def digest(self, chunk: int) -> bytes:
        """The 32 bytes of chunk *chunk*."""
        return bytes(self.digests[32 * chunk : 32 * (chunk + 1)])


def walk(root: Node, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
    """Every name with its node, parents before children, siblings sorted bytewise; the root as ``b""``."""
    stack = [(path, root)]
    while stack:
        path, node = stack.pop()
        yield path, node
        for name in sorted(node.children, reverse=True):
            stack.append((path + b"/" + name if path else name, node.children[name]))
