"""Writes RAFS v6 bootstraps that Nydus' readers and the kernel accept.

Both look at the same inodes with different eyes (see ``erofsd.images.rafs6.reader``), and Nydus asks for more
than EROFS does: every chunk that a file uses in the chunk table, extended inodes, nothing but directories and
links inline, no shared attributes, no holes. Order of the file, all of it known before the first byte is
written: superblocks and device table, blob table, prefetch table, inodes, directory blocks, chunk table.

Source: rafs-v6 1, 2 and 6.1; Nydus builder/src/core/v6.rs.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from erofsd.errors import UnsupportedImage
from erofsd.images.erofs import encode
from erofsd.images.erofs import format as erofs
from erofsd.images.erofs.encode import BLOCK_SIZE
from erofsd.images.erofs.plan import Numbering, Plan, Shape
from erofsd.images.erofs.zones import write_blocks, write_inodes
from erofsd.images.rafs6 import format as fmt
from erofsd.images.tree import ChunkSet, Node, PackedBlob

_COMPRESSORS = {name: number for number, name in fmt.COMPRESSORS.items()}
_DIGESTERS = {name: number for number, name in fmt.DIGESTERS.items()}
_COMPRESSOR_FLAGS = {"none": 0x1, "lz4_block": 0x2, "gzip": 0x40, "zstd": 0x80}
_DIGESTER_FLAGS = {"blake3": fmt.FLAG_BLAKE3, "sha256": fmt.FLAG_SHA256}
_FLAG_OWNERS = 0x10
_FLAG_XATTRS = 0x20
_FLAG_DIGESTS_IN_BLOBS = 0x100
_FLAG_NOT_ENCRYPTED = 0x01000000
_CHUNK_INDEX_MAX = (1 << 24) - 1
_BLOCKS_MAX = 0xFFFFFFFF
_CHUNK_CRC = 0x10


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """What ``write_bootstrap`` wrote.

    Attributes:
        size: Bytes.
        blobs: Those that the image refers to, in the order of device slots: its data layers.
    """

    size: int
    blobs: tuple[PackedBlob, ...]


def write_bootstrap(
    root: Node,
    chunks: ChunkSet,
    out: BinaryIO,
    *,
    chunk_size: int,
    prefetch: Sequence[Node] = (),
    codec: str = "zstd",
    digester: str = "blake3",
) -> Bootstrap:
    """Write the bootstrap of the tree below *root* to *out*, front to back. The same input, the same bytes.

    Args:
        chunks: What the nodes' chunk numbers mean. Only those in use are written, and only their blobs,
            renumbered in their order here; a blob that is listed twice is one.
        chunk_size: Of all files, bytes: a power of two, 4096 to 16 MiB.
        prefetch: Nodes of this tree, most urgent first; a directory stands for all below it.
        codec, digester: Of an image without data; else the last blob's.

    Raises:
        UnsupportedImage: More blobs or chunks than RAFS v6 can count.
        ValueError: The tree does not fit the chunks, or holds what ``erofs.encode.refused_xattrs`` names.
    """
    numbering = Numbering(root)
    usage = _Usage(numbering.nodes, chunks, chunk_size)
    style = _Rafs(usage)
    plan = Plan(numbering, style)
    writer = _Writer(plan, usage, [plan.nid(node.number) for node in prefetch if numbering.known(node)])
    if usage.blobs:
        codec, digester = usage.blobs[-1].codec, usage.blobs[-1].digester
    out.write(writer.head(codec, digester))
    write_inodes(plan, style, writer.inodes_at, out.write)
    write_blocks(plan, out.write)
    for part in usage.chunk_table():
        out.write(part)
    out.write(bytes(-usage.table_size % BLOCK_SIZE))
    return Bootstrap(writer.size, usage.blobs)


class _Usage:
    """Which chunks and blobs the files of a tree use.

    Attributes:
        blobs: In use, each once.
        slot: By index into ``ChunkSet.blobs``: index into ``blobs``.
    """

    def __init__(self, nodes: Sequence[Node], chunks: ChunkSet, chunk_size: int) -> None:
        self.chunks = chunks
        self.chunk_size = chunk_size
        self._used = bytearray(len(chunks))
        self._file_offset = array("Q", bytes(8 * len(chunks)))
        for node in nodes:
            if node.type == "reg":
                self._use(node)
        wanted = bytearray(len(chunks.blobs))
        for used, blob in zip(self._used, chunks.blob, strict=True):
            wanted[blob] |= used
        slots: dict[str, int] = {}
        self.blobs: tuple[PackedBlob, ...] = ()
        self.slot = array("H")
        for want, packed in zip(wanted, chunks.blobs, strict=True):
            if want and packed.blob_id not in slots:
                slots[packed.blob_id] = len(slots)
                self.blobs += (packed,)
            self.slot.append(slots.get(packed.blob_id, 0))
        self._drop_twins()
        self.table_size = fmt.CHUNK.size * sum(self._used)
        self._check()

    def _use(self, node: Node) -> None:
        if len(node.chunks) != -(-node.size // self.chunk_size):
            raise ValueError(f"{len(node.chunks)} chunks for {node.size} bytes")
        sizes, used, left = self.chunks.size, self._used, node.size
        for k, chunk in enumerate(node.chunks):
            if chunk < 0:
                raise ValueError("RAFS has no holes: zeros are a chunk like others")
            if sizes[chunk] < min(left, self.chunk_size):
                raise ValueError(f"chunk {chunk} has {sizes[chunk]} bytes of {left}")
            left -= self.chunk_size
            if not used[chunk]:
                used[chunk] = 1
                self._file_offset[chunk] = k * self.chunk_size

    def _drop_twins(self) -> None:
        # One layer twice in an image, or one dictionary for two layers: chunks of one blob with two numbers.
        seen = [bytearray(blob.chunk_count) for blob in self.blobs]
        for chunk, used in enumerate(self._used):
            if used:
                slot, index = self.slot[self.chunks.blob[chunk]], self.chunks.index[chunk]
                self._used[chunk] = not seen[slot][index]
                seen[slot][index] = 1

    def _check(self) -> None:
        if len(self.blobs) > fmt.BLOB_COUNT_MAX:
            problem = f"{len(self.blobs)} layers with data; RAFS v6 can address {fmt.BLOB_COUNT_MAX}"
            raise UnsupportedImage(problem)
        blocks = sum(blob.size // BLOCK_SIZE for blob in self.blobs)
        if blocks > _BLOCKS_MAX:
            raise UnsupportedImage(f"{blocks} blocks of data; RAFS v6 can address {_BLOCKS_MAX}")
        for blob in self.blobs:
            if blob.chunk_count - 1 > _CHUNK_INDEX_MAX:
                problem = f"{blob.chunk_count} chunks; RAFS v6 can number {_CHUNK_INDEX_MAX + 1}"
                raise UnsupportedImage(
                    f"blob {blob.blob_id}: {problem}", hint="Use larger chunks (--chunk-size)."
                )

    def word(self, node: Node) -> int:
        """The chunk format of a file.

        Where its chunks follow one another, the kernel is told of one large chunk, and reads (and asks for)
        more at a time; Nydus counts in the image's chunk size whatever the word says. Source: rafs-v6 1.7.
        """
        size = self.chunk_size
        if node.size > size and self._consecutive(node):
            size = 1 << (node.size - 1).bit_length()
        return encode.chunk_format(size)

    def _consecutive(self, node: Node) -> bool:
        blobs, offsets = self.chunks.blob, self.chunks.offset
        first = node.chunks[0]
        slot, offset = self.slot[blobs[first]], offsets[first]
        for chunk in node.chunks:
            if offsets[chunk] != offset or self.slot[blobs[chunk]] != slot:
                return False
            offset += self.chunk_size
        return True

    def index(self, node: Node) -> bytes:
        """The chunk index of a file, 8 bytes a chunk. Source: rafs-v6 1.7."""
        chunks = self.chunks
        words = array("Q")
        for chunk in node.chunks:
            number = chunks.index[chunk]
            device = self.slot[chunks.blob[chunk]] + 1
            block = chunks.offset[chunk] // BLOCK_SIZE
            words.append(number & 0xFFFF | device << 16 | (number >> 16) << 24 | block << 32)
        return encode.little_endian(words)

    def chunk_table(self) -> Iterator[bytes]:
        """The chunk table in pieces: ascending by digest and blob, every chunk once. Source: rafs-v6 2.4."""
        chunks = self.chunks
        buckets = [array("I") for _ in range(256)]  # by first byte: never all digests as objects at once
        for chunk, used in enumerate(self._used):
            if used:
                buckets[chunks.digests[32 * chunk]].append(chunk)
        for bucket in buckets:
            keyed = [(chunks.digest(c), self.slot[chunks.blob[c]], chunks.index[c], c) for c in bucket]
            yield b"".join([self._row(*key) for key in sorted(keyed)])

    def _row(self, digest: bytes, slot: int, index: int, chunk: int) -> bytes:
        chunks = self.chunks
        flags, crc = chunks.flags[chunk], chunks.crc[chunk]
        if not crc:  # a chunk that claims a crc of 0 is an I/O error to Nydus: rafs-v6 6.1
            flags &= ~_CHUNK_CRC
        return fmt.CHUNK.pack(
            digest,
            slot,
            flags,
            chunks.stored_size[chunk],
            chunks.size[chunk],
            chunks.stored_offset[chunk],
            chunks.offset[chunk],
            self._file_offset[chunk],
            index,
            crc,
        )


class _Rafs:
    """Implements Style."""

    def __init__(self, usage: _Usage) -> None:
        self._usage = usage

    def compact(self, node: Node, size: int, nlink: int) -> bool:
        """Never: a compact inode has no time of its own."""
        return False

    def xattr_size(self, node: Node) -> int:
        """See Style."""
        return encode.xattr_area_size(node.xattrs)

    def xattrs(self, node: Node) -> bytes:
        """See Style."""
        return encode.xattr_area(node.xattrs)

    def file_shape(self, node: Node, nlink: int) -> Shape:
        """Chunk-based, and so are empty files."""
        return Shape(False, erofs.CHUNK_BASED, node.size, self.xattr_size(node), 8 * len(node.chunks))

    def file_body(self, node: Node, layout: int) -> tuple[int, bytes]:
        """See Style."""
        return self._usage.word(node), self._usage.index(node)


class _Writer:
    """Where the parts of the file lie, and everything before the inodes."""

    def __init__(self, plan: Plan, usage: _Usage, prefetch: Sequence[int]) -> None:
        self._plan = plan
        self._usage = usage
        count = len(usage.blobs)
        self._prefetch = prefetch if count else ()
        self._devices_end = fmt.DEVICE_TABLE_OFFSET + erofs.DEVICE_SLOT.size * count
        self._blobs_at = _aligned(self._devices_end)
        self._prefetch_at = self._blobs_at + fmt.BLOB.size * count
        self._meta = _aligned(self._prefetch_at + 4 * len(self._prefetch)) if count else 0
        self.inodes_at = self._meta + BLOCK_SIZE
        self._chunks_at = self.inodes_at + plan.inode_size + plan.block_count * BLOCK_SIZE
        self.size = self._chunks_at + _aligned(usage.table_size)

    def head(self, codec: str, digester: str) -> bytes:
        """Everything before the inodes."""
        blobs = self._usage.blobs
        counts = [blob.size // BLOCK_SIZE for blob in blobs]
        parts = [
            bytes(erofs.SUPER_OFFSET),
            encode.superblock(
                feature_compat=erofs.COMPAT_RAFS,
                feature_incompat=erofs.INCOMPAT_CHUNKED_FILE | erofs.INCOMPAT_DEVICE_TABLE,
                root_nid=self._plan.nid(0),
                inode_count=len(self._plan.nodes),
                block_count=sum(counts),
                meta_block=self._meta // BLOCK_SIZE,
                device_count=len(blobs),
                device_slot=fmt.DEVICE_TABLE_OFFSET // erofs.DEVICE_SLOT.size,
            ),
            self._extended(codec, digester),
        ]
        places = encode.mapped_blocks(self.size, counts)
        for blob, count, place in zip(blobs, counts, places, strict=True):
            parts.append(encode.device_slot(blob.blob_id.encode("ascii"), count, place))
        parts.append(bytes(self._blobs_at - self._devices_end))
        parts += [self._blob(i, blob) for i, blob in enumerate(blobs)]
        parts += [nid.to_bytes(4, "little") for nid in self._prefetch]
        head = b"".join(parts)
        return head[: self.inodes_at].ljust(self.inodes_at, b"\0")

    def _extended(self, codec: str, digester: str) -> bytes:
        usage = self._usage
        flags = _COMPRESSOR_FLAGS[codec] | _DIGESTER_FLAGS[digester] | _FLAG_OWNERS | _FLAG_NOT_ENCRYPTED
        if any(self._plan.xattr_size):
            flags |= _FLAG_XATTRS
        if all(blob.features & fmt.INLINED_CHUNK_DIGEST for blob in usage.blobs):
            flags |= _FLAG_DIGESTS_IN_BLOBS
        return fmt.EXT_SUPER.pack(
            flags,
            self._blobs_at,
            fmt.BLOB.size * len(usage.blobs),
            usage.chunk_size,
            self._chunks_at,
            usage.table_size,
            self._prefetch_at if self._prefetch else 0,
            4 * len(self._prefetch),
            0,
        )

    def _blob(self, index: int, blob: PackedBlob) -> bytes:
        return fmt.BLOB.pack(
            blob.blob_id.encode("ascii"),
            index,
            self._usage.chunk_size,
            blob.chunk_count,
            _COMPRESSORS[blob.codec],
            _DIGESTERS[blob.digester],
            blob.features,
            blob.stored_size,
            blob.size,
            blob.toc_size,
            _COMPRESSORS[blob.ci_codec],
            blob.ci_offset,
            blob.ci_stored,
            blob.ci_size,
            blob.toc_digest,
            bytes(32),  # of a separate blob.meta object, which there is none of
            0,
            b"",
            0,
        )


def _aligned(size: int) -> int:
    return -(-size // BLOCK_SIZE) * BLOCK_SIZE
