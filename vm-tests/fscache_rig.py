"""What scenarios of EROFS over fscache share: a keeper with workers that it can kill, mounts, and readers.

The program that uses it is the keeper: it holds /dev/cachefiles and no descriptor of an object. Workers are
forked from it and serve; readers are forked, too, and close the device first, or they would keep it alive.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import structlog
import uvloop

from ondemand import fscache, syscalls
from ondemand.canary import image, pattern
from ondemand.engines.cachefiles import BLOCK_SIZE, CachefilesEngine, Device, open_device
from ondemand.errors import FillError
from ondemand.provider import ObjectKey, Sink
from ondemand.ranges import Range

HOME = Path("/var/lib/erofsd/scenario")
CACHE = HOME / "cache"
PATIENCE_S = 30.0

Content = Callable[[int, int], bytes]

NORMAL, FAILING, HANGING, SLOW = range(4)
"""What a provider can be told to do, while it serves."""


class Shared:
    """Numbers that all processes of a scenario see."""

    FIELDS = ("opens", "reads", "closes", "fills", "fds", "objects", "stale", "behaviour", "refusing")

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")

    def __getitem__(self, name: str) -> int:
        return self._words[self.FIELDS.index(name)]

    def __setitem__(self, name: str, value: int) -> None:
        self._words[self.FIELDS.index(name)] = value


class CountingDevice(Device):
    """Counts the messages of each kind."""

    def __init__(self, device_fd: int, shared: Shared) -> None:
        super().__init__(device_fd)
        self._shared = shared

    def read(self) -> bytes:
        if buf := super().read():
            (opcode,) = struct.unpack_from("=I", buf, 4)
            self._shared[{0: "opens", 1: "closes", 2: "reads"}[opcode]] += 1
        return buf


class ContentProvider:
    """Fills objects from memory, in pieces of ``enlarge`` bytes, and behaves as the scenario says."""

    def __init__(
        self, contents: Mapping[bytes, tuple[int, Content]], shared: Shared, enlarge: int = BLOCK_SIZE
    ) -> None:
        self._contents = contents  # by cookie key
        self._shared = shared
        self._enlarge = enlarge

    def present(self, key: ObjectKey, want: Range) -> bool:
        return False

    async def fill(self, key: ObjectKey, want: Range, sink: Sink) -> None:
        self._shared["fills"] += 1
        behaviour = self._shared["behaviour"]
        if behaviour == FAILING:
            raise FillError("as the scenario wants it", errno.ENODATA)
        if behaviour == HANGING:
            await asyncio.Event().wait()
        if behaviour == SLOW:
            await asyncio.sleep(0.002)
        size, content = self._contents[key.cookie]
        whole = want.clamp(size).aligned(self._enlarge).clamp(-(-size // BLOCK_SIZE) * BLOCK_SIZE)
        if whole:
            data = content(whole.start, min(whole.stop, size) - whole.start)
            sink.write(whole.start, memoryview(data + bytes(len(whole) - len(data))))

    async def open(self, key: ObjectKey, sink: Sink) -> int:
        if self._shared["refusing"] or key.cookie not in self._contents:
            raise FillError(f"no object {key}", errno.ENOENT)
        return self._contents[key.cookie][0]

    def closed(self, key: ObjectKey) -> None:
        return None


def patterned(size: int, seed: int) -> tuple[int, Content]:
    return size, lambda offset, length: pattern(offset, length, seed)


def constant(data: bytes) -> tuple[int, Content]:
    return len(data), lambda offset, length: data[offset : offset + length]


def images(sizes: Mapping[str, list[int]]) -> dict[bytes, tuple[int, Content]]:
    """Images whose n-th file is the n-th device, called ``<image>-<n>`` and filled with seed n + 1."""
    found = {}
    for name, each in sizes.items():
        found[name.encode()] = constant(image(each))
        for n, size in enumerate(each):
            found[f"{name}-{n}".encode()] = patterned(size, n + 1)
    return found


class Keeper:
    """Holds the device; use it as a context manager.

    Args:
        contents: Size and content of each object, by cookie key.
    """

    def __init__(
        self,
        contents: Mapping[bytes, tuple[int, Content]],
        *,
        enlarge: int = BLOCK_SIZE,
        deadline_s: float = 60.0,
    ) -> None:
        structlog.configure(
            wrapper_class=structlog.make_filtering_bound_logger(40),
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        )
        syscalls.raise_descriptor_limit()
        CACHE.mkdir(parents=True, exist_ok=True)
        self.shared = Shared()
        self._provider = ContentProvider(contents, self.shared, enlarge)
        self._deadline_s = deadline_s
        self.device_fd = open_device(CACHE)
        self._worker = 0
        self._served = False
        self._mounts: list[Path] = []
        self._readers: list[int] = []

    def __enter__(self) -> Keeper:
        self.start_worker()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in self._readers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for target in self._mounts:
            syscalls.umount2(str(target), syscalls.MNT_DETACH)
        self.kill_worker()
        os.close(self.device_fd)

    # -- workers ----------------------------------------------------------------------------------------

    def start_worker(self) -> None:
        self._worker = fork(self._work)
        self._served = True

    def kill_worker(self) -> None:
        if self._worker:
            os.kill(self._worker, signal.SIGKILL)
            _, status = os.waitpid(self._worker, 0)
            assert os.WIFSIGNALED(status), "the worker had ended by itself"
            self._worker = 0

    def replace_worker(self) -> None:
        self.kill_worker()
        self.start_worker()

    def _work(self) -> None:
        engine = CachefilesEngine(
            CountingDevice(self.device_fd, self.shared), deadline_s=self._deadline_s, open_deadline_s=5.0
        )
        if self._served:
            engine.restore()
        uvloop.run(self._serve(engine))

    async def _serve(self, engine: CachefilesEngine) -> None:
        async def watch() -> None:
            before = self.shared["stale"]
            while True:
                self.shared["fds"] = len(os.listdir("/proc/self/fd")) - 1
                self.shared["objects"] = len(engine._sinks)
                self.shared["stale"] = before + engine.statistics.stale
                await asyncio.sleep(0.02)

        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            await engine.serve(self._provider)

    # -- mounts -----------------------------------------------------------------------------------------

    def mount(self, name: str, options: str) -> Path:
        """Mount at a directory called *name*. Raises OSError; nothing is mounted then."""
        target = HOME / name
        target.mkdir(exist_ok=True)
        pid = syscalls.fork_mount(fscache.SOURCE, str(target), "erofs", syscalls.MS_RDONLY, options)
        wait_ended(pid, f"mounting {name}")
        error = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if error:
            raise OSError(error, f"{name}: {os.strerror(error)}")
        self._mounts.append(target)
        return target

    def unmount(self, target: Path) -> None:
        syscalls.umount2(str(target))
        self._mounts.remove(target)

    # -- readers ----------------------------------------------------------------------------------------

    def start_reader(self, body: Callable[[], None]) -> int:
        def read() -> None:
            os.close(self.device_fd)
            body()

        pid = fork(read)
        self._readers.append(pid)
        return pid

    def wait_reader(self, pid: int) -> int:
        """Wait until a reader has ended; returns its exit status."""
        wait_ended(pid, "a reader")
        self._readers.remove(pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fork(body: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        body()
    except BaseException as exc:
        print(f"{body.__qualname__} ended with {exc!r}", file=sys.stderr, flush=True)
        os._exit(99)
    os._exit(0)


def wait_ended(pid: int, what: str) -> None:
    """Wait until a child could be waited for."""
    wait_for(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None, what)


def wait_for(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    give_up = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < give_up, f"{what}: not within {patience_s:.0f} s"
        time.sleep(0.002)


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3")


def read_error(path: Path, offset: int, length: int = BLOCK_SIZE) -> int:
    """Read and return the errno, 0 for none."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.pread(fd, length, offset)
    except OSError as exc:
        return exc.errno or -1
    finally:
        os.close(fd)
    return 0
