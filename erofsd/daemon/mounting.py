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
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from pathlib import Path

import msgspec
import structlog

from erofsd.api import MountInfo, MountRequest
from erofsd.daemon.images import ImageLoader, OpenedImage
from erofsd.daemon.mount import Host, Mount, in_thread
from erofsd.daemon.mountinfo import SUPERBLOCKS, MountPoint, mount_points, superblocks
from erofsd.daemon.state import MountRecord, MountTable
from erofsd.errors import ErofsdError, NotPossibleHere, UsageError
from erofsd.fill.provider import FillProvider
from ondemand import syscalls

BUSY_PATIENCE_S = 2.0  # after a lazy unmount: readers that were let go need a moment to close
LINGER_POLL_S = 0.5
STACK_MAX = 16  # mounts over mounts that the end takes down with one of ours

log = structlog.get_logger("erofsd.mounting")


def _device_at(directory: str) -> str:
    """``major:minor`` of the EROFS that is mounted at *directory*; empty if none is."""
    device = ""
    for point in mount_points():
        if point.directory == directory and point.fstype == "erofs":
            device = point.device  # the last line is the topmost mount
    return device


def _remedy(exc: OSError) -> str:
    if exc.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files of the daemon: ulimit -Hn, or LimitNOFILE= in its unit"
    return ""


async def resolve(directory: str) -> str:
    """*directory* without symbolic links; in a thread, since the path may lead through a mount of our own.

    Raises:
        UsageError: It is not absolute, or no path at all.
    """
    if not directory.startswith("/") or "\0" in directory:
        raise UsageError(f"{directory!r}: not an absolute path")
    return await asyncio.to_thread(os.path.realpath, directory)


