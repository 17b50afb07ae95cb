"""fanotify as a host: which blobs are guarded, and the order in which that may change.

The kernel asks nobody about a file that carried no mark when it was opened, and lets go of every reader when
nobody holds the group. So, for each blob, in this order and never another:

    open it, before any mark -> the keeper holds that descriptor -> mark -> mount(2)
    every stated chunk present, verified and durable, no mount under way, no doubt -> unmark -> ...
    superblock gone -> unmark -> the keeper lets go -> close

Every blob is marked before every mount, complete or not: a mark that is set later would not reach that mount.

A blob is in *doubt* while a superblock may have it open of which it is not known which chunks it needs: after
a worker's death until all mounts are back, and as long as one of them has failed to come back. Another image
may have all that it wants of the same blob then, and be unmounted; the guard stays.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import structlog

from erofsd.blobs.store import BlobStore, StoredBlob
from erofsd.daemon.images import OpenedImage
from erofsd.daemon.inheritance import Inheritance
from erofsd.daemon.link import WorkerLink
from erofsd.daemon.mount import Mount, in_thread
from erofsd.daemon.state import ImageFiles
from erofsd.errors import NotPossibleHere
from erofsd.fill.provider import FillProvider
from erofsd.images.base import Image
from ondemand import syscalls
from ondemand.engines.fanotify import FanotifyEngine, FileSink
from ondemand.provider import ObjectKey

log = structlog.get_logger("erofsd.guards")


def object_key(name: str) -> ObjectKey:
    """The name under which engine and provider know the stored blob *name*."""
    return ObjectKey(name.encode())


class Guards:
    """Guards blobs with fanotify, and mounts images over them file by file."""

    engine = "fanotify"

    def __init__(
        self,
        engine: FanotifyEngine,
        *,
        store: BlobStore,
        files: ImageFiles,
        provider: FillProvider,
        link: WorkerLink,
        inheritance: Inheritance,
    ) -> None:
        self.store = store
        self._engine = engine
        self._files = files
        self._provider = provider
        self._link = link
        self._inheritance = inheritance
        self._guarded: set[str] = set()
        self._locks: dict[str, asyncio.Lock] = {}
        self._pins: Counter[str] = Counter()
        self._doubts: Counter[str] = Counter()

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    # -- Host -------------------------------------------------------------------------------------------

    def check(self, image: Image) -> None:
        """See Host: the probe has mounted an image, and this engine asks nothing more of one."""

    def bind(self, mount: Mount, opened: OpenedImage, stored: tuple[str, ...]) -> None:
        """See Host."""
        image = opened.image
        layouts = list(image.devices) if image.primary is None else [image.primary, *image.devices]
        for layout, name in zip(layouts, stored or (None,) * len(layouts), strict=True):
            binding = self.store.bind(layout, name=name)
            binding.image = mount.record.ref
            binding.source = opened.source
            mount.bindings.append(binding)
            blob = binding.blob
            self._provider.attach(object_key(blob.name), blob, FileSink(blob.fd))

    def options(self, mount: Mount) -> str:
        """See Host: what is marked before it is mounted is mounted by us."""
        raise NotPossibleHere("engine fanotify: a plain mount(8) of a lazy image would read zeros")

    async def prepare(self, mount: Mount) -> None:
        """See Host. The kernel reads the metadata of a primary image without asking: they must be there."""
        assert mount.image is not None
        if mount.image.primary is not None:
            for part in mount.image.metadata:
                await self._provider.ensure(mount.bindings[0], part)

    @asynccontextmanager
    async def serving(self, mount: Mount) -> AsyncIterator[None]:
        """See Host. Blobs that are complete are let go of in the end."""
        blobs = mount.blobs
        self._pins.update(blob.name for blob in blobs)
        try:
            for blob in blobs:
                await self._guard(blob)
            yield
        finally:
            self._pins.subtract(blob.name for blob in blobs)
            for blob in blobs:
                await self.relax(blob)

    async def mount(self, mount: Mount) -> None:
        """See Host."""
        assert mount.image is not None
        paths = [str(binding.blob.path) for binding in mount.bindings]
        if mount.image.primary is None:
            source = str(self._files.bootstrap_path(mount.record.image))
        else:
            source = paths.pop(0)
        await in_thread(syscalls.mount_erofs, source, mount.record.dir, paths)

    async def relax(self, blob: StoredBlob) -> None:
        """See Host."""
        if not blob.complete or blob.name not in self._guarded:
            return
        try:
            await blob.flush()
        except OSError as exc:
            # What was not durable is not complete any more: it goes on being guarded, and is fetched again.
            log.error("blob.unflushed", blob_id=blob.name, error=str(exc))
            return
        async with self._lock(blob.name):
            if blob.complete and not self._is_needed(blob.name) and blob.name in self._guarded:
                await self._let_go(blob.name)
                log.info("blob.completed", blob_id=blob.name)

    async def drop(self, blob: StoredBlob) -> None:
        """See Host."""
        async with self._lock(blob.name):
            if blob.bindings or self._doubts[blob.name]:
                return  # somebody bound it while we waited, or may have it open
            guarded = blob.name in self._guarded
            if guarded:
                self._unguard(blob.name)
            # No await up to here: from now on whoever binds it opens it anew, after the mark is gone.
            self._provider.detach(object_key(blob.name))
            blob.close()
            if guarded:
                await self._link.release(blob.name)

    def spoil(self, blob: StoredBlob) -> None:
        """See Host. Truncated files give EIO; holes would give zeros once the group is closed."""
        blob.spoil()

    # -- a dead worker's guards -------------------------------------------------------------------------

    def adopt(self, name: str, fd: int) -> None:
        """*name* was held and marked when the worker before this one died."""
        self._engine.adopt(object_key(name), fd)
        self._guarded.add(name)

    def doubt(self, names: Iterable[str]) -> None:
        """See Host."""
        self._doubts.update(names)

    async def settle(self, names: Iterable[str]) -> None:
        """See Host. What a dead worker left guarded and no mount needs is let go."""
        names = list(names)
        self._doubts.subtract(names)
        for name in names:
            blob = self.store.opened(name)
            if blob is None:
                await self._forget(name)
            elif blob.bindings:
                await self.relax(blob)
            else:
                await self.drop(blob)

    async def _forget(self, name: str) -> None:
        async with self._lock(name):
            if name in self._guarded and not self._is_needed(name) and self.store.opened(name) is None:
                fd = self._inheritance.blobs[name]
                await self._let_go(name)
                os.close(fd)

    def in_doubt(self, key: ObjectKey) -> bool:
        """True between `doubt` and `settle` of what *key* names."""
        return self._doubts[key.cookie.decode()] > 0

    async def spoil_doubtful(self) -> bool:
        """Before the group goes: make reads of what may still be open somewhere fail.

        Returns:
            True if there was nothing of that kind.
        """
        names = [name for name in self._guarded if self._doubts[name]]
        for name in names:
            log.error("blob.spoilt", blob_id=name)
            await asyncio.to_thread(self.store.drop, name)
        return not names

    def _is_needed(self, name: str) -> bool:
        return bool(self._pins[name] or self._doubts[name])

    # -- marks and descriptors --------------------------------------------------------------------------

    async def _guard(self, blob: StoredBlob) -> None:
        async with self._lock(blob.name):
            if blob.name in self._guarded:
                return
            await self._link.hold(blob.name, blob.fd)
            self._inheritance.blobs[blob.name] = blob.fd
            self._engine.guard(object_key(blob.name), blob.fd)
            self._guarded.add(blob.name)

    def _unguard(self, name: str) -> None:
        self._engine.unguard(object_key(name))
        self._guarded.discard(name)
        self._inheritance.blobs.pop(name, None)

    async def _let_go(self, name: str) -> None:
        self._unguard(name)
        await self._link.release(name)
