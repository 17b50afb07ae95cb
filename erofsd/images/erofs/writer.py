"""Writes plain EROFS images: one file, or one file and a blob with the data.

Metadata come first and together, so that they can be fetched before a mount (``erofs.metadata``). File data:

- up to ``chunk_size``: flat, the last bytes behind the inode;
- larger: by chunks, of which equal ones are stored once and those of zeros not at all;
- with a blob: everything that does not fit behind its inode goes there, by chunks.

An inode takes 32 bytes instead of 64 if it has the time that most files have, which then is the time of the
file system: most kernels know no other for it. Attributes that several files have are stored once.
"""

from __future__ import annotations

import hashlib
import io
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from blake3 import blake3

from erofsd.errors import SourceError, UnsupportedImage
from erofsd.images.erofs import encode
from erofsd.images.erofs import format as fmt
from erofsd.images.erofs.encode import BLOCK_SIZE, NULL_BLOCK
from erofsd.images.erofs.plan import Numbering, Plan, Shape, flat_shape
from erofsd.images.erofs.zones import write_blocks, write_inodes
from erofsd.images.tree import Node

COMPAT_MTIME = 0x2
_DEVICE_TABLE_OFFSET = 1152
_COUNTED_MAX = 1 << 16
_SHARED_IDS_MAX = 255

Content = Callable[[Node], Iterable[bytes]]
"""Gives the bytes of a regular file in pieces of any size; asked for once a file, in the image's order."""


@dataclass(frozen=True, slots=True)
class Written:
    """What ``write_image`` wrote.

    Attributes:
        size: Of the image, bytes.
        blob_id: SHA-256 of the blob, its tag in the device table; empty if there is none.
        blob_size: Bytes.
    """

    size: int
    blob_id: str = ""
    blob_size: int = 0


def write_image(
    root: Node, out: BinaryIO, content: Content, *, chunk_size: int = 1 << 20, blob: BinaryIO | None = None
) -> Written:
    """Write an EROFS image of the tree below *root*. The same input, the same bytes.

    Args:
        out: Empty and seekable: it is written at several places in turn.
        content: Not asked for files whose node has ``inline``, nor for empty ones.
        chunk_size: Bytes, a power of two from 4096.
        blob: Empty and seekable, takes file data and becomes device slot 1. If no file needs it, nothing is
            written and the image has no devices.

    Raises:
        SourceError: A file has not the size that its node says.
        UnsupportedImage: More data than EROFS can address.
        ValueError: The tree holds what ``encode.refused_xattrs`` names, or what no file system has.
    """
    numbering = Numbering(root)
    style = _Plain(numbering.nodes, content, chunk_size, None if blob is None else _HashedSection(blob))
    plan = Plan(numbering, style)
    blocks_at = BLOCK_SIZE + plan.inode_size
    xattrs_at = blocks_at + plan.block_count * BLOCK_SIZE
    image = style.image = _Section(out, xattrs_at)
    image.write(style.shared.area)
    image.pad()
    write_inodes(plan, style, BLOCK_SIZE, _Section(out, BLOCK_SIZE).write)
    write_blocks(plan, _Section(out, blocks_at).write)
    _check_addresses(image, style.blob)
    written, devices = Written(image.at), b""
    if style.blob and style.blob.at:
        written = Written(image.at, style.blob.sha256.hexdigest(), style.blob.at)
        count = written.blob_size // BLOCK_SIZE
        place = next(encode.mapped_blocks(written.size, [count]))
        devices = encode.device_slot(written.blob_id.encode("ascii"), count, place)
    super_block = encode.superblock(
        feature_compat=fmt.COMPAT_SB_CHKSUM | COMPAT_MTIME,
        feature_incompat=(fmt.INCOMPAT_CHUNKED_FILE if fmt.CHUNK_BASED in plan.layout else 0)
        | (fmt.INCOMPAT_DEVICE_TABLE if devices else 0),
        root_nid=plan.nid(0),
        inode_count=len(plan.nodes),
        mtime=style.mtime,
        block_count=written.size // BLOCK_SIZE,
        meta_block=0,
        xattr_block=xattrs_at // BLOCK_SIZE,
        device_count=1 if devices else 0,
        device_slot=_DEVICE_TABLE_OFFSET // fmt.DEVICE_SLOT.size,
    )
    first = (bytes(fmt.SUPER_OFFSET) + super_block + devices).ljust(BLOCK_SIZE, b"\0")
    _Section(out, 0).write(encode.with_checksum(first))
    return written


class _Section:
    """Writes *out* from *at* on, whoever else writes it elsewhere."""

    def __init__(self, out: BinaryIO, at: int) -> None:
        self._out = out
        self.at = at

    def write(self, data: bytes) -> None:
        if data:
            self._out.seek(self.at)
            self._out.write(data)
            self.at += len(data)

    def pad(self) -> None:
        """Fill the last block."""
        self.write(bytes(-self.at % BLOCK_SIZE))


class _HashedSection(_Section):
    """Knows the SHA-256 of what it wrote."""

    def __init__(self, out: BinaryIO) -> None:
        super().__init__(out, 0)
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        super().write(data)
        self.sha256.update(data)


def _check_addresses(*sections: _Section | None) -> None:
    for section in sections:
        if section and section.at // BLOCK_SIZE >= NULL_BLOCK:
            raise UnsupportedImage(f"{section.at} bytes in one file; EROFS can address 16 TiB")


