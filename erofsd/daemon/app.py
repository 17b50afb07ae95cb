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
import contextlib
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
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
from erofsd.daemon.cookies import VOLUME, Cookies, cookie_of, name_of
from erofsd.daemon.culling import CacheFiles
from erofsd.daemon.guards import Guards
from erofsd.daemon.images import ImageLoader
from erofsd.daemon.inheritance import Inheritance
from erofsd.daemon.keeper import CRASHED
from erofsd.daemon.link import LinkLost, WorkerLink, send
from erofsd.daemon.metrics import render
from erofsd.daemon.mount import Host, Mount
from erofsd.daemon.mountinfo import MountWatch, superblocks
from erofsd.daemon.mounting import Mounts, resolve
from erofsd.daemon.prefetching import Prefetcher
from erofsd.daemon.registering import Registrations
from erofsd.daemon.state import ImageFiles, MountTable
from erofsd.errors import ErofsdError
from erofsd.fill.provider import FillProvider
from ondemand.engines.cachefiles import CachefilesEngine
from ondemand.engines.fanotify import FanotifyEngine
from ondemand.errors import FillError, NobodyReads
from ondemand.journal import Journal
from ondemand.provider import ObjectKey, Sink
from ondemand.ranges import Range

HOPELESS = 3  # workers that failed at once, one after the other
TEXT_MAX = 1000

log = structlog.get_logger("erofsd.app")


class Stopping(Exception):
    """Ends the root TaskGroup in order."""


class RestoringProvider:
    """Lets misses wait for images that are not back yet, instead of failing them.

    Args:
        in_doubt: Whether somebody may have an object open of whom nothing is known (`Host.doubt`).
    """

    def __init__(self, inner: FillProvider, in_doubt: Callable[[ObjectKey], bool]) -> None:
        self._inner = inner
        self._in_doubt = in_doubt
        self._restored = False
        self._news: set[asyncio.Future[None]] = set()  # of those who wait for more images

    def came_back(self, *, all_of_them: bool = False) -> None:
        """An image is back, or *all_of_them* are."""
        self._restored |= all_of_them
        for waiter in self._news:
            if not waiter.done():
                waiter.set_result(None)

    async def _wait_restored(self, is_enough: Callable[[], bool]) -> None:
        while not self._restored and not is_enough():
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._news.add(waiter)
            try:
                await waiter
            finally:
                self._news.discard(waiter)

    def present(self, key: ObjectKey, want: Range) -> bool:
        return self._inner.present(key, want)

    async def fill(self, key: ObjectKey, want: Range, sink: Sink) -> None:
        await self._wait_restored(lambda: self._inner.can_fill(key, want))
        try:
            await self._inner.fill(key, want, sink)
        except NobodyReads as exc:
            if self._in_doubt(key):
                raise FillError(str(exc)) from exc
            raise

    async def open(self, key: ObjectKey, sink: Sink) -> int:
        await self._wait_restored(lambda: self._inner.attached(key))
        return await self._inner.open(key, sink)

    def closed(self, key: ObjectKey) -> None:
        self._inner.closed(key)


