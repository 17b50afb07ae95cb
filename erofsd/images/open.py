"""Opens what was located: an image with all its tables checked, ready to be mounted, filled and listed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import ParamSpec, Protocol, TypeVar

from erofsd.backends.base import Backend
from erofsd.backends.located import Located
from erofsd.backends.measured import streaming
from erofsd.blobs.layout import BlobLayout, uniform_layout
from erofsd.errors import CorruptImage, ErofsdError, SourceError, UnsupportedImage
from erofsd.images.base import Image
from erofsd.images.erofs.metadata import Metadata, survey
from erofsd.images.erofs.reader import ErofsReader, ReadDevice
from erofsd.images.erofs.tree import ErofsTree
from erofsd.images.rafs6 import format as rafs
from erofsd.images.rafs6.blobmeta import ChunkColumns, parse_blob_meta, usable
from erofsd.images.rafs6.bootstrap import Bootstrap, parse_bootstrap
from erofsd.images.rafs6.format import BlobEntry
from erofsd.images.rafs6.layout import build_layouts
from erofsd.images.rafs6.reader import RafsReader
from erofsd.images.source import PagedSource, corrupt
from ondemand.ranges import Range, RangeSet

P = ParamSpec("P")
T = TypeVar("T")


class RunBlocking(Protocol):
    """Runs a function in a thread, like asyncio.to_thread."""

    def __call__(self, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]: ...


async def open_image(located: Located, run_blocking: RunBlocking = asyncio.to_thread) -> Image:
    """Read and check all tables of an image.

    For RAFS that is the bootstrap and the chunk information of every blob; file data, and the tree, are not
    looked at. For plain EROFS it is all metadata of the primary, since the kernel will read them unasked.

    Args:
        run_blocking: Parsing takes a while, and reading of a remote image happens in there, too.

    Raises:
        CorruptImage, UnsupportedImage, SourceError: The message names the object.
    """
    if located.kind == "rafs":
        bootstrap = await run_blocking(_parse, located)
        metas = await _fetch_metas(located, bootstrap)
        return await run_blocking(_rafs_image, bootstrap, metas)
    return await _open_erofs(located, run_blocking)


async def fetch_blob_metas(located: Located) -> dict[str, bytes]:
    """The chunk information of every blob of a RAFS image, by blob id: with them it opens without its source.

    Raises:
        As open_image.
    """
    bootstrap = await asyncio.to_thread(_parse, located)
    return await _fetch_metas(located, bootstrap)


def open_tree(image: Image, read: ReadDevice, name: str = "image") -> ErofsTree:
    """The file tree of an opened image. Blocking, as all that the tree does.

    Args:
        read: Gives decoded bytes of a device: slot 0 is ``image.primary`` (never asked for with RAFS), slot
            n is ``image.devices[n - 1]``. Called from the thread that walks.
        name: For error messages.

    Raises:
        CorruptImage, UnsupportedImage, SourceError: The superblock cannot be read.
    """
    if image.bootstrap is not None:
        return ErofsTree(RafsReader(parse_bootstrap(name, image.bootstrap), image.devices, read))
    assert image.primary is not None  # one of the two is there
    primary = PagedSource(_DeviceSource(name, image.primary.size, read))
    return ErofsTree(ErofsReader(primary, read, flat=not image.devices))


# --- RAFS ---


def _parse(located: Located) -> Bootstrap:
    assert located.bootstrap is not None  # Located's promise for this kind
    return parse_bootstrap(f"{located.ref}: bootstrap", located.bootstrap, located.primary)


async def _fetch_metas(located: Located, bootstrap: Bootstrap) -> dict[str, bytes]:
    tasks: dict[str, asyncio.Task[bytes]] = {}
    try:
        async with asyncio.TaskGroup() as group:
            for blob in bootstrap.blobs:
                if blob.chunk_count:
                    tasks[blob.blob_id] = group.create_task(_blob_meta(located, blob))
    except BaseExceptionGroup as exc:
        raise _first(exc) from exc
    return {blob_id: task.result() for blob_id, task in tasks.items()}


async def _blob_meta(located: Located, blob: BlobEntry) -> bytes:
    shipped = located.blob_metas.get(blob.blob_id)
    if shipped is not None and usable(blob, shipped):
        return shipped
    if blob.features & rafs.SEPARATE:
        what = f"{located.ref}: chunk information of blob {blob.blob_id}"
        raise UnsupportedImage(f"{what} is in an object of its own, which did not come with the bootstrap")
    return await _fetch(located.backend, blob.blob_id, Range.of(*blob.meta_range))


def _rafs_image(bootstrap: Bootstrap, metas: Mapping[str, bytes]) -> Image:
    columns = []
    for blob in bootstrap.blobs:
        name = f"{bootstrap.name}: blob.meta of {blob.blob_id}"
        columns.append(
            parse_blob_meta(name, blob, metas[blob.blob_id]) if blob.chunk_count else ChunkColumns()
        )
    layouts = build_layouts(bootstrap, columns)
    digesters = {layout.digester for layout in layouts}
    return Image(
        format="rafs6",
        bootstrap=bootstrap.data,
        primary=None,
        metadata=RangeSet(),
        devices=layouts,
        block_size=rafs.BLOCK_SIZE,
        verified=", ".join(sorted(d for d in digesters if d)) or bootstrap.digester,
        prefetch=bootstrap.prefetch,
    )


# --- plain EROFS ---


async def _open_erofs(located: Located, run_blocking: RunBlocking) -> Image:
    assert located.primary is not None  # Located's promise for this kind
    size = await located.backend.size(located.primary)
    loop = asyncio.get_running_loop()
    source = _BackendSource(located.ref, size, located.backend, located.primary, loop)
    try:
        reader, metadata = await run_blocking(_survey, PagedSource(source), not located.devices)
    except BaseException:
        source.give_up()  # a cancelled wait does not end the thread
        raise
    return Image(
        format="erofs",
        bootstrap=None,
        primary=uniform_layout(located.primary, size, pin=_pin(located, located.primary, size)),
        metadata=metadata.ranges,
        devices=await _devices(located, reader),
        block_size=reader.block_size,
        compressed=metadata.compressed,
    )


def _survey(source: PagedSource, may_be_flat: bool) -> tuple[ErofsReader, Metadata]:
    reader = ErofsReader(source)
    reader.flat = may_be_flat and _appended(reader)
    stated = reader.super.block_count * reader.block_size
    # With devices some writers count their blocks, too; alone, a primary shorter than stated is cut off.
    if not reader.super.devices and stated > source.size:
        raise corrupt(source.name, 1024 + 36, "blocks", f"{stated} bytes stated, {source.size} are there")
    return reader, survey(reader)


async def _devices(located: Located, reader: ErofsReader) -> tuple[BlobLayout, ...]:
    slots = reader.super.devices
    bits = reader.super.block_bits
    ids = located.devices
    if reader.flat:
        return ()  # mounted without devices
    if not ids:
        ids = tuple(slot.tag.rstrip(b"\0").decode("latin-1") for slot in slots)
    if len(ids) != len(slots) or not all(ids):
        raise UnsupportedImage(
            f"{located.ref}: {len(slots)} devices, but {len(list(filter(None, ids)))} blobs"
        )
    layouts = []
    for slot, blob_id in zip(slots, ids, strict=True):
        size = await located.backend.size(blob_id)
        if size < slot.block_count << bits:
            problem = f"device {blob_id} has {size} bytes, the device table states {slot.block_count << bits}"
            raise CorruptImage(f"{located.ref}: {problem}")
        layouts.append(uniform_layout(blob_id, size, pin=_pin(located, blob_id, size)))
    return tuple(layouts)


def _appended(reader: ErofsReader) -> bool:
    """True if all extra devices lie in the primary, at their unified addresses."""
    ends = [
        slot.mapped_block + slot.block_count << reader.super.block_bits
        for slot in reader.super.devices
        if slot.mapped_block and slot.block_count
    ]
    return bool(ends) and len(ends) == len(reader.super.devices) and max(ends) <= reader.source.size


def _pin(located: Located, blob_id: str, size: int) -> str:
    # A device that only its tag names has no pin: then where it came from and its size have to do.
    return located.pins.get(blob_id) or f"{located.backend.name}/{blob_id}/{size}"


# --- bytes ---


async def _fetch(backend: Backend, blob_id: str, want: Range) -> bytes:
    async with streaming(backend, blob_id, want) as pieces:
        return b"".join([piece async for piece in pieces])


class _BackendSource:
    """A blob as a ByteSource, for threads beside the loop."""

    def __init__(
        self, name: str, size: int, backend: Backend, blob_id: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.name = name
        self.size = size
        self._backend = backend
        self._blob_id = blob_id
        self._loop = loop
        self._pending: Future[bytes] | None = None
        self._given_up = False

    def pread(self, offset: int, length: int) -> bytes:
        """See ByteSource. PagedSource has checked the range."""
        if self._given_up:
            raise SourceError(f"{self.name}: nobody waits for it any more")
        coming = _fetch(self._backend, self._blob_id, Range.of(offset, length))
        pending = self._pending = asyncio.run_coroutine_threadsafe(coming, self._loop)
        if self._given_up:  # between the first look and the assignment, when there was nothing to cancel
            pending.cancel()
        return pending.result()

    def give_up(self) -> None:
        """Let the thread that reads fail: now, if it waits, else with its next read."""
        self._given_up = True
        if self._pending is not None:
            self._pending.cancel()


class _DeviceSource:
    """Slot 0 of a reading function as a ByteSource."""

    def __init__(self, name: str, size: int, read: ReadDevice) -> None:
        self.name = name
        self.size = size
        self._read = read

    def pread(self, offset: int, length: int) -> bytes:
        """See ByteSource. PagedSource has checked the range."""
        return self._read(0, Range.of(offset, length))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a task group failed of: an error of ours if there is one."""
    leaves = list(group.exceptions)
    return next((exc for exc in leaves if isinstance(exc, ErofsdError)), leaves[0])