@dataclass(frozen=True, slots=True)
class _SharedXattrs:
    """Attributes that several inodes have.

    Attributes:
        area: Their entries.
        ids: By name and value: offset in the area, in units of 4 bytes.
    """

    area: bytes
    ids: dict[tuple[bytes, bytes], int]


def _shared_xattrs(nodes: Sequence[Node]) -> _SharedXattrs:
    # Bounded: where the first 65,536 are all different, the others hardly repeat.
    counts: Counter[tuple[bytes, bytes]] = Counter()
    for node in nodes:
        for pair in node.xattrs.items():
            if len(counts) < _COUNTED_MAX or pair in counts:
                counts[pair] += 1
    ids: dict[tuple[bytes, bytes], int] = {}
    area = bytearray()
    for pair in sorted(pair for pair, count in counts.items() if count > 1):
        if not encode.refused_xattrs(dict([pair])):
            ids[pair] = len(area) // 4
            area += encode.xattr_entry(*pair)
    return _SharedXattrs(bytes(area), ids)


def _common_time(nodes: Sequence[Node]) -> int:
    counts: Counter[int] = Counter()
    for node in nodes:
        if node.mtime >= 0 and (len(counts) < _COUNTED_MAX or node.mtime in counts):
            counts[node.mtime] += 1
    return min(counts, key=lambda mtime: (-counts[mtime], mtime), default=0)


class _Plain:
    """Implements Style, and writes file data as inodes come by.

    Attributes:
        mtime: Of the file system, nanoseconds since 1970.
        image: Takes data; set once it is known where.
        blob: Takes them instead, if there is one.
    """

    def __init__(
        self, nodes: Sequence[Node], content: Content, chunk_size: int, blob: _HashedSection | None
    ) -> None:
        self._content = content
        self._chunk_size = chunk_size
        self._places: dict[bytes, int] = {}
        self._zeros = bytes(chunk_size)
        self.shared = _shared_xattrs(nodes)
        self.mtime = _common_time(nodes)
        self.image = _Section(io.BytesIO(), 0)
        self.blob = blob

    def compact(self, node: Node, size: int, nlink: int) -> bool:
        """See Style."""
        return encode.fits_compact(node, size, nlink, self.mtime)

    def xattr_size(self, node: Node) -> int:
        """See Style."""
        own, ids = self._split_xattrs(node)
        return encode.xattr_area_size(own, len(ids))

    def xattrs(self, node: Node) -> bytes:
        """See Style."""
        own, ids = self._split_xattrs(node)
        return encode.xattr_area(own, ids)

    def _split_xattrs(self, node: Node) -> tuple[dict[bytes, bytes], list[int]]:
        own: dict[bytes, bytes] = {}
        ids: list[int] = []
        for name in sorted(node.xattrs):
            number = self.shared.ids.get((name, node.xattrs[name]))
            if number is None or len(ids) == _SHARED_IDS_MAX:
                own[name] = node.xattrs[name]
            else:
                ids.append(number)
        return own, ids

    def file_shape(self, node: Node, nlink: int) -> Shape:
        """See Style."""
        compact = self.compact(node, node.size, nlink)
        flat = flat_shape(node.size, compact, self.xattr_size(node))
        if node.size <= self._chunk_size if self.blob is None else not flat.block_count:
            return flat._replace(block_count=0)  # its blocks do not lie among those of directories
        index_size = 8 * -(-node.size // self._chunk_size)
        return Shape(compact, fmt.CHUNK_BASED, node.size, flat.xattr_size, index_size)

    def file_body(self, node: Node, layout: int) -> tuple[int, bytes]:
        """See Style."""
        if layout == fmt.CHUNK_BASED:
            return self._write_chunks(node)
        start, tail = self.image.at // BLOCK_SIZE, b""
        for piece in self._pieces(node):
            whole = len(piece)
            if layout == fmt.FLAT_INLINE:  # only the last piece has a part of a block
                whole -= whole % BLOCK_SIZE
            self.image.write(piece[:whole])
            tail = piece[whole:]
        self.image.pad()
        return start, tail

    def _write_chunks(self, node: Node) -> tuple[int, bytes]:
        device = 0 if self.blob is None else 1
        places = (self._place(chunk) for chunk in self._pieces(node))
        index = array("Q", (device << 16 | block << 32 for block in places))
        return encode.chunk_format(self._chunk_size), encode.little_endian(index)

    def _place(self, chunk: bytes) -> int:
        """The block where *chunk* lies, after writing it if it has to be."""
        if self._zeros.startswith(chunk):
            return NULL_BLOCK
        digest = blake3(chunk).digest()
        place = self._places.get(digest)
        if place is None:
            section = self.blob or self.image
            place = self._places[digest] = section.at // BLOCK_SIZE
            section.write(chunk)
            section.pad()
        return place

    def _pieces(self, node: Node) -> Iterator[bytes]:
        """The content of *node* in pieces of the chunk size; the last may be shorter."""
        if not node.size:
            return
        buffer = bytearray()
        left = node.size
        for piece in self._content(node) if node.inline is None else (node.inline,):
            left -= len(piece)
            if not buffer and len(piece) == self._chunk_size:
                yield piece
                continue
            buffer += piece
            while len(buffer) >= self._chunk_size:
                yield bytes(memoryview(buffer)[: self._chunk_size])
                del buffer[: self._chunk_size]
        if buffer:
            yield bytes(buffer)
        if left:
            raise SourceError(f"a file gave {node.size - left} bytes instead of {node.size}")
