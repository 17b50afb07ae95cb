"""One mount, and what an engine does for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from erofsd.backends.measured import MeasuredBackend
from erofsd.blobs.store import Binding, BlobStore, StoredBlob
from erofsd.daemon.images import OpenedImage
from erofsd.daemon.state import MountRecord
from erofsd.images.base import Image


@dataclass(slots=True, eq=False)
class Mount:
    """One mount of an image: under way, alive, registered for mount(8), or lingering.

    Attributes:
        bindings: What the image is made of: the primary where it is filled on demand (plain EROFS), then the
            device slots in order.
        boot: The bootstrap of RAFS, where the engine serves that, too.
        device: ``major:minor`` of the superblock; empty while it is not mounted here.
        seen_at: Where somebody has mounted a registered image.
        doubted: Stored blobs that its superblock has open, though it failed to come back (`Host.doubt`).
    """

    record: MountRecord
    image: Image | None = None
    digest: str = ""
    source: MeasuredBackend | None = None
    bindings: list[Binding] = field(default_factory=list)
    boot: Binding | None = None
    device: str = ""
    seen_at: str = ""
    last_error: str = ""
    doubted: tuple[str, ...] = ()

    @property
    def all_bindings(self) -> list[Binding]:
        """In the order of what the kernel opens: primary or bootstrap first."""
        return self.bindings if self.boot is None else [self.boot, *self.bindings]

    @property
    def blobs(self) -> list[StoredBlob]:
        """All stored blobs; an image may name one twice."""
        return list({binding.blob.name: binding.blob for binding in self.all_bindings}.values())

    @property
    def directory(self) -> str:
        """Where it is mounted; empty if nowhere."""
        return self.record.dir or self.seen_at

    @property
    def complete(self) -> bool:
        """True if no read of this mount can need the network."""
        return self.image is not None and all(not binding.missing_count for binding in self.bindings)


async def in_thread(work: Callable[..., None], *arguments: Any) -> None:
    """Call *work* in a thread, to its end even if we are cancelled: what it does must be known afterwards."""
    future = asyncio.get_running_loop().run_in_executor(None, partial(work, *arguments))
    try:
        await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise


class Host(Protocol):
    """An engine, as mounting sees it.

    Attributes:
        engine: Its name.
        store: Where the blobs that it serves are.
    """

    engine: str
    store: BlobStore

    def check(self, image: Image) -> None:
        """Refuse what this kernel cannot mount this way.

        Raises:
            NotPossibleHere: Says why.
        """
        ...

    def bind(self, mount: Mount, opened: OpenedImage, stored: tuple[str, ...]) -> None:
        """Bind the blobs of *mount* and let them be filled.

        Args:
            stored: Names of the stored blobs that a living superblock has open; empty: any that fit.
        """
        ...

    def options(self, mount: Mount) -> str:
        """What ``mount -t erofs -o`` needs, where mount(8) can do it.

        Raises:
            NotPossibleHere: It cannot.
        """
        ...

    async def prepare(self, mount: Mount) -> None:
        """Do what must be done before mount(2).

        Raises:
            ErofsdError: It cannot be.
        """
        ...

    def serving(self, mount: Mount) -> AbstractAsyncContextManager[None]:
        """While this lasts, mount(2) of *mount* is safe; afterwards it stays so while anything uses it."""
        ...

    async def mount(self, mount: Mount) -> None:
        """mount(2).

        Raises:
            OSError: Names what was attempted.
        """
        ...

    async def relax(self, blob: StoredBlob) -> None:
        """*blob* may have become complete: stop spending anything on it if so."""
        ...

    async def drop(self, blob: StoredBlob) -> None:
        """No superblock uses *blob* any more."""
        ...

    def spoil(self, blob: StoredBlob) -> None:
        """Make every further read of incomplete *blob* an error. Blocks."""
        ...

    def doubt(self, names: Iterable[str]) -> None:
        """Superblocks have the stored blobs *names* open, and nobody can say what they need of them."""
        ...

    async def settle(self, names: Iterable[str]) -> None:
        """A `doubt` is over: those superblocks are gone, or are mounts of ours again."""
        ...
