"""The worker: builds everything, owns the root TaskGroup, ends when told to.

Order matters at the start, after a predecessor was killed under waiting readers:

1. the journal is read and every event number in it occupied, before anything else makes a descriptor
   (``FanotifyEngine.recover``);
2. what the keeper holds is adopted: a stale event can be tied to its blob;
3. events are served: those of images that are not back yet wait;
4. the images come back from the state directory, without the network;
5. what is held for nobody is let go.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

import msgspec
import structlog
import uvloop

from erofsd import __version__
from erofsd.api import DaemonInfo, MountInfo, MountRequest, PrefetchRequest
from erofsd.blobs.store import BlobStore, StoredBlob
from erofsd.config import Config
from erofsd.daemon import control
from erofsd.daemon.guards import Guards
from erofsd.daemon.images import ImageLoader
from erofsd.daemon.keeper import Inheritance
from erofsd.daemon.link import WorkerLink
from erofsd.daemon.metrics import render
from erofsd.daemon.mount import Host, Mount
from erofsd.daemon.mountinfo import MountWatch
from erofsd.daemon.mounting import Mounts, resolve
from erofsd.daemon.prefetching import Prefetcher
from erofsd.daemon.state import ImageFiles, MountTable
from erofsd.errors import ErofsdError
from erofsd.fill.provider import FillProvider
from ondemand.engines.fanotify import FanotifyEngine
from ondemand.errors import FillError
from ondemand.journal import Journal
from ondemand.provider import ObjectKey, Sink
from ondemand.ranges import Range

log = structlog.get_logger("erofsd.app")


class Stopping(Exception):
    """Ends the root TaskGroup in order."""


class RestoringProvider:
    """Lets misses wait for images that are not back yet, instead of failing them."""

    def __init__(self, inner: FillProvider) -> None:
        self._inner = inner
        self.restored = asyncio.Event()

    def present(self, key: ObjectKey, want: Range) -> bool:
        return self._inner.present(key, want)

    async def fill(self, key: ObjectKey, want: Range, sink: Sink) -> None:
        if not self._inner.attached(key):
            await self.restored.wait()
        await self._inner.fill(key, want, sink)

    async def open(self, key: ObjectKey, sink: Sink) -> int:
        raise FillError(f"{key}: nobody registered it")

    def closed(self, key: ObjectKey) -> None:
        """fanotify objects are closed by their owner."""


class Worker:
    """Everything between the kernel and the sources, wired together."""

    def __init__(
        self,
        config: Config,
        inheritance: Inheritance,
        end: socket.socket,
        engine: FanotifyEngine | None,
        only: MountRequest | None,
    ) -> None:
        self._config = config
        self._only = only
        self._inheritance = inheritance
        self._stop = asyncio.Event()
        self._link = WorkerLink(end, on_stop=self._stop.set, on_lost=self._become_keeper)
        state_dir = Path(config.state_dir)
        self._engine = engine
        self._provider = FillProvider()
        self._store = BlobStore(state_dir / "blobs", held=inheritance.blobs)
        self._table = MountTable(state_dir / "mounts.db")
        files = ImageFiles(state_dir / "images")
        self._hosts: dict[str, Host] = {}
        self._guards: Guards | None = None
        if engine is not None:
            self._guards = self._hosts["fanotify"] = Guards(
                engine,
                store=self._store,
                files=files,
                provider=self._provider,
                link=self._link,
                inheritance=inheritance,
            )
        self._files = files
        self._mounts = Mounts(
            table=self._table,
            loader=ImageLoader(files, config),
            provider=self._provider,
            hosts=self._hosts,
            why_not=inheritance.why_not,
        )
        self._group: asyncio.TaskGroup

    async def run(self) -> int:
        """Serve until told to stop; returns the exit code."""
        loop = asyncio.get_running_loop()
        clean = True
        first = not self._inheritance.served
        provider = RestoringProvider(self._provider)
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                if self._engine is not None and self._guards is not None:
                    self._take_over(self._engine, self._guards)
                    group.create_task(self._engine.serve(provider), name="engine")
                self._provider.on_complete = self._on_complete
                group.create_task(self._provider.run(), name="fill")
                await self._mounts.restore(first=first)
                provider.restored.set()
                await self._forget_unused()
                watch = MountWatch(loop, lambda: self._spawn(self._mounts.look_around()))
                self._spawn(self._mounts.look_around())
                group.create_task(self._mounts.release_lingering(), name="lingering")
                runner = await control.serve(
                    control.make_app(self), socket.socket(fileno=os.dup(self._inheritance.listener))
                )
                self._link.ready()
                self._inheritance.served = True
                if self._only is not None:
                    await self._mount_only(self._only, first=first)
                await self._stop.wait()
                watch.close()
                await runner.cleanup()
                clean = await self._mounts.stop(keep_complete=self._config.keep_mounts)
                raise Stopping
        except* Stopping:
            pass
        finally:
            self._table.close()
        return 0 if clean else 1

    def _take_over(self, engine: FanotifyEngine, guards: Guards) -> None:
        """Know, before the first event is answered, every file that it may be about."""
        for name, fd in self._inheritance.blobs.items():
            guards.adopt(name, fd)
        for record in self._table.all():
            for name in set(record.stored) - self._inheritance.blobs.keys():
                # The keeper lets go after the mark is gone, and that goes when every byte is there.
                engine.vouch(str(self._store.path(name)))

    def _spawn(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            await work

        self._group.create_task(run())

    async def _forget_unused(self) -> None:
        self._files.remove_others({record.image for record in self._table.all()})
        if self._guards is None:
            return
        used = {blob.name for mount in self._mounts for blob in mount.blobs}
        failed = any(mount.image is None for mount in self._mounts)
        for name in set(self._inheritance.blobs) - used:
            if not failed:  # a mount that failed to come back may still be mounted, and need its guard
                await self._guards.forget(name)

    async def _mount_only(self, request: MountRequest, *, first: bool) -> None:
        try:
            mount = await self.mount(request)
        except ErofsdError as exc:
            self._link.failed(msgspec.json.encode(control.reply(exc)).decode())
            self._stop.set()
            return
        if first:  # the first worker tells it, replacements go on in silence
            print(f"{mount.dir}: {mount.ref} mounted, {mount.engine}; ends when it is unmounted", flush=True)
        self._spawn(self._finish_when_unmounted(request))

    async def _finish_when_unmounted(self, request: MountRequest) -> None:
        await self._mounts.wait_gone(await resolve(request.dir))
        self._link.finished()
        self._stop.set()

    def _on_complete(self, blob: StoredBlob) -> None:
        for host in self._hosts.values():
            if host.store is blob.store:
                self._spawn(host.relax(blob))

    def _become_keeper(self) -> None:
        log.warning("keeper.lost", pid=os.getpid())
        self._inheritance.execute_keeper()

    # -- control.Service --------------------------------------------------------------------------------

    def info(self) -> DaemonInfo:
        """See `control.Service`."""
        return DaemonInfo(
            version=__version__,
            pid=os.getpid(),
            keeper_pid=os.getppid(),
            engines=["fanotify"] if self._engine is not None else [],
            state_dir=str(self._config.state_dir),
            deadline=self._config.deadline,
        )

    def mounts(self) -> list[MountInfo]:
        """See `control.Service`."""
        return [self._mounts.describe(mount) for mount in self._mounts]

    async def mount(self, request: MountRequest) -> MountInfo:
        """See `control.Service`."""
        mount = await self._mounts.mount(request)
        if request.prefetch != "none":
            self._spawn(self._prefetch_quietly(mount, request.prefetch))
        return self._mounts.describe(mount)

    async def umount(self, directory: str) -> None:
        """See `control.Service`."""
        await self._mounts.umount(directory)

    async def prefetch(
        self, request: PrefetchRequest, progress: Callable[[int, int], Awaitable[None]]
    ) -> None:
        """See `control.Service`."""
        if request.target.startswith("/"):
            mount = self._mounts.find(await resolve(request.target))
            if mount is not None:
                await self._prefetch(mount, request.files, progress)
                return
        async with self._mounts.borrowed(MountRequest(ref=request.target, dir="")) as mount:
            await self._prefetch(mount, request.files, progress)

    async def _prefetch(
        self, mount: Mount, files: list[str] | None, progress: Callable[[int, int], Awaitable[None]] | None
    ) -> None:
        if mount.image is None:
            raise ErofsdError(f"{mount.record.dir}: {mount.last_error}")
        prefetcher = Prefetcher(self._provider, mount.image, mount.bindings)
        if files is None:
            await prefetcher.everything(progress)
        else:
            await prefetcher.files(files, progress)
        for blob in mount.blobs:
            await self._hosts[mount.record.engine].relax(blob)

    async def _prefetch_quietly(self, mount: Mount, how: str) -> None:
        """What nobody asked for must not fail anybody."""
        try:
            if how == "all":
                await self._prefetch(mount, None, None)
            elif mount.image is not None:
                await Prefetcher(self._provider, mount.image, mount.bindings).hints()
        except ErofsdError as exc:
            log.warning("prefetch.failed", dir=mount.record.dir, ref=mount.record.ref, error=str(exc))

    def metrics(self) -> bytes:
        """See `control.Service`."""
        return render(self.mounts(), self._engine.statistics if self._engine else None)


def run_worker(
    config: Config, inheritance: Inheritance, end: socket.socket, only: MountRequest | None
) -> NoReturn:
    """The forked child's whole life."""
    code = 1
    try:
        engine: FanotifyEngine | None = None
        if (group := inheritance.engines.get("fanotify")) is not None:
            engine = FanotifyEngine(group, Journal(inheritance.journal), deadline_s=config.deadline)
            inheritance.blobs = engine.recover(inheritance.blobs)
        code = uvloop.run(_run(config, inheritance, end, engine, only))
    except ErofsdError as exc:
        log.error("worker.failed", error=str(exc), hint=exc.hint)
    except BaseException:
        log.exception("worker.crashed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # never unwind into the keeper's frames below us


async def _run(
    config: Config,
    inheritance: Inheritance,
    end: socket.socket,
    engine: FanotifyEngine | None,
    only: MountRequest | None,
) -> int:
    return await Worker(config, inheritance, end, engine, only).run()
