"""Which blobs are guarded, and the order in which that may change.

The kernel asks nobody about a file that carried no mark when it was opened, and lets go of every reader when
nobody holds the group. So, for each blob, in this order and never another:

    open it, before any mark -> the keeper holds that descriptor -> mark -> mount(2)
    every stated chunk present, verified and durable, no mount under way -> unmark -> the keeper lets go
    superblock gone -> unmark -> the keeper lets go -> close

Every blob is marked before every mount, complete or not: a mark that is set later would not reach that mount.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from erofsd.blobs.store import StoredBlob
from erofsd.daemon.keeper import Inheritance
from erofsd.daemon.link import WorkerLink
from erofsd.fill.provider import FillProvider
from ondemand.engines.fanotify import FanotifyEngine, FileSink
from ondemand.provider import ObjectKey

log = structlog.get_logger("erofsd.guards")


def object_key(blob: StoredBlob) -> ObjectKey:
    """The name under which engine and provider know *blob*."""
    return ObjectKey(blob.name.encode())


class Guards:
    """Guards blobs of the fanotify engine."""

    def __init__(
        self, engine: FanotifyEngine, provider: FillProvider, link: WorkerLink, inheritance: Inheritance
    ) -> None:
        self._engine = engine
        self._provider = provider
        self._link = link
        self._inheritance = inheritance
        self._guarded: set[str] = set()
        self._locks: dict[str, asyncio.Lock] = {}
        self._pins: Counter[str] = Counter()

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def attach(self, blob: StoredBlob) -> None:
        """Let *blob* be filled, guarded or not."""
        self._provider.attach(object_key(blob), blob, FileSink(blob.fd))

    def adopt(self, name: str, fd: int) -> None:
        """*name* was held and marked when the worker before this one died."""
        self._engine.adopt(ObjectKey(name.encode()), fd)
        self._guarded.add(name)

    @asynccontextmanager
    async def mounting(self, blobs: list[StoredBlob]) -> AsyncIterator[None]:
        """Guard *blobs* while a mount is made of them; afterwards those that are complete are let go."""
        self._pins.update(blob.name for blob in blobs)
        try:
            for blob in blobs:
                await self._guard(blob)
            yield
        finally:
            self._pins.subtract(blob.name for blob in blobs)
            for blob in blobs:
                await self.relax(blob)

    async def _guard(self, blob: StoredBlob) -> None:
        async with self._lock(blob.name):
            if blob.name in self._guarded:
                return
            await self._link.hold(blob.name, blob.fd)
            self._inheritance.blobs[blob.name] = blob.fd
            self._engine.guard(object_key(blob), blob.fd)
            self._guarded.add(blob.name)

    async def relax(self, blob: StoredBlob) -> None:
        """Stop guarding *blob* if every byte that any mount may read is there for good."""
        if not blob.complete or blob.name not in self._guarded:
            return
        try:
            await blob.flush()
        except OSError as exc:
            # What was not durable is not complete any more: it goes on being guarded, and is fetched again.
            log.error("blob.unflushed", blob_id=blob.name, error=str(exc))
            return
        async with self._lock(blob.name):
            if blob.complete and not self._pins[blob.name] and blob.name in self._guarded:
                await self._let_go(blob.name)
                log.info("blob.completed", blob_id=blob.name)

    async def drop(self, blob: StoredBlob) -> None:
        """Forget *blob*: no superblock uses it any more."""
        async with self._lock(blob.name):
            if blob.bindings:
                return  # somebody mounted it while we waited
            if blob.name in self._guarded:
                await self._let_go(blob.name)
            self._provider.detach(object_key(blob))
            blob.close()

    async def forget(self, name: str) -> None:
        """Let go of what a dead worker left guarded and no mount needs."""
        async with self._lock(name):
            if name in self._guarded:
                await self._let_go(name)

    async def _let_go(self, name: str) -> None:
        self._engine.unguard(ObjectKey(name.encode()))
        self._guarded.discard(name)
        self._inheritance.blobs.pop(name, None)
        await self._link.release(name)
