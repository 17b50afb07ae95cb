"""Images registered for ``mount -t erofs``: by hand, or from fstab.

A registration is a mount that somebody else makes: its objects are known to the kernel's requests from now
on, over restarts, until it is taken back. One of them serves one mount at a time, because fsid and domain
name a superblock; registering the same image again gives another fsid that shares the blobs.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import msgspec
import structlog

from erofsd.api import MountInfo, MountRequest
from erofsd.daemon.mount import Mount, in_thread
from erofsd.daemon.mountinfo import mount_points
from erofsd.daemon.mounting import Mounts
from erofsd.daemon.state import MountTable
from erofsd.errors import ErofsdError, NotPossibleHere
from ondemand import syscalls

ENGINE = "cachefiles"

log = structlog.get_logger("erofsd.registering")


class Registrations:
    """All registered images. Uses *mounts* to open, bind and release them."""

    def __init__(self, mounts: Mounts, table: MountTable) -> None:
        self._mounts = mounts
        self._table = table
        self._registered: dict[str, Mount] = {}  # by fsid

    def __iter__(self) -> Iterator[Mount]:
        return iter(self._registered.values())

    async def add(self, request: MountRequest) -> Mount:
        """Register an image.

        Raises:
            ErofsdError: Any of its family; nothing is registered then.
        """
        if request.engine not in ("auto", ENGINE):
            raise NotPossibleHere(
                f"mount --prepare: engine {request.engine} cannot serve a plain mount(8)",
                hint=f"--engine {ENGINE}, or mount without --prepare",
            )
        mount = await self._mounts.acquire(msgspec.structs.replace(request, dir=""), ENGINE)
        try:
            await self._mounts.host(ENGINE).prepare(mount)
            mount.record = msgspec.structs.replace(mount.record, prepared=True)
            self._table.put(mount.record)
        except BaseException:
            await self._mounts.release(mount)
            raise
        self._registered[mount.record.fsid] = mount
        log.info("image.registered", ref=request.ref, fsid=mount.record.fsid)
        return mount

    async def restore(self) -> None:
        """Know again what the table says."""
        for record in self._table.all():
            if record.prepared:
                mount = Mount(record)
                try:
                    await self._mounts.acquire_stored(mount)
                except (ErofsdError, OSError) as exc:
                    mount.last_error = str(exc)
                    log.error("mount.failed", ref=record.ref, fsid=record.fsid, error=str(exc))
                self._registered[record.fsid] = mount

    def mounted_at(self, directory: str) -> Mount | None:
        """The registered image that somebody has mounted on *directory*."""
        self.look_around()
        return next((mount for mount in self if mount.seen_at == directory), None)

    def look_around(self) -> None:
        """Notice where registered images are mounted."""
        at = {point.fsid: point for point in mount_points() if point.fsid}
        for mount in self:
            point = at.get(mount.record.fsid)
            mount.seen_at, mount.device = (point.directory, point.device) if point else ("", "")

    async def remove(self, ref: str) -> None:
        """Take every registration of *ref* back, and unmount what is mounted of it.

        Raises:
            ErofsdError: There is none, or one is in use.
        """
        found = [mount for mount in self if mount.record.ref == ref]
        if not found:
            raise ErofsdError(f"{ref}: not registered", hint="erofsd ls; a directory begins with /")
        self.look_around()
        for mount in found:
            await self.unmount(mount)
            self._table.delete(mount.record)
            del self._registered[mount.record.fsid]
            await self._mounts.release(mount)

    async def unmount(self, mount: Mount) -> None:
        """Unmount *mount* where somebody has mounted it; it stays registered.

        Raises:
            ErofsdError: It is in use.
        """
        directory = mount.seen_at
        if not directory:
            return
        try:
            await in_thread(syscalls.umount2, directory, 0)
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                raise ErofsdError(f"{directory}: umount: {exc.strerror}") from exc
            raise ErofsdError(f"{directory}: in use", hint=f"who uses it: fuser -vm {directory}") from exc
        mount.seen_at = mount.device = ""

    async def stop(self) -> bool:
        """Unmount what is mounted; registrations stay. True if nothing is left mounted."""
        self.look_around()
        clean = True
        for mount in self:
            try:
                await self.unmount(mount)
            except ErofsdError as exc:
                # Once nobody holds the device its readers get errors, not zeros: nothing to spoil.
                log.error("mount.left", dir=mount.seen_at, ref=mount.record.ref, error=str(exc))
                clean = False
        return clean

    def describe(self, mount: Mount) -> MountInfo:
        """*mount* as ``ls`` shows it, with the command that mounts it."""
        told = self._mounts.describe(mount)
        command = ""
        if mount.image is not None:
            command = f"mount -t erofs none DIR -o {self._mounts.host(ENGINE).options(mount)}"
        return msgspec.structs.replace(told, dir=mount.seen_at or None, command=command)