@cache
def boot_id() -> str:
    """Changes with every boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Mounts:
    """All mounts of this daemon. Its methods are the API's verbs.

    Args:
        hosts: The engines that work here, by name, the preferred one first.
        why_not: Reason and remedy for each that does not.
    """

    def __init__(
        self,
        *,
        table: MountTable,
        loader: ImageLoader,
        provider: FillProvider,
        hosts: Mapping[str, Host],
        why_not: Mapping[str, Sequence[str]],
    ) -> None:
        self._table = table
        self._loader = loader
        self._provider = provider
        self._hosts = hosts
        self._why_not = why_not
        self._mounts: dict[str, Mount] = {}  # by record.name
        self._locks: dict[str, asyncio.Lock] = {}
        self._gone = asyncio.Event()
        self._stopping = False
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
        host = self.host(request.engine)
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
                await self._unmount(mount)  # failed to come back earlier: try afresh
                await self._retire(mount)
            if not await asyncio.to_thread(os.path.isdir, directory):
                raise ErofsdError(f"{directory}: no such directory", hint=f"mkdir -p {directory}")
            if _device_at(directory):
                raise ErofsdError(f"{directory}: another EROFS is mounted there", hint=f"umount {directory}")
            mount = await self._open(request, host, directory)
            try:
                await self._bring_up(host, mount)
            except BaseException as exc:
                await self._take_down(mount)
                await self._retire(mount)
                if isinstance(exc, OSError):
                    raise ErofsdError(f"{directory}: {exc.strerror or exc}", hint=_remedy(exc)) from exc
                raise
            log.info(
                "image.mounted", dir=directory, ref=request.ref, format=mount.image and mount.image.format
            )
            return mount

    async def _open(self, request: MountRequest, host: Host, directory: str) -> Mount:
        """Find, check and bind an image."""
        try:
            opened = await self._loader.fetch(request)
        except OSError as exc:
            raise ErofsdError(f"{request.ref}: {exc.strerror or exc}", hint=_remedy(exc)) from exc
        record = MountRecord(
            dir=directory,
            ref=request.ref,
            image=opened.key,
            engine=host.engine,
            prefetch=request.prefetch,
            blobs=tuple(request.blobs or ()),
            plain_http=request.plain_http,
            boot_id=boot_id(),
        )
        mount = Mount(record)
        try:
            host.check(opened.image)
            self._bind(host, mount, opened)
        except BaseException:
            await self._release(mount)
            raise
        return mount

    async def acquire(self, request: MountRequest, engine: str) -> Mount:
        """An image bound to its blobs and not mounted; `release` it.

        Raises:
            ErofsdError: Any of its family.
        """
        return await self._open(request, self.host(engine), "")

    async def acquire_stored(self, mount: Mount) -> None:
        """Bind a stored image to the blobs that it had.

        Raises:
            ErofsdError: As `acquire`.
        """
        record = mount.record
        self._bind(self.host(record.engine), mount, await self._loader.load(record), record.stored)

    async def release(self, mount: Mount) -> None:
        """Let go of what `acquire` has bound."""
        await self._release(mount)

    @asynccontextmanager
    async def borrowed(self, request: MountRequest) -> AsyncIterator[Mount]:
        """An image bound to its blobs without being mounted, for as long as the context lasts."""
        mount = await self._open(request, self.host("auto"), "")
        try:
            yield mount
        finally:
            await self._release(mount)

    def host(self, name: str) -> Host:
        """The engine called *name*; ``auto`` is the first that works here.

        Raises:
            NotPossibleHere: It does not work here; says why.
        """
        if name == "auto" and self._hosts:
            return next(iter(self._hosts.values()))
        if (host := self._hosts.get(name)) is not None:
            return host
        wanted = [name] if name != "auto" else list(self._why_not)
        reasons = [f"{n}: {self._why_not[n][0]}" for n in wanted if n in self._why_not]
        hints = [self._why_not[n][1] for n in wanted if n in self._why_not and self._why_not[n][1]]
        if not reasons:
            raise NotPossibleHere(f"engine {name}: this version has none", hint="--engine auto")
        raise NotPossibleHere("engine " + "; ".join(reasons), hint="; or ".join(hints))

    def _bind(self, host: Host, mount: Mount, opened: OpenedImage, stored: tuple[str, ...] = ()) -> None:
        mount.image = opened.image
        mount.digest = opened.digest
        mount.source = opened.source
        host.bind(mount, opened, stored)
        names = tuple(binding.blob.name for binding in mount.all_bindings)
        mount.record = msgspec.structs.replace(mount.record, stored=names)

    async def _bring_up(self, host: Host, mount: Mount) -> None:
        """Mount what is bound. If that fails, `_take_down` is the caller's to call."""
        await host.prepare(mount)
        async with host.serving(mount):
            self._table.put(mount.record)
            async with self._mount_lock:
                before = superblocks()
                try:
                    await host.mount(mount)
                finally:
                    mount.device = _device_at(mount.record.dir)
                    # One that this mount had before, and somebody else still has, goes on being its own.
                    new = superblocks() - before | self._own(mount)
                    self._replace(
                        mount,
                        msgspec.structs.replace(
                            mount.record, superblocks=tuple(sorted(new)), leaving=not mount.device
                        ),
                    )
            self._mounts[mount.record.name] = mount

    async def _take_down(self, mount: Mount) -> None:
        """Unmount what `_bring_up` may have mounted before it failed."""
        if mount.device:
            try:
                await in_thread(syscalls.umount2, mount.record.dir, syscalls.MNT_DETACH)
            except OSError as exc:
                log.error("mount.stuck", dir=mount.record.dir, errno=exc.errno)

    def _replace(self, mount: Mount, record: MountRecord) -> None:
        """Change the record, in memory at once: without its row, `restore` finds out what it needs."""
        old, mount.record = mount.record, record
        self._mounts.pop(old.name, None)
        try:
            self._table.replace(old, record)
        except ErofsdError as exc:
            log.error("mount.unrecorded", dir=record.dir, ref=record.ref, error=str(exc))

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
            await self._unmount(mount)
            await self._retire(mount)

    async def _unmount(self, mount: Mount) -> None:
        """umount(2), if it is mounted.

        Raises:
            ErofsdError: It is in use.
        """
        directory = mount.record.dir
        if not self._is_mounted(mount):
            return
        if not self._is_on_top(mount):
            raise ErofsdError(f"{directory}: something else is mounted over it", hint=f"umount {directory}")
        try:
            await in_thread(syscalls.umount2, directory, 0)
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                raise ErofsdError(f"{directory}: umount: {exc.strerror}") from exc
            raise ErofsdError(f"{directory}: in use", hint=f"who uses it: fuser -vm {directory}") from exc

    def _is_mounted(self, mount: Mount, points: list[MountPoint] | None = None) -> bool:
        return any(
            point.directory == mount.record.dir and point.fstype == "erofs" and point.device == mount.device
            for point in (mount_points() if points is None else points)
        )

    @staticmethod
    def _is_on_top(mount: Mount) -> bool:
        here = [point.device for point in mount_points() if point.directory == mount.record.dir]
        return here[-1:] == [mount.device]

    def _alive(self, mount: Mount) -> bool:
        """True if the superblock exists, here or in another mount namespace."""
        return bool(self._own(mount))

    @staticmethod
    def _own(mount: Mount) -> set[str]:
        """Its superblocks that exist."""
        if not mount.record.superblocks or mount.record.boot_id != boot_id():
            return set()
        return {name for name in mount.record.superblocks if (SUPERBLOCKS / name).exists()}

    async def _retire(self, mount: Mount) -> None:
        """It is unmounted here: forget it, or keep guarding it for those who still have it."""
        directory = mount.record.dir
        if self._alive(mount):
            self._replace(mount, msgspec.structs.replace(mount.record, lingering=True, leaving=False))
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
        try:
            self._table.delete(mount.record)
        except ErofsdError as exc:
            # It is gone, whatever the table says; at worst it comes back with the next start.
            log.error("mount.remembered", dir=mount.record.dir, ref=mount.record.ref, error=str(exc))
        self._gone.set()
        self._mounts.pop(mount.record.name, None)
        await self._release(mount)
        if mount.doubted and (host := self._hosts.get(mount.record.engine)) is not None:
            await host.settle(mount.doubted)
            mount.doubted = ()

    async def _release(self, mount: Mount) -> None:
        blobs = mount.blobs
        for binding in mount.all_bindings:
            self._provider.release(binding)
        mount.bindings.clear()
        mount.boot = None
        host = self._hosts.get(mount.record.engine)
        for blob in blobs:
            if host is not None and not blob.bindings:
                await host.drop(blob)
        if mount.source is not None:
            await mount.source.aclose()
            mount.source = None
            with suppress(ErofsdError):  # the table cannot be read: the image stays where it is
                self._loader.release(mount.record.image, keep={r.image for r in self._table.all()})

    async def look_around(self) -> None:
        """Notice what umount(8) took down: it is as good as our own."""
        if self._stopping:
            return
        points = mount_points()
        for mount in list(self):
            directory = mount.record.dir
            if mount.record.lingering or not mount.device or self._lock(directory).locked():
                continue  # whoever has the lock is changing it; the change calls us again
            if not self._is_mounted(mount, points):
                async with self._lock(directory):
                    if self._mounts.get(directory) is mount and not self._stopping:
                        await self._retire(mount)

    async def release_lingering(self) -> None:
        """Drop the guards of superblocks that are gone by now; runs until cancelled."""
        while True:
            await asyncio.sleep(LINGER_POLL_S)
            for mount in [m for m in self if m.record.lingering and not self._alive(m)]:
                log.info("mount.gone", dir=mount.record.dir, superblocks=mount.record.superblocks)
                await self._forget(mount)

    # -- restore and stop -------------------------------------------------------------------------------

    async def restore(self, *, first: bool, on_each: Callable[[], None]) -> None:
        """Bring back what the table says.

        Args:
            on_each: Called after each: its readers need not wait for the others.
            first: No worker before this one had the group: what is mounted was unguarded in between, so its
                page cache may hold zeros. It is mounted anew.
        """
        for record in self._table.all():
            if record.prepared:
                continue  # somebody else mounts it
            mount = Mount(record)
            try:
                await self._restore_one(mount, first=first)
            except Exception as exc:
                # One broken image must not keep the others from coming back.
                if not isinstance(exc, ErofsdError | OSError):
                    log.exception("restore.crashed", dir=record.dir, ref=record.ref)
                await self._fail(mount, exc, first=first)
            on_each()

    async def _fail(self, mount: Mount, exc: Exception, *, first: bool) -> None:
        """It does not come back for now. What a living superblock of it has open goes on being guarded."""
        record = mount.record
        log.error("mount.failed", dir=record.dir, ref=record.ref, error=str(exc))
        mount.last_error = str(exc)
        mount.image = None
        for binding in mount.all_bindings:
            self._provider.release(binding)
        mount.bindings.clear()
        mount.boot = None
        if mount.source is not None:
            await mount.source.aclose()
            mount.source = None
        mount.device = "" if record.lingering else self._device_of(mount)
        if mount.device and first:
            await self._take_down(mount)  # nobody vouches for what it shows
            mount.device = ""
        if self._alive(mount) and (host := self._hosts.get(record.engine)) is not None:
            mount.doubted = record.stored
            host.doubt(mount.doubted)
        self._mounts[record.name] = mount

    def _device_of(self, mount: Mount) -> str:
        """``major:minor`` of the EROFS at its directory, if that is its own; else empty."""
        device = _device_at(mount.record.dir)
        return device if not mount.record.superblocks or self._alive(mount) else ""

    async def _restore_one(self, mount: Mount, *, first: bool) -> None:
        record = mount.record
        if record.lingering and not self._alive(mount):
            self._table.delete(record)
            return
        device = "" if record.lingering else self._device_of(mount)
        if not (first or device or record.lingering or record.leaving) and record.superblocks:
            # Unmounted by umount(8) while there was no worker.
            if not self._alive(mount):
                self._table.delete(record)
                return
            self._replace(mount, msgspec.structs.replace(record, lingering=True))
            record = mount.record
        host = self.host(record.engine)
        alive = record.lingering or (not first and (device or self._alive(mount)))
        self._bind(host, mount, await self._loader.load(record), record.stored if alive else ())
        if record.lingering:
            async with host.serving(mount):
                self._mounts[record.name] = mount
        elif device and (not first or mount.complete):
            # Complete now means complete then: nobody fills without a worker, so no reader got a hole.
            mount.device = device
            if not record.superblocks or record.leaving:  # killed before it could note what it did
                names = record.superblocks or tuple(sorted(superblocks()))
                self._replace(mount, msgspec.structs.replace(mount.record, superblocks=names, leaving=False))
            self._mounts[record.name] = mount
            async with host.serving(mount):
                pass
        else:
            if device:
                log.warning("mount.suspect", dir=record.dir, ref=record.ref)
                await in_thread(syscalls.umount2, record.dir, syscalls.MNT_DETACH)
            elif _device_at(record.dir):
                raise ErofsdError(
                    f"{record.dir}: another EROFS is mounted there", hint=f"umount {record.dir}"
                )
            await asyncio.to_thread(os.makedirs, record.dir, exist_ok=True)
            kept = tuple(sorted(self._own(mount)))
            self._replace(mount, msgspec.structs.replace(mount.record, superblocks=kept, boot_id=boot_id()))
            try:
                await self._bring_up(host, mount)
            except BaseException:
                await self._take_down(mount)
                raise
            log.info("image.restored", dir=record.dir, ref=record.ref)

    def superblocks(self) -> set[str]:
        """Names of those that the mounts know to be theirs."""
        return {name for mount in self for name in mount.record.superblocks}

    async def stop(self, *, keep_complete: bool) -> bool:
        """Unmount everything; rows stay, so the next ``serve`` brings it back.

        Args:
            keep_complete: Leave mounts in place that need nobody any more.

        Returns:
            True if everything is down; False if an incomplete superblock is held elsewhere, and was spoilt.
        """
        self._stopping = True
        leaving = [m for m in self if not (keep_complete and m.complete and not m.record.lingering)]
        self._note_leaving([mount for mount in leaving if not mount.record.lingering])
        for mount in leaving:
            if not mount.record.lingering:
                await self._unmount_at_last(mount)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + BUSY_PATIENCE_S
        held = [mount for mount in leaving if self._alive(mount)]
        while held and loop.time() < deadline:
            await asyncio.sleep(0.05)  # sysfs tells nobody when a superblock goes
            held = [mount for mount in held if self._alive(mount)]
        clean = True
        for mount in held:
            clean &= await self._spoil(mount)
        for mount in leaving:
            if mount.doubted and not self._alive(mount):
                await self._hosts[mount.record.engine].settle(mount.doubted)
        return clean

    def _note_leaving(self, mounts: Sequence[Mount]) -> None:
        """Before they are unmounted, lest a worker that takes over in the middle think umount(8) did it."""
        pairs = [(m.record, msgspec.structs.replace(m.record, leaving=True)) for m in mounts]
        for mount, (_, record) in zip(mounts, pairs, strict=True):
            mount.record = record
        try:
            self._table.replace_all(pairs)
        except ErofsdError as exc:
            log.error("mount.unrecorded", error=str(exc))

    async def _unmount_at_last(self, mount: Mount) -> None:
        """Unmount it, whoever uses it, and whatever was mounted over it."""
        for _ in range(STACK_MAX):
            if not self._is_mounted(mount):
                return
            try:
                await in_thread(syscalls.umount2, mount.record.dir, 0)
            except OSError:
                await self._take_down(mount)

    async def _spoil(self, mount: Mount) -> bool:
        """Make reads of what is incomplete fail, for those who still have its superblock.

        Returns:
            True if nothing was incomplete.
        """
        host = self._hosts.get(mount.record.engine)
        if host is None:
            return True
        works = [(blob.name, partial(host.spoil, blob)) for blob in mount.blobs if not blob.complete]
        if mount.image is None:  # it has failed: nobody knows what is there
            works = [(name, partial(host.store.drop, name)) for name in mount.record.stored]
        for name, work in works:
            log.error("blob.spoilt", dir=mount.record.dir, ref=mount.record.ref, blob_id=name)
            while self._alive(mount):
                try:
                    await in_thread(work)
                    break
                except OSError as exc:
                    # To end now would give them zeros: go on serving them as well as can be.
                    log.critical("blob.unspoilt", blob_id=name, error=str(exc))
                    await asyncio.sleep(LINGER_POLL_S)
        return not works

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
