"""Makes nodes and chunks of an image that somebody else wrote: the way back from a reader to a writer."""

from __future__ import annotations

import struct
from array import array

from erofsd.images.erofs.tree import ErofsTree
from erofsd.images.rafs6 import format as fmt
from erofsd.images.rafs6.bootstrap import Bootstrap
from erofsd.images.tree import ChunkSet, Node, PackedBlob


def rebuilt(bootstrap: Bootstrap, tree: ErofsTree) -> tuple[Node, ChunkSet]:
    """The tree of an image, with its chunks."""
    chunks, numbers = _chunks(bootstrap)
    nodes: dict[int, Node] = {}
    for entry in tree.walk():
        node = nodes.get(entry.nid)
        if node is None:
            node = nodes[entry.nid] = Node(entry.type, entry.mode, entry.uid, entry.gid, entry.mtime)
            node.rdev, node.target, node.xattrs = entry.rdev, entry.target or b"", entry.xattrs
            if entry.type == "reg":
                node.size = entry.size
                first = -(-tree.reader.inode(entry.nid).tail // 8) * 8
                index = bootstrap.data[first : first + 8 * -(-node.size // bootstrap.chunk_size)]
                places = struct.iter_unpack("<HHI", index)
                node.chunks = array("q", (numbers[(b & 0xFF) - 1, a | b >> 8 << 16] for a, b, _ in places))
        directory, _, name = entry.path.rpartition(b"/")
        if name:
            parent = nodes[tree.reader.root.nid]
            for part in directory.split(b"/")[1:]:
                parent = parent.children[part]
            parent.children[name] = node
    return nodes[tree.reader.root.nid], chunks


def _chunks(bootstrap: Bootstrap) -> tuple[ChunkSet, dict[tuple[int, int], int]]:
    chunks = ChunkSet()
    for blob in bootstrap.blobs:
        chunks.blobs.append(
            PackedBlob(
                blob_id=blob.blob_id,
                stored_size=blob.compressed_size,
                size=blob.uncompressed_size,
                codec=blob.codec,
                digester=fmt.DIGESTERS[blob.digester],
                features=blob.features,
                ci_offset=blob.ci_offset,
                ci_stored=blob.ci_compressed_size,
                ci_size=blob.ci_uncompressed_size,
                ci_codec=fmt.COMPRESSORS[blob.ci_compressor],
                toc_size=blob.toc_size,
                toc_digest=blob.toc_digest,
                blob_meta=b"",
                chunk_count=blob.chunk_count,
            )
        )
    numbers = {}
    # fmt: off
    for digest, blob_index, flags, stored, size, stored_at, offset, _, index, crc in fmt.CHUNK.iter_unpack(
        bootstrap.chunk_table
    ):
        # fmt: on
        numbers[blob_index, index] = len(chunks)
        chunks.blob.append(blob_index)
        chunks.index.append(index)
        chunks.offset.append(offset)
        chunks.size.append(size)
        chunks.stored_offset.append(stored_at)
        chunks.stored_size.append(stored)
        chunks.flags.append(flags)
        chunks.crc.append(crc)
        chunks.digests += digest
    return chunks, numbers
