"""The kernel's cache files: which of them may go, and when.

The kernel keeps data in files of its own, never evicts any, and writes nothing any more when its file system
is fuller than the cache's limits allow (`ondemand.binding.Limits`). So we delete them, by its leave: ``cull``
is refused for a file that a mount uses. Beside each file is our chunk map. What goes, and what stays:

- The bootstrap of a mount that is gone goes at once: its name will never be used again.
- Data stay as cache, in use or not, until there is less room than the ``cull`` limit. Then what no mount uses
  goes, that which was used longest ago first, until there is as much as the ``run`` limit asks for.

A file without a map is nobody's: nobody knows for which image it was verified, and the kernel would serve
it without asking. It is deleted when it is found, and before a new map gets its name. That is why the order
below is safe, wherever a crash comes between:

    nobody has it open, nobody has it bound -> the map goes -> the file goes

Where an image is registered and not mounted its files may go, too: its map stays, and follows the file.

The kernel gives a file its name some time after it has closed the object, and tells nobody: it is looked for.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from erofsd.blobs.store import BlobStore
from ondemand import culling
from ondemand.binding import Limits
from ondemand.cachefiles import Device

LEAVE_FIRST_S = 0.05  # between looks for files that are to go
LEAVE_LAST_S = 1.0
UNNAMED_MAX_S = 10.0  # a file without a name that long after its object was closed was never made
WATCH_S = 1.0  # the kernel says "wanted" until it looks again itself
FUTILE_S = 1.0  # after a search in vain, nothing is searched for so long
FUTILE_MAX_S = 30.0

log = structlog.get_logger("erofsd.culling")


class CacheFiles:
    """The files of one volume, as far as they can be deleted. Any thread may call, but where it says so;
    made where the event loop runs.

    Args:
        directory: That the cache is bound to.
        volume: Whose files these are.
        store: Keeps the chunk maps.
        name_of: The name in *store* of what the kernel calls by a cookie key.
        cookie_of: The opposite.

    Attributes:
        lock: Held by whoever binds a stored blob, or takes one away.
        on_gone: Called on the event loop with the name of each file that was deleted.
    """

    def __init__(
        self,
        device: Device,
        directory: Path,
        volume: bytes,
        store: BlobStore,
        *,
        name_of: Callable[[str], str],
        cookie_of: Callable[[str], str],
        limits: Limits | None = None,
    ) -> None:
        self.lock = threading.RLock()
        self.on_gone: Callable[[str], None] = lambda name: None
        self._device = device
        self._directory = directory
        self._volume = directory / "cache" / ("I" + os.fsdecode(volume))
        self._store = store
        self._name_of = name_of
        self._cookie_of = cookie_of
        self._limits = limits or Limits()
        self._making_room = threading.Lock()
        self._futile_at = float("-inf")
        self._leaving: dict[str, float] = {}  # since when
        self._leaves = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        store.on_fresh = self.discard

    # -- what has no map --------------------------------------------------------------------------------

    def discard(self, name: str) -> bool:
        """Delete the file of *name*, for which a new map is about to be made; False if a mount uses it."""
        with self.lock:
            path = culling.find(self._volume, self._cookie_of(name))
            return path is None or self._cull(name, path)

    def adopt(self) -> None:
        """Delete what a predecessor left without a map. Blocks."""
        for cookie, path in self._files():
            name = self._name_of(cookie)
            with self.lock:
                if self._store.opened(name) is None and not self._store.has(name):
                    self._cull(name, path)

    # -- what will not be used again --------------------------------------------------------------------

    def leave(self, name: str) -> None:
        """Delete the file and the map of *name* as soon as no mount uses it. On the event loop's thread."""
        self._leaving[name] = time.monotonic()
        self._leaves.set()

    def _let_leave(self) -> None:
        """One look for those who are to go. Blocks."""
        paths = dict(self._files())
        now = time.monotonic()
        for name, since in list(self._leaving.items()):
            path = paths.get(self._cookie_of(name))
            with self.lock:
                if self._store.opened(name) is not None:
                    gone = True  # bound again: it stays
                elif path is not None:
                    gone = self._remove(name, path)
                elif gone := now - since > UNNAMED_MAX_S:
                    self._store.remove(name)
            if gone:
                self._leaving.pop(name, None)

    # -- what is wanted gone ----------------------------------------------------------------------------

    def is_short(self) -> bool:
        """True if there is less room than the ``cull`` limit."""
        return self._free_percent() < self._limits.cull

    def make_room(self) -> bool:
        """If room is short, delete what no mount uses until there is enough. Blocks.

        Returns:
            False if that was in vain.
        """
        with self._making_room:
            if not self.is_short():
                return True
            if time.monotonic() - self._futile_at < FUTILE_S:
                return False
            count = self._make_room()
            free = round(self._free_percent(), 1)
            if not count:
                self._futile_at = time.monotonic()
                log.warning("cache.crowded", directory=str(self._directory), free_percent=free)
                return False
            log.info("cache.culled", directory=str(self._directory), count=count, free_percent=free)
            return True

    def _make_room(self) -> int:
        unbound: list[tuple[float, str, Path]] = []
        bound: list[tuple[float, str, Path]] = []
        for cookie, path in self._files():
            name = self._name_of(cookie)
            found = unbound if self._store.opened(name) is None else bound
            found.append((self._store.used_at(name), name, path))
        count = 0
        for _, name, path in sorted(unbound) + sorted(bound):
            if self._free_percent() >= self._limits.run:
                break
            with self.lock:
                # Bound, it is registered, perhaps, and not mounted: then it can go, and its map follows.
                is_bound = self._store.opened(name) is not None
                count += self._cull(name, path) if is_bound else self._remove(name, path)
        return count

    def _free_percent(self) -> float:
        """Of blocks or of inodes, whichever are fewer. Source: cachefiles_has_space in fs/cachefiles."""
        found = os.statvfs(self._directory)
        inodes = 100 * found.f_ffree / found.f_files if found.f_files else 100.0
        return min(100 * found.f_bavail / found.f_blocks, inodes)

    # -- in here ----------------------------------------------------------------------------------------

    def _files(self) -> list[tuple[str, Path]]:
        return [
            (os.fsdecode(key.cookie), path)
            for key, path in culling.files(self._directory)
            if path.parent.parent == self._volume
        ]

    def _remove(self, name: str, path: Path) -> bool:
        """Delete map and file, under the lock; False if a mount uses it."""
        try:
            if culling.is_in_use(self._device, path):
                return False
        except FileNotFoundError:
            pass  # the map is all that is left
        self._store.remove(name)
        return self._cull(name, path)

    def _cull(self, name: str, path: Path) -> bool:
        try:
            if not culling.cull(self._device, path):
                return False
        except FileNotFoundError:
            pass  # so much the better
        except OSError as exc:
            log.error("cull.failed", object_id=name, errno=exc.errno, error=str(exc))
            return False
        self._loop.call_soon_threadsafe(lambda: self.on_gone(name))
        return True

    # -- on the event loop ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Make room when the kernel wants it, and have go what is to go; until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_leaving(), name="leaving")
            group.create_task(self._keep_room(), name="room")

    async def _keep_leaving(self) -> None:
        pause_s = LEAVE_FIRST_S
        while True:
            if not self._leaving:
                await self._leaves.wait()
            if self._leaves.is_set():
                self._leaves.clear()
                pause_s = LEAVE_FIRST_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LEAVE_LAST_S)
            await self._quietly(self._let_leave)

    async def _keep_room(self) -> None:
        pause_s = WATCH_S
        while True:
            await self._wanted()
            made = await self._quietly(self.make_room)
            await asyncio.sleep(pause_s)
            pause_s = WATCH_S if made else min(2 * pause_s, FUTILE_MAX_S)

    @staticmethod
    async def _quietly(work: Callable[[], object]) -> bool:
        try:
            return bool(await asyncio.to_thread(work))
        except OSError as exc:  # the file system is in trouble: that is not ours to end of
            log.error("cull.failed", errno=exc.errno, error=str(exc))
            return False

    async def _wanted(self) -> None:
        """Wait until the device is "writable": until there is less room than the ``cull`` limit."""
        wanted = asyncio.Event()
        fd = os.dup(self._device.fileno())  # its own is watched for reading, by the engine
        self._loop.add_writer(fd, wanted.set)
        try:
            await wanted.wait()
        finally:
            self._loop.remove_writer(fd)
            os.close(fd)
