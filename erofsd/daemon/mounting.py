"""Mounts: made, brought back, taken down.

One image is mounted in this order, and a crash after any step is mended by :meth:`Mounts.restore`:

    find it (source) -> open it (tables checked) -> save it (mounts come back without the network)
    -> bind its blobs -> guard them -> row in the table -> mount(2) -> superblock noted in the row

and taken down in this:

    umount(2) -> row deleted, or kept as *lingering* while another mount namespace has the superblock
    -> superblock gone -> guards dropped, blobs closed
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import structlog

from erofsd.api import MountInfo, MountRequest
from erofsd.backends.measured import MeasuredBackend
from erofsd.blobs.store import Binding, BlobStore, StoredBlob
from erofsd.daemon.guards import Guards
from erofsd.daemon.images import ImageLoader, OpenedImage
from erofsd.daemon.mountinfo import MountPoint, mount_points, superblocks
from erofsd.daemon.state import MountRecord, MountTable
from erofsd.errors import ErofsdError, NotPossibleHere
from erofsd.fill.provider import FillProvider
from erofsd.images.base import Image
from ondemand import syscalls

BUSY_PATIENCE_S = 2.0  # after a lazy unmount: readers that were let go need a moment to close
LINGER_POLL_S = 0.5

log = structlog.get_logger("erofsd.mounting")


async def resolve(directory: str) -> str:
    """*directory* without symbolic links; in a thread, since the path may lead through a mount of our own."""
    return await asyncio.to_thread(os.path.realpath, directory)


def boot_id() -> str:
    """Changes with every boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(slots=True)
class Mount:
    """One mount of an image, alive or lingering."""

    record: MountRecord
    image: Image | None = None
    digest: str = ""
    source: MeasuredBackend | None = None
    bindings: list[Binding] = field(default_factory=list)
    device: str = ""
    last_error: str = ""

    @property
    def blobs(self) -> list[StoredBlob]:
        """The stored blobs of all device slots; an image may name one twice."""
        return list({binding.blob.name: binding.blob for binding in self.bindings}.values())

    @property
    def complete(self) -> bool:
        """True if no read of this mount can need the network."""
        return self.image is not None and all(not binding.missing_count for binding in self.bindings)


