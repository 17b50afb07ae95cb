"""An image opened where it lies, without a daemon: what ``inspect`` and ``check`` look at."""

from __future__ import annotations

import argparse
import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from erofsd.backends.base import Backend
from erofsd.backends.located import Located, locate
from erofsd.backends.settings import SourceSettings
from erofsd.blobs.layout import BlobLayout
from erofsd.cli.options import load_config
from erofsd.cli.verify import DecodedBlob, fetch
from erofsd.images.base import Entry, Image
from erofsd.images.erofs.tree import ErofsTree
from erofsd.images.open import open_image, open_tree
from erofsd.images.source import check_range
from erofsd.logging import configure_logging
from ondemand.ranges import Range


@dataclass(frozen=True, slots=True)
class Opened:
    """An image with all of its tables checked.

    Attributes:
        tree: Blocking: for a thread beside the event loop that runs the source.
        slots: Device slot and layout of everything that is fetched on demand; a plain primary is slot 0.
    """

    located: Located
    image: Image
    tree: ErofsTree
    slots: tuple[tuple[int, BlobLayout], ...]

    def check_content(self, entry: Entry) -> None:
        """See that every byte of a regular file lies where data is; decompress what EROFS itself compressed.

        Raises:
            ImageRefused, SourceError: It does not.
        """
        reader = self.tree.reader
        inode = reader.inode(entry.nid)
        parts = reader.content(inode) if inode.compressed else reader.extents(inode)
        deque(parts, maxlen=0)


@asynccontextmanager
async def open_ref(args: argparse.Namespace) -> AsyncIterator[Opened]:
    """The image that *args* name (``ref``, ``blobs``, ``plain_http``, ``config``).

    Raises:
        UsageError, ConfigError, ImageRefused, SourceError: The message names the object.
    """
    configure_logging("error")  # what the user has to know comes as an exception
    config = load_config(args)
    settings = SourceSettings(registries=config.registry, plain_http=args.plain_http)
    located = await locate(args.ref, settings=settings, blobs=args.blobs or None)
    try:
        image = await open_image(located)
        yield await asyncio.to_thread(_open_tree, located, image, asyncio.get_running_loop())
    finally:
        await located.backend.aclose()


def _open_tree(located: Located, image: Image, loop: asyncio.AbstractEventLoop) -> Opened:
    slots = list(enumerate(image.devices, 1))
    if image.primary is not None:
        slots.insert(0, (0, image.primary))
    blobs = {slot: DecodedBlob(layout, located.backend, loop) for slot, layout in slots}

    def read(slot: int, want: Range) -> bytes:
        return blobs[slot].read(want)

    tree = open_tree(image, read, located.ref)
    assert isinstance(tree, ErofsTree)  # every format that there is
    return Opened(located, image, tree, tuple(slots))


class StoredBlobSource:
    """A blob as it is stored, as a ByteSource. Blocking, like the tree."""

    def __init__(self, backend: Backend, blob_id: str, size: int, loop: asyncio.AbstractEventLoop) -> None:
        self.name = f"{backend.name}: blob {blob_id}"
        self.size = size
        self._backend = backend
        self._blob_id = blob_id
        self._loop = loop

    def pread(self, offset: int, length: int) -> bytes:
        """See ByteSource."""
        check_range(self.name, self.size, offset, length)
        want = Range.of(offset, length)
        return asyncio.run_coroutine_threadsafe(
            fetch(self._backend, self._blob_id, want), self._loop
        ).result()
