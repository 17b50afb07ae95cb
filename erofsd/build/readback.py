"""An image read back from what was stored, without the kernel: the proof that it can be read at all.

Every chunk is decoded and compared with the digest that the image states. Several threads may read at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from erofsd.backends.base import Backend
from erofsd.backends.localfs import LocalBackend
from erofsd.backends.located import Located
from erofsd.backends.measured import MeasuredBackend, streaming
from erofsd.backends.places import FirstOf
from erofsd.backends.retry import RetryBackend
from erofsd.blobs.layout import BlobLayout, decoded_bytes
from erofsd.blobs.units import decode_unit, verify_chunk
from erofsd.errors import BlobCorrupt, ImageRefused
from erofsd.images.base import ByteSource, Image, Tree
from erofsd.images.open import open_image, open_tree
from erofsd.images.source import FileSource, check_range
from ondemand.ranges import Range

_CACHE_SIZE = 32 << 20
_UNIT_OVERHEAD = 1024  # of what surrounds the bytes of one unit: small ones are mostly that
_BLOCK_SIZE = 4 << 20
_BLOCKS_KEPT = 4


class RemoteBytes:
    """A stored blob behind a backend as a ByteSource, for threads beside the event loop *loop*.

    Read in large blocks, some of which are kept: whoever reads a blob mostly goes forward.
    """

    def __init__(self, backend: Backend, blob_id: str, size: int, loop: asyncio.AbstractEventLoop) -> None:
        self.name = f"{backend.name}: blob {blob_id}"
        self.size = size
        self._backend = backend
        self._blob_id = blob_id
        self._loop = loop
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def pread(self, offset: int, length: int) -> bytes:
        """See ByteSource."""
        check_range(self.name, self.size, offset, length)
        if not length:
            return b""
        first, last = offset // _BLOCK_SIZE, (offset + length - 1) // _BLOCK_SIZE
        with self._lock:
            pieces = [self._block(number) for number in range(first, last + 1)]
        start = offset - first * _BLOCK_SIZE
        return b"".join(pieces)[start : start + length]

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            start = number * _BLOCK_SIZE
            want = Range(start, min(start + _BLOCK_SIZE, self.size))
            block = asyncio.run_coroutine_threadsafe(self._fetch(want), self._loop).result()
            self._blocks[number] = block
        self._blocks.move_to_end(number)
        while len(self._blocks) > _BLOCKS_KEPT:
            self._blocks.popitem(last=False)
        return block

    async def _fetch(self, want: Range) -> bytes:
        async with streaming(self._backend, self._blob_id, want) as pieces:
            return b"".join([piece async for piece in pieces])


class UnitCache:
    """Decoded units of all blobs of an image, the least recently used of which goes first. Thread-safe."""

    def __init__(self, size: int = _CACHE_SIZE) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._units: OrderedDict[tuple[str, int], memoryview] = OrderedDict()
        self._cached = 0

    def get(self, blob_id: str, unit: int) -> memoryview | None:
        """The unit, if it is here."""
        with self._lock:
            decoded = self._units.get((blob_id, unit))
            if decoded is not None:
                self._units.move_to_end((blob_id, unit))
            return decoded

    def put(self, blob_id: str, unit: int, decoded: memoryview) -> None:
        """Keep the unit for a while."""
        with self._lock:
            if (blob_id, unit) not in self._units:  # another thread may have been quicker
                self._units[blob_id, unit] = decoded
                self._cached += len(decoded) + _UNIT_OVERHEAD
            while self._cached > self._size and len(self._units) > 1:
                self._cached -= len(self._units.popitem(last=False)[1]) + _UNIT_OVERHEAD


class DecodedBlob:
    """Random access to a blob as the kernel sees it; every chunk is verified. For any number of threads."""

    def __init__(self, layout: BlobLayout, stored: ByteSource, cache: UnitCache) -> None:
        self._layout = layout
        self._stored = stored
        self._cache = cache

    def read(self, want: Range) -> bytes:
        """The decoded bytes of *want*; zeros between chunks.

        Raises:
            CorruptImage: *want* reaches past the blob's end, or touches a chunk that is not stated.
            BlobCorrupt, SourceError: The data cannot be had.
        """
        return decoded_bytes(self._layout, want, self._unit)

    def _unit(self, unit: int) -> memoryview:
        decoded = self._cache.get(self._layout.blob_id, unit)
        if decoded is None:
            decoded = self._load(unit)
            self._cache.put(self._layout.blob_id, unit, decoded)
        return decoded

    def _load(self, unit: int) -> memoryview:
        layout = self._layout
        stored = memoryview(self._stored.pread(layout.unit_offset[unit], layout.unit_stored[unit]))
        chunk = -1
        try:
            decoded = decode_unit(layout, unit, stored)
            for chunk in layout.chunks_of(unit):
                if layout.stated[chunk]:
                    verify_chunk(layout, chunk, decoded)
        except ImageRefused as exc:
            raise BlobCorrupt(f"{self._stored.name}: unit {unit}, chunk {chunk}: {exc}") from exc
        return decoded


@dataclass(frozen=True, slots=True)
class ReadBack:
    """An image, opened from files.

    Attributes:
        tree: Blocking. That of a RAFS image is for any number of threads beside the event loop; a plain one's
            for one: it keeps pages of metadata.
    """

    image: Image
    tree: Tree
    _files: tuple[FileSource, ...]

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()


async def read_back(
    name: str,
    bootstrap: bytes,
    blob_metas: Mapping[str, bytes],
    files: Mapping[str, Path],
    others: MeasuredBackend | None,
) -> ReadBack:
    """Open the image of *bootstrap*.

    Args:
        files: Blobs of this machine by blob id.
        others: Has all other blobs.

    Raises:
        CorruptImage, UnsupportedImage: It is not what it should be.
        SourceError: A blob cannot be had.
    """
    local = LocalBackend(files=files)
    backend = RetryBackend(local if others is None else FirstOf([local, others]), 4)
    return await open_located(
        Located(name, "rafs", None, bootstrap, blob_metas, backend, None, (), {}), files
    )


async def open_located(located: Located, files: Mapping[str, Path] = MappingProxyType({})) -> ReadBack:
    """Open what was located; its backend stays the caller's.

    Args:
        files: Blobs that are read from this machine, by blob id.

    Raises:
        As `read_back`.
    """
    image = await open_image(located)
    loop = asyncio.get_running_loop()
    opened: list[FileSource] = []
    slots = list(enumerate(image.devices, 1))
    if image.primary is not None:
        slots.insert(0, (0, image.primary))
    blobs = {}
    cache = UnitCache()
    try:
        for slot, layout in slots:
            source: ByteSource
            if layout.blob_id in files:
                source = FileSource(files[layout.blob_id])
                opened.append(source)
            else:
                source = RemoteBytes(located.backend, layout.blob_id, layout.stored_size, loop)
            blobs[slot] = DecodedBlob(layout, source, cache)
        tree = await asyncio.to_thread(
            open_tree, image, lambda slot, want: blobs[slot].read(want), located.ref
        )
    except BaseException:
        for file in opened:
            file.close()
        raise
    return ReadBack(image, tree, tuple(opened))
