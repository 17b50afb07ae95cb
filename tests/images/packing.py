"""Packs file content into Nydus blobs, the shortest way: enough to judge what writers make of it."""

from __future__ import annotations

import hashlib
import io
from array import array
from collections.abc import Callable
from pathlib import Path

import blake3
import lz4.block
import zstandard

from erofsd.images.erofs.format import crc32c
from erofsd.images.rafs6 import blobwriter
from erofsd.images.tree import ChunkSet, Node, PackedBlob, walk
from tests.images.nodes import Source

BLOCK = 4096
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "zstd": zstandard.ZstdCompressor(level=3).compress,
    "lz4_block": lambda data: lz4.block.compress(data, store_size=False),
}


class Packed:
    """The content of a tree in one blob, or in as many as there are *groups*.

    Attributes:
        stored: Blob id to blob.
        decoded: Blob id to what the kernel sees of it.
    """

    def __init__(
        self,
        source: Source,
        chunk_size: int = 16384,
        codec: str = "zstd",
        digester: str = "blake3",
        batch_size: int = 0,
        groups: int = 1,
    ) -> None:
        self.chunks = ChunkSet()
        self.chunk_size = chunk_size
        self.stored: dict[str, bytes] = {}
        self.decoded: dict[str, bytes] = {}
        files: dict[int, Node] = {id(n): n for _, n in walk(source.root) if n.type == "reg"}
        for group in range(groups):
            blob = _Blob(self.chunks, codec, digester, batch_size)
            for i, node in enumerate(files.values()):
                if i % groups == group:
                    data = source.content[id(node)]
                    parts = [data[at : at + chunk_size] for at in range(0, len(data), chunk_size)]
                    node.chunks = array("q", [blob.add(part) for part in parts])
            if blob.count:
                packed, stored = blob.finish()
                self.stored[packed.blob_id] = stored
                self.decoded[packed.blob_id] = bytes(blob.decoded)

    def write_devices(self, directory: Path) -> list[str]:
        """The decoded blobs as files, in the order of the chunk set."""
        paths = []
        for blob in self.chunks.blobs:
            path = directory / blob.blob_id
            path.write_bytes(self.decoded[blob.blob_id])
            paths.append(str(path))
        return paths


class _Blob:
    def __init__(self, chunks: ChunkSet, codec: str, digester: str, batch_size: int) -> None:
        self.chunks, self.codec, self.digester, self.batch_size = chunks, codec, digester, batch_size
        self.number = len(chunks.blobs)
        self.first = len(chunks)
        self.known: dict[bytes, int] = {}
        self.data = io.BytesIO()
        self.decoded = bytearray()
        self.records: list[bytes] = []
        self.contexts: list[bytes] = []

    @property
    def count(self) -> int:
        return len(self.records)

    def add(self, data: bytes) -> int:
        digest = blake3.blake3(data).digest() if self.digester == "blake3" else hashlib.sha256(data).digest()
        if digest in self.known:
            return self.known[digest]
        chunks, number = self.chunks, len(self.chunks)
        offset, at = len(self.decoded), self.data.tell()
        stored = COMPRESS[self.codec](data)
        packed, crc = len(stored) < len(data), 0
        stored = stored if packed else data
        self.data.write(stored)
        if self.batch_size and len(data) < self.batch_size:  # batches of one
            self.records.append(blobwriter.batch_record(offset, len(data), at, len(self.contexts), 0))
            self.contexts.append(blobwriter.batch_context(len(stored), len(data)))
        elif self.batch_size:
            crc = crc32c(data) ^ 0xFFFFFFFF
            place = (offset, len(data), at, len(stored))
            self.records.append(blobwriter.record_v2(*place, compressed=packed, crc=crc))
        else:
            self.records.append(blobwriter.record_v1(offset, len(data), at, len(stored)))
        chunks.blob.append(self.number)
        chunks.index.append(self.count - 1)
        chunks.offset.append(offset)
        chunks.size.append(len(data))
        chunks.stored_offset.append(at)
        chunks.stored_size.append(len(stored))
        chunks.flags.append(int(packed) | (0x10 if crc else 0))
        chunks.crc.append(crc)
        chunks.digests += digest
        self.decoded += data + bytes(-len(data) % BLOCK)
        self.known[digest] = number
        return number

    def finish(self) -> tuple[PackedBlob, bytes]:
        data = self.data.getvalue()
        tail = blobwriter.blob_tail(
            data_size=len(data),
            data_hash=hashlib.sha256(data),
            size=len(self.decoded),
            chunk_count=self.count,
            records=b"".join(self.records),
            contexts=b"".join(self.contexts),
            digests=bytes(self.chunks.digests[32 * self.first :]),
            ci_codec=self.codec,
            compress=COMPRESS[self.codec],
        )
        stored = data + b"".join(tail.pieces)
        blob = PackedBlob(
            blob_id=hashlib.sha256(stored).hexdigest(),
            stored_size=len(stored),
            size=len(self.decoded),
            codec=self.codec,
            digester=self.digester,
            features=tail.features,
            ci_offset=tail.ci_offset,
            ci_stored=tail.ci_stored,
            ci_size=tail.ci_size,
            ci_codec=tail.ci_codec,
            toc_size=tail.toc_size,
            toc_digest=tail.toc_digest,
            blob_meta=tail.blob_meta,
            chunk_count=self.count,
        )
        self.chunks.blobs.append(blob)
        return blob, stored