class Worker:
    """Everything between the kernel and the sources, wired together."""

    def __init__(
        self,
        config: Config,
        inheritance: Inheritance,
        end: socket.socket,
        engines: Engines,
        only: MountRequest | None,
    ) -> None:
        self._config = config
        self._only = only
        self._inheritance = inheritance
        self._stop = asyncio.Event()
        self._link = WorkerLink(end, on_stop=self._stop.set, on_lost=self._become_keeper)
        state_dir = Path(config.state_dir)
        self._engines = engines
        self._provider = FillProvider()
        self._store = BlobStore(state_dir / "blobs", held=inheritance.blobs)
        self._table = MountTable(state_dir / "mounts.db", served=inheritance.served)
        files = ImageFiles(state_dir / "images")
        self._hosts: dict[str, Host] = {}
        self._guards: Guards | None = None
        if engines.fanotify is not None:
            self._guards = self._hosts["fanotify"] = Guards(
                engines.fanotify,
                store=self._store,
                files=files,
                provider=self._provider,
                link=self._link,
                inheritance=inheritance,
            )
        self._cookies: Cookies | None = None
        if engines.cachefiles is not None:
            self._cookies = self._hosts["cachefiles"] = self._make_cookies(engines.cachefiles, files)
        self._files = files
        self._mounts = Mounts(
            table=self._table,
            loader=ImageLoader(files, config),
            provider=self._provider,
            hosts=self._hosts,
            why_not=inheritance.why_not,
        )
        self._registrations = Registrations(self._mounts, self._table)
        self._group: asyncio.TaskGroup
        self._inherited: list[str] = []  # names of the stored blobs that were guarded when we came

    def _make_cookies(self, engine: CachefilesEngine, files: ImageFiles) -> Cookies:
        state_dir = Path(self._config.state_dir)
        maps = BlobStore(state_dir / "maps", keeps_data=False)
        cache = CacheFiles(
            engine.device, state_dir / "cachefiles", VOLUME, maps, name_of=name_of, cookie_of=cookie_of
        )
        cookies = Cookies(
            store=maps,
            cache=cache,
            files=files,
            provider=self._provider,
            scratch=state_dir,
            reserved=lambda: {record.fsid for record in self._table.all()},
        )
        engine.make_room = cache.make_room
        cache.on_gone = lambda name: engine.forget(cookies.went(name))
        return cookies

    async def run(self) -> int:
        """Serve until told to stop; returns the exit code."""
        loop = asyncio.get_running_loop()
        clean = True
        first = not self._inheritance.served
        provider = RestoringProvider(self._provider, self._in_doubt)
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                if self._engines.fanotify is not None and self._guards is not None:
                    self._take_over(self._engines.fanotify, self._guards)
                if self._engines.cachefiles is not None and not first:
                    self._engines.cachefiles.restore()
                for engine in self._engines:
                    group.create_task(engine.serve(provider), name=engine.name)
                self._provider.on_complete = self._on_complete
                group.create_task(self._provider.run(), name="fill")
                await self._mounts.restore(first=first, on_each=provider.came_back)
                await self._forget_unused()
                await self._registrations.restore()
                provider.came_back(all_of_them=True)
                if self._cookies is not None:
                    group.create_task(self._cookies.cache.run(), name="cache")
                    if not self._table.damaged:
                        await self._cookies.adopt()
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
                clean &= await self._registrations.stop()
                if self._guards is not None and superblocks() - self._mounts.superblocks():
                    clean &= await self._guards.spoil_doubtful()
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
            self._inherited.append(name)
        guards.doubt(self._inherited)
        for record in self._table.all():
            for name in set(record.stored) - self._inheritance.blobs.keys():
                # The keeper lets go after the mark is gone, and that goes when every byte is there.
                engine.vouch(str(self._store.path(name)))

    def _in_doubt(self, key: ObjectKey) -> bool:
        return self._guards is not None and self._guards.in_doubt(key)

    def _spawn(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            try:
                await work
            except (ErofsdError, LinkLost, OSError) as exc:
                log.error("task.failed", error=str(exc) or repr(exc))

        self._group.create_task(run())

    async def _forget_unused(self) -> None:
        records = self._table.all()
        if self._table.damaged:
            return  # mounts may exist that we do not know: they need their guards
        self._files.remove_others({record.image for record in records})
        if self._guards is not None:
            known = {name for record in records for name in record.stored}
            strangers = superblocks() - self._mounts.superblocks()
            await self._guards.settle(n for n in self._inherited if n in known or not strangers)

    async def _mount_only(self, request: MountRequest, *, first: bool) -> None:
        try:
            mount = await self.mount(request)
        except ErofsdError as exc:
            self._link.failed(_encoded(exc))
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
            engines=list(self._hosts),
            state_dir=str(self._config.state_dir),
            deadline=self._config.deadline,
        )

    def mounts(self) -> list[MountInfo]:
        """See `control.Service`."""
        self._registrations.look_around()
        registered = [self._registrations.describe(mount) for mount in self._registrations]
        return [self._mounts.describe(mount) for mount in self._mounts] + registered

    async def mount(self, request: MountRequest) -> MountInfo:
        """See `control.Service`."""
        if request.prepare:
            return self._registrations.describe(await self._registrations.add(request))
        mount = await self._mounts.mount(request)
        if request.prefetch != "none":
            self._spawn(self._prefetch_quietly(mount, request.prefetch))
        return self._mounts.describe(mount)

    async def umount(self, directory: str) -> None:
        """See `control.Service`."""
        if not directory.startswith("/"):
            await self._registrations.remove(directory)
        elif (mount := self._registrations.mounted_at(await resolve(directory))) is not None:
            await self._registrations.unmount(mount)
        else:
            await self._mounts.umount(directory)

    async def prefetch(
        self, request: PrefetchRequest, progress: Callable[[int, int], Awaitable[None]]
    ) -> None:
        """See `control.Service`."""
        if request.target.startswith("/"):
            directory = await resolve(request.target)
            mount = self._mounts.find(directory) or self._registrations.mounted_at(directory)
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
        return render(self.mounts(), {engine.name: engine.statistics for engine in self._engines})