class Mounts:
    """All mounts of this daemon. Its methods are the API's verbs."""

    def __init__(
        self,
        *,
        table: MountTable,
        loader: ImageLoader,
        store: BlobStore,
        provider: FillProvider,
        guards: Guards | None,
        why_not: Sequence[str],
    ) -> None:
        self._table = table
        self._loader = loader
        self._store = store
        self._provider = provider
        self._guards = guards
        self._why_not = why_not
        self._mounts: dict[str, Mount] = {}  # by record.name
        self._locks: dict[str, asyncio.Lock] = {}
        self._gone = asyncio.Event()
        self._mount_lock = asyncio.Lock()  # one mount(2) at a time: its superblock is the new name in sysfs

    def __iter__(self) -> Iterator[Mount]:
        return iter(self._mounts.values())

    def find(self, directory: str) -> Mount | None:
        """The mount at *directory*."""
        return self._mounts.get(directory)

    def _lock(self, directory: str) -> asyncio.Lock:
        return self._locks.setdefault(directory, asyncio.Lock())

    # -- mount ------------------------------------------------------------------------------------------

    async def mount(self, request: MountRequest) -> Mount:
        """Mount an image, or find that it is mounted already.

        Raises:
            ErofsdError: Any of its family; nothing is left behind.
        """
        guards = self._require_engine(request.engine)
        directory = await resolve(request.dir)
        async with self._lock(directory):
            if (mount := self._mounts.get(directory)) is not None:
                if mount.record.ref != request.ref:
                    raise ErofsdError(
                        f"{directory}: {mount.record.ref} is mounted there",
                        hint=f"erofsd umount {directory}",
                    )
                if mount.image is not None:
                    return mount
                await self._forget(mount)  # failed to come back earlier: try afresh
            if not await asyncio.to_thread(os.path.isdir, directory):
                raise ErofsdError(f"{directory}: no such directory", hint=f"mkdir -p {directory}")
            for point in mount_points():
                if point.directory == directory and point.fstype == "erofs":
                    raise ErofsdError(
                        f"{directory}: another EROFS is mounted there", hint=f"umount {directory}"
                    )
            opened = await self._loader.fetch(request)
            record = MountRecord(
                dir=directory,
                ref=request.ref,
                image=opened.key,
                engine="fanotify",
                prefetch=request.prefetch,
                blobs=tuple(request.blobs or ()),
                plain_http=request.plain_http,
                boot_id=boot_id(),
            )
            mount = Mount(record)
            try:
                self._bind(mount, opened)
                await self._bring_up(guards, mount)
            except BaseException as exc:
                self._table.delete(mount.record)
                await self._release(mount)
                if isinstance(exc, OSError):
                    raise ErofsdError(f"{directory}: {exc.strerror or exc}") from exc
                raise
            log.info("image.mounted", dir=directory, ref=request.ref, format=opened.image.format)
            return mount

    @asynccontextmanager
    async def borrowed(self, request: MountRequest) -> AsyncIterator[Mount]:
        """An image bound to its blobs without being mounted, for as long as the context lasts."""
        self._require_engine("auto")
        opened = await self._loader.fetch(request)
        record = MountRecord(dir="", ref=request.ref, image=opened.key, engine="")
        mount = Mount(record)
        try:
            self._bind(mount, opened)
            yield mount
        finally:
            await self._release(mount)

    def _require_engine(self, name: str) -> Guards:
        if name in ("cachefiles", "nbd"):
            raise NotPossibleHere(
                f"engine {name}: this version has none",
                hint="--engine fanotify, or auto, on Linux 6.15 and later",
            )
        if self._guards is None:
            raise NotPossibleHere(f"engine fanotify: {self._why_not[0]}", hint=self._why_not[1])
        return self._guards

    def _bind(self, mount: Mount, opened: OpenedImage, *, stored: tuple[str, ...] = ()) -> None:
        """Bind the blobs of *mount*; to those named in *stored* where a living superblock has them open."""
        assert self._guards is not None
        mount.image = opened.image
        mount.digest = opened.digest
        mount.source = opened.source
        image = opened.image
        layouts = list(image.devices) if image.primary is None else [image.primary, *image.devices]
        names = stored or (None,) * len(layouts)
        for layout, name in zip(layouts, names, strict=True):
            binding = self._store.bind(layout, name=name)
            binding.image = mount.record.ref
            binding.source = opened.source
            mount.bindings.append(binding)
            self._guards.attach(binding.blob)

    async def _bring_up(self, guards: Guards, mount: Mount) -> None:
        assert mount.image is not None
        if mount.image.primary is not None:
            for part in mount.image.metadata:
                await self._provider.ensure(mount.bindings[0], part)
        async with guards.mounting(mount.blobs):
            names = tuple(binding.blob.name for binding in mount.bindings)
            mount.record = msgspec.structs.replace(mount.record, stored=names)
            self._table.put(mount.record)
            async with self._mount_lock:
                before = superblocks()
                await asyncio.to_thread(self._mount_erofs, mount)
                new = sorted(superblocks() - before)
            self._replace(mount, msgspec.structs.replace(mount.record, superblocks=tuple(new)))
            self._mounts[mount.record.name] = mount
            mount.device = self._device_at(mount.record.dir)

    def _mount_erofs(self, mount: Mount) -> None:
        assert mount.image is not None
        paths = [str(binding.blob.path) for binding in mount.bindings]
        if mount.image.primary is None:
            source = str(self._loader.files.bootstrap_path(mount.record.image))
        else:
            source = paths.pop(0)
        syscalls.mount_erofs(source, mount.record.dir, paths)

    def _replace(self, mount: Mount, record: MountRecord) -> None:
        self._table.replace(mount.record, record)
        self._mounts.pop(mount.record.name, None)
        mount.record = record

    @staticmethod
    def _device_at(directory: str) -> str:
        device = ""
        for point in mount_points():
            if point.directory == directory and point.fstype == "erofs":
                device = point.device  # the last line is the topmost mount
        return device

    # -- umount -----------------------------------------------------------------------------------------

    async def umount(self, directory: str) -> None:
        """Unmount *directory* for good.

        Raises:
            ErofsdError: It is not ours, or in use.
        """
        directory = await resolve(directory)
        async with self._lock(directory):
            mount = self._mounts.get(directory)
            if mount is None:
                raise ErofsdError(f"{directory}: nothing of erofsd is mounted there", hint="erofsd ls")
            if self._is_mounted(mount):
                try:
                    await asyncio.to_thread(syscalls.umount2, directory, 0)
                except OSError as exc:
                    if exc.errno != errno.EBUSY:
                        raise ErofsdError(f"{directory}: umount: {exc.strerror}") from exc
                    raise ErofsdError(
                        f"{directory}: in use", hint=f"who uses it: fuser -vm {directory}"
                    ) from exc
            await self._retire(mount)

    def _is_mounted(self, mount: Mount, points: list[MountPoint] | None = None) -> bool:
        return any(
            point.directory == mount.record.dir and point.fstype == "erofs" and point.device == mount.device
            for point in (mount_points() if points is None else points)
        )

    def _alive(self, mount: Mount) -> bool:
        """True if the superblock exists, here or in another mount namespace."""
        return mount.record.boot_id == boot_id() and bool(superblocks() & set(mount.record.superblocks))

    async def _retire(self, mount: Mount) -> None:
        """It is unmounted here: forget it, or keep guarding it for those who still have it."""
        directory = mount.record.dir
        if self._alive(mount):
            self._replace(mount, msgspec.structs.replace(mount.record, lingering=True))
            self._mounts[mount.record.name] = mount
            log.warning("mount.lingering", dir=directory, superblocks=mount.record.superblocks)
        else:
            await self._forget(mount)
        log.info("image.unmounted", dir=directory, ref=mount.record.ref)

    async def wait_gone(self, directory: str) -> None:
        """Wait until nothing of ours is at *directory*, and nobody else has its superblock either."""
        while any(mount.record.dir == directory for mount in self):
            self._gone.clear()
            await self._gone.wait()

    async def _forget(self, mount: Mount) -> None:
        self._table.delete(mount.record)
        self._gone.set()
        self._mounts.pop(mount.record.name, None)
        await self._release(mount)
        self._loader.files.remove_unused({m.record.image for m in self})

    async def _release(self, mount: Mount) -> None:
        blobs = mount.blobs
        for binding in mount.bindings:
            binding.release()
        mount.bindings.clear()
        if mount.source is not None:
            await mount.source.aclose()
        if self._guards is not None:
            for blob in blobs:
                if not blob.bindings:
                    await self._guards.drop(blob)

    async def look_around(self) -> None:
        """Notice what umount(8) took down: it is as good as our own."""
        points = mount_points()
        for mount in list(self):
            directory = mount.record.dir
            if mount.record.lingering or not mount.device or self._lock(directory).locked():
                continue  # whoever has the lock is changing it; the change calls us again
            if not self._is_mounted(mount, points):
                async with self._lock(directory):
                    if self._mounts.get(directory) is mount:
                        await self._retire(mount)

    async def release_lingering(self) -> None:
        """Drop the guards of superblocks that are gone by now; runs until cancelled."""
        while True:
            await asyncio.sleep(LINGER_POLL_S)
            for mount in [m for m in self if m.record.lingering and not self._alive(m)]:
                log.info("mount.gone", dir=mount.record.dir, superblocks=mount.record.superblocks)
                await self._forget(mount)

    # -- restore and stop -------------------------------------------------------------------------------

    async def restore(self, *, first: bool) -> None:
        """Bring back what the table says.

        Args:
            first: No worker before this one had the group: what is mounted was unguarded in between, so its
                page cache may hold zeros. It is mounted anew.
        """
        for record in self._table.all():
            mount = Mount(record)
            try:
                await self._restore_one(mount, first=first)
            except (ErofsdError, OSError) as exc:
                # One broken image must not keep the others from coming back.
                mount.last_error = str(exc)
                self._mounts[mount.record.name] = mount
                log.error("mount.failed", dir=record.dir, ref=record.ref, error=str(exc))

    async def _restore_one(self, mount: Mount, *, first: bool) -> None:
        record = mount.record
        if record.lingering and not self._alive(mount):
            self._table.delete(record)
            return
        device = "" if record.lingering else self._device_at(record.dir)
        if not first and not record.lingering and record.superblocks and not device:
            self._table.delete(record)  # unmounted by umount(8) while there was no worker
            return
        guards = self._require_engine(record.engine)
        alive = record.lingering or (device and not first)
        self._bind(mount, await self._loader.load(record), stored=record.stored if alive else ())
        if record.lingering:
            async with guards.mounting(mount.blobs):
                self._mounts[record.name] = mount
        elif device and (not first or mount.complete):
            # Complete now means complete then: nobody fills without a worker, so no reader got a hole.
            mount.device = device
            self._mounts[record.name] = mount
            if not record.superblocks:  # killed between mount(2) and the note of its name
                self._replace(
                    mount, msgspec.structs.replace(record, superblocks=tuple(sorted(superblocks())))
                )
                self._mounts[record.name] = mount
            async with guards.mounting(mount.blobs):
                pass
        else:
            if device:
                log.warning("mount.suspect", dir=record.dir, ref=record.ref)
                await asyncio.to_thread(syscalls.umount2, record.dir, syscalls.MNT_DETACH)
            await asyncio.to_thread(os.makedirs, record.dir, exist_ok=True)
            self._replace(mount, msgspec.structs.replace(record, superblocks=(), boot_id=boot_id()))
            await self._bring_up(guards, mount)
            log.info("image.restored", dir=record.dir, ref=record.ref)

    async def stop(self, *, keep_complete: bool, spoil: Callable[[StoredBlob], None]) -> bool:
        """Unmount everything; rows stay, so the next ``serve`` brings it back.

        Args:
            keep_complete: Leave mounts in place that need nobody any more.
            spoil: Makes every further read of an incomplete blob fail; blocks; called in a thread.

        Returns:
            True if everything is down; False if an incomplete superblock is held elsewhere, and was spoilt.
        """
        leaving = [m for m in self if not (keep_complete and m.complete and not m.record.lingering)]
        for mount in leaving:
            if not mount.record.lingering and self._is_mounted(mount):
                try:
                    await asyncio.to_thread(syscalls.umount2, mount.record.dir, 0)
                except OSError:
                    await asyncio.to_thread(syscalls.umount2, mount.record.dir, syscalls.MNT_DETACH)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + BUSY_PATIENCE_S
        held = [mount for mount in leaving if self._alive(mount)]
        while held and loop.time() < deadline:
            await asyncio.sleep(0.05)  # sysfs tells nobody when a superblock goes
            held = [mount for mount in held if self._alive(mount)]
        clean = True
        for mount in held:
            incomplete = [blob for blob in mount.blobs if not blob.complete]
            for blob in incomplete:
                log.error("blob.spoilt", dir=mount.record.dir, ref=mount.record.ref, blob_id=blob.name)
                await asyncio.to_thread(spoil, blob)
                clean = False
        return clean

    # -- views ------------------------------------------------------------------------------------------

    def describe(self, mount: Mount) -> MountInfo:
        """*mount* as ``ls`` shows it."""
        fetched = sum(binding.fetched_stored_bytes for binding in mount.bindings)
        total = sum(binding.total_stored_bytes for binding in mount.bindings)
        seen = self._provider.statistics(mount.record.ref)
        failed = mount.image is None
        return MountInfo(
            dir=mount.record.dir,
            ref=mount.record.ref,
            engine=mount.record.engine,
            state="failed" if failed else "complete" if mount.complete else "lazy",
            verified=mount.image.verified if mount.image else "none",
            fetched_bytes=fetched,
            total_bytes=total,
            transferred_bytes=mount.source.transferred_bytes if mount.source else 0,
            waits=seen.waits,
            errors=seen.errors,
            image=mount.record.image,
            digest=mount.digest,
            format=mount.image.format if mount.image else "",
            mounted_at=mount.record.mounted_at,
            last_error=mount.last_error or seen.last_error,
            source=mount.source.name if mount.source else "",
        )
