"""Blobs built by hand, and a source in memory that can be slow, broken or gone."""

from __future__ import annotations

import asyncio
import hashlib
import random
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import lz4.block
import zstandard
from blake3 import blake3

from erofsd.blobs.layout import BlobLayout
from erofsd.blobs.store import Binding, BlobStore, FileSink, StoredBlob, aligned
from erofsd.errors import BlobNotFound
from erofsd.fill.provider import FillProvider
from ondemand.provider import ObjectKey
from ondemand.ranges import Range

PACK: dict[str, Callable[[bytes], bytes]] = {
    "zstd": lambda data: zstandard.ZstdCompressor(level=1).compress(data),
    "lz4_block": lambda data: lz4.block.compress(data, store_size=False),
    "none": bytes,
}
DIGEST: dict[str, Callable[[bytes], bytes]] = {
    "blake3": lambda data: blake3(data).digest(),
    "sha256": lambda data: hashlib.sha256(data).digest(),
}


def content(size: int, seed: int = 0, noise: float = 0.4) -> bytes:
    """Bytes that compress about as well as programs do, different in every block."""
    rng = random.Random(seed)
    out = bytearray()
    while len(out) < size:
        out += rng.randbytes(int(4096 * noise)) + b"%08d" % rng.randrange(10**8) * 30
        out += bytes(4096 - int(4096 * noise) - 240)
    return bytes(out[:size])


@dataclass
class Built:
    """A blob as a builder would make it.

    Attributes:
        decoded: What the kernel must see, padding included.
        stored: What the source holds.
    """

    layout: BlobLayout
    decoded: bytes
    stored: bytes
    chunks: list[bytes] = field(default_factory=list)


def build(
    chunks: Sequence[bytes],
    *,
    blob_id: str = "blob",
    codec: str = "zstd",
    digester: str | None = "blake3",
    pin: str = "",
    batch: int = 1,
    stated: Iterable[int] | None = None,
    header: int = 0,
) -> Built:
    """Put *chunks* into a blob.

    Args:
        batch: Chunks a unit.
        stated: Chunks that the image states; all by default.
        header: Bytes before the first unit in the stored object.
    """
    offsets, sizes, units, ats = array("Q"), array("I"), array("I"), array("I")
    unit_offset, unit_stored, unit_size = array("Q"), array("Q"), array("Q")
    packed = bytearray()
    decoded = bytearray()
    stored = bytearray(b"H" * header)
    for first in range(0, len(chunks), batch):
        members = chunks[first : first + batch]
        at = 0
        for chunk in members:
            offsets.append(len(decoded))
            sizes.append(len(chunk))
            units.append(len(unit_offset))
            ats.append(at)
            at += len(chunk)
            decoded += chunk + bytes(-len(chunk) % 4096)
        plain = b"".join(members)
        data = PACK[codec](plain)
        is_packed = codec != "none" and len(data) < len(plain)
        unit_offset.append(len(stored))
        stored += data if is_packed else plain
        unit_stored.append(len(stored) - unit_offset[-1])
        unit_size.append(len(plain))
        packed.append(is_packed)
    wanted = set(range(len(chunks)) if stated is None else stated)
    layout = BlobLayout(
        blob_id=blob_id,
        size=len(decoded),
        stored_size=len(stored),
        codec=codec,
        digester=digester,
        chunk_offset=offsets,
        chunk_size=sizes,
        chunk_unit=units,
        chunk_at=ats,
        stated=bytes(int(i in wanted) for i in range(len(chunks))),
        digests=b"".join(DIGEST[digester](chunk) for chunk in chunks) if digester else b"",
        unit_offset=unit_offset,
        unit_stored=unit_stored,
        unit_size=unit_size,
        unit_packed=bytes(packed),
        pin=pin,
    )
    return Built(layout, bytes(decoded), bytes(stored), list(chunks))


def simple(count: int = 16, size: int = 64 << 10, *, seed: int = 0, **options: object) -> Built:
    """*count* chunks of *size* bytes, the last one shorter."""
    data = content(count * size - min(size // 3, 1000), seed)
    return build([data[i : i + size] for i in range(0, len(data), size)], **options)  # type: ignore[arg-type]


class MemorySource:
    """A backend that holds its objects in memory.

    Attributes:
        requests: Every range that was asked for.
        delay_s: Before the first byte.
        piece: Bytes at a time.
        gate: Closed, nothing arrives until it opens.
        fail: Called with each range; what it returns is raised.
    """

    def __init__(self, name: str = "memory://", **objects: bytes) -> None:
        self.name = name
        self.objects = dict(objects)
        self.requests: list[Range] = []
        self.open_streams = 0
        self.delay_s = 0.0
        self.piece = 64 << 10
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail: Callable[[Range], Exception | None] = lambda want: None

    async def size(self, blob_id: str) -> int:
        """See `Backend`."""
        if blob_id not in self.objects:
            raise BlobNotFound(blob_id)
        return len(self.objects[blob_id])

    async def stream(self, blob_id: str, want: Range) -> AsyncIterator[bytes]:
        """See `Backend`."""
        self.requests.append(want)
        self.open_streams += 1
        try:
            await asyncio.sleep(self.delay_s)
            await self.gate.wait()
            if blob_id not in self.objects:
                raise BlobNotFound(blob_id)
            for at in range(want.start, want.stop, self.piece):
                if (error := self.fail(want)) is not None:
                    raise error
                await self.gate.wait()
                yield self.objects[blob_id][at : min(at + self.piece, want.stop)]
                await asyncio.sleep(0)
        finally:
            self.open_streams -= 1

    async def aclose(self) -> None:
        """See `Backend`."""

    @property
    def asked_bytes(self) -> int:
        """Sum of all requests."""
        return sum(len(want) for want in self.requests)


def key_of(blob: StoredBlob) -> ObjectKey:
    """As the daemon does it."""
    return ObjectKey(blob.name.encode())


class Rig:
    """A store, a provider and the blobs bound to them, as the daemon wires them."""

    def __init__(self, directory: Path, provider: FillProvider) -> None:
        self.store = BlobStore(directory)
        self.provider = provider

    def bind(self, built: Built, source: MemorySource, image: str = "image") -> Binding:
        """Bind and attach."""
        binding = self.store.bind(built.layout)
        binding.source = source
        binding.image = image
        self.provider.attach(key_of(binding.blob), binding.blob, FileSink(binding.blob.fd))
        source.objects.setdefault(built.layout.blob_id, built.stored)
        return binding

    async def read(self, binding: Binding, offset: int, length: int) -> bytes:
        """What a reader gets, by way of the provider as an engine uses it."""
        import os

        blob = binding.blob
        want = Range.of(offset, length).aligned(4096)
        if not self.provider.present(key_of(blob), want):
            await self.provider.fill(key_of(blob), want, FileSink(blob.fd))
        return os.pread(blob.fd, length, offset)


def restate(built: Built, stated: Iterable[int]) -> Built:
    """The same blob, of which an image states only some chunks."""
    wanted = set(stated)
    layout = replace(built.layout, stated=bytes(int(i in wanted) for i in range(built.layout.chunk_count)))
    return Built(layout, built.decoded, built.stored, built.chunks)


__all__ = ["Built", "MemorySource", "Rig", "aligned", "build", "content", "key_of", "restate", "simple"]