@dataclass(frozen=True, slots=True)
class Engines:
    """The engines of one worker; None where this kernel has none."""

    fanotify: FanotifyEngine | None
    cachefiles: CachefilesEngine | None

    def __iter__(self) -> Iterator[FanotifyEngine | CachefilesEngine]:
        return iter([engine for engine in (self.fanotify, self.cachefiles) if engine is not None])

    @classmethod
    def of(cls, inheritance: Inheritance, deadline_s: float) -> Engines:
        """First thing in a worker: stale event numbers are occupied before anything opens a descriptor."""
        fanotify: FanotifyEngine | None = None
        cachefiles: CachefilesEngine | None = None
        if (group := inheritance.engines.get("fanotify")) is not None:
            fanotify = FanotifyEngine(group, Journal(inheritance.journal), deadline_s=deadline_s)
            inheritance.blobs = fanotify.recover(inheritance.blobs)
        if (device := inheritance.engines.get("cachefiles")) is not None:
            cachefiles = CachefilesEngine(device, deadline_s=deadline_s)
        return cls(fanotify, cachefiles)


def run_worker(
    config: Config,
    inheritance: Inheritance,
    end: socket.socket,
    only: MountRequest | None,
    *,
    failures: int = 0,
) -> NoReturn:
    """The forked child's whole life.

    Args:
        failures: How many workers before this one have ended by themselves as soon as they were started.
    """
    code = CRASHED
    engines: Engines | None = None
    try:
        engines = Engines.of(inheritance, config.deadline)
        code = uvloop.run(_run(config, inheritance, end, engines, only))
    except ErofsdError as exc:
        log.error("worker.failed", error=str(exc), hint=exc.hint)
        if not (inheritance.served or inheritance.blobs):  # nothing is guarded: the keeper may give up
            with contextlib.suppress(LinkLost):
                send(end, "failed", _encoded(exc))
    except BaseException:
        log.exception("worker.crashed")
    finally:
        if code == CRASHED and failures >= HOPELESS and engines is not None:
            # The next one will fare no better: EIO now, rather than a wait for it.
            for engine in engines:
                with contextlib.suppress(Exception):
                    asyncio.run(engine.aclose(deny=True))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # never unwind into the keeper's frames below us


def _encoded(exc: ErofsdError) -> str:
    """An ErrorReply of bounded size, for the keeper."""
    reply = control.reply(exc)
    short = msgspec.structs.replace(reply, error=reply.error[:TEXT_MAX], hint=reply.hint[:TEXT_MAX])
    return msgspec.json.encode(short).decode()


async def _run(
    config: Config,
    inheritance: Inheritance,
    end: socket.socket,
    engines: Engines,
    only: MountRequest | None,
) -> int:
    return await Worker(config, inheritance, end, engines, only).run()
