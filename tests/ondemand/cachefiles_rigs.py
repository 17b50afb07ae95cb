"""Engines over two objects each: one rig with a scripted device, one with the kernel and a mount."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ondemand import fscache, syscalls
from ondemand.canary import image, pattern
from ondemand.engines.cachefiles import BLOCK_SIZE, CachefilesEngine, Device, open_device
from ondemand.errors import FillError
from ondemand.provider import ObjectKey, Sink
from ondemand.ranges import Range, RangeSet
from ondemand.scripted_cachefiles import ScriptedCachefiles
from ondemand.testing import PatternProvider, serving

FSID = "suite"
VOLUME = b"erofs,suite"
PRIMARY = ObjectKey(FSID.encode(), VOLUME)
KEYS = (ObjectKey(b"first", VOLUME), ObjectKey(b"second", VOLUME))
SEEDS = {KEYS[0]: 1, KEYS[1]: 1 << 40}
SIZE = 1 << 20
LEAST_SIZE = 4096

Content = Callable[[int, int], bytes]


def patterned(seed: int) -> Content:
    """The content of an object that is filled with `pattern`."""
    return lambda offset, length: pattern(offset, length, seed)


@dataclass
class ContentProvider:
    """Fills objects from memory; remembers nothing of what it has filled.

    Attributes:
        contents: Size and content of each object.
        enlarge: Fills are widened to whole multiples of this many bytes.
        opens: Keys that the kernel has opened, and not closed, once for each time.
    """

    contents: Mapping[ObjectKey, tuple[int, Content]]
    enlarge: int = BLOCK_SIZE
    opens: list[ObjectKey] = field(default_factory=list)
    fills: list[tuple[ObjectKey, Range]] = field(default_factory=list)

    def present(self, key: ObjectKey, want: Range) -> bool:
        return False

    async def fill(self, key: ObjectKey, want: Range, sink: Sink) -> None:
        self.fills.append((key, want))
        size, content = self.contents[key]
        whole = want.clamp(size).aligned(self.enlarge).clamp(-(-size // BLOCK_SIZE) * BLOCK_SIZE)
        if whole:
            data = content(whole.start, min(whole.stop, size) - whole.start)
            sink.write(whole.start, memoryview(data + bytes(len(whole) - len(data))))

    async def open(self, key: ObjectKey, sink: Sink) -> int:
        if key not in self.contents:
            raise FillError(f"no object {key}", 2)
        self.opens.append(key)
        return self.contents[key][0]

    def closed(self, key: ObjectKey) -> None:
        self.opens.remove(key)


class CachefilesRig:
    """What both rigs have."""

    def __init__(self, stack: ExitStack, device: int | Device, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.seeds = SEEDS
        self.size = SIZE
        self._device = device
        self.engine = CachefilesEngine(device, deadline_s=deadline_s)
        stack.callback(lambda: self.engine.close())

    def replace_worker(self) -> None:
        """A dead process' descriptors are closed; the device stays."""
        self.engine.close()
        self.engine = CachefilesEngine(self._device, deadline_s=self.deadline_s)
        self.engine.restore()


class ScriptedRig(CachefilesRig):
    """Readers are tasks that ask the scripted device."""

    def __init__(self, stack: ExitStack, deadline_s: float) -> None:
        self.device = ScriptedCachefiles()
        stack.callback(self.device.dispose)
        super().__init__(stack, self.device, deadline_s)

    async def mount(self) -> None:
        await self.device.mount(*KEYS)

    async def read(self, key: ObjectKey, offset: int, length: int) -> bytes:
        return await self.device.read_object(key, offset, length)

    async def forget(self, key: ObjectKey) -> None:
        self.device.forget(key)


class KernelRig(CachefilesRig):
    """Readers are threads that read through an EROFS mount of two devices."""

    def __init__(self, stack: ExitStack, directory: Path, deadline_s: float) -> None:
        cache = directory / "cache"
        cache.mkdir(exist_ok=True)
        self.target = directory / "target"
        self.target.mkdir(exist_ok=True)
        self.device_fd = open_device(cache)
        stack.callback(os.close, self.device_fd)
        super().__init__(stack, self.device_fd, deadline_s)
        self._stack = stack
        self._threads = ThreadPoolExecutor(32)
        self._reads: set[Future[bytes]] = set()
        self.files: dict[ObjectKey, int] = {}

    async def mount(self) -> None:
        options = fscache.mount_options(FSID, devices=[key.cookie.decode() for key in KEYS])
        await fscache.mount(str(self.target), options)
        self._stack.callback(syscalls.umount2, str(self.target))
        for n, key in enumerate(KEYS):
            # Opening reads the image's only block, by which all of its metadata is there.
            self.files[key] = await asyncio.to_thread(
                os.open, self.target / str(n), os.O_RDONLY | os.O_CLOEXEC
            )
            self._stack.callback(os.close, self.files[key])
        self._stack.callback(self._threads.shutdown)

    async def read(self, key: ObjectKey, offset: int, length: int) -> bytes:
        read = self._threads.submit(os.pread, self.files[key], length, offset)
        self._reads.add(read)
        read.add_done_callback(self._reads.discard)
        return await asyncio.wrap_future(read)

    async def release_readers(self) -> None:
        """Where a test has failed, readers still wait."""
        while self._reads:
            await self.engine.aclose(deny=True)
            await asyncio.sleep(0.001)

    async def forget(self, key: ObjectKey) -> None:
        os.posix_fadvise(self.files[key], 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass
class MountProvider(PatternProvider):
    """Serves the primary image, too."""

    async def open(self, key: ObjectKey, sink: Sink) -> int:
        return LEAST_SIZE if key == PRIMARY else await super().open(key, sink)

    async def fill(self, key: ObjectKey, want: Range, sink: Sink) -> None:
        if key == PRIMARY:
            sink.write(0, memoryview(image([SIZE, SIZE])))
            self.filled.setdefault(key, RangeSet()).add(Range(0, SIZE))
        else:
            await super().fill(key, want, sink)


@asynccontextmanager
async def scripted(deadline_s: float = 60.0) -> AsyncIterator[ScriptedRig]:
    """A rig in its second worker: the first one has served the mount."""
    with ExitStack() as stack:
        rig = ScriptedRig(stack, deadline_s)
        async with serving(rig, MountProvider(SEEDS, SIZE)):
            await rig.mount()
        rig.replace_worker()
        yield rig


@asynccontextmanager
async def kernel(directory: Path, deadline_s: float = 60.0) -> AsyncIterator[KernelRig]:
    """A rig in its second worker: the first one has served the mount."""
    with ExitStack() as stack:
        rig = KernelRig(stack, directory, deadline_s)
        provider = MountProvider(SEEDS, SIZE)
        async with serving(rig, provider):
            await rig.mount()
            await wait_for(lambda: rig.engine.statistics.in_flight == 0)
        rig.replace_worker()
        try:
            yield rig
        finally:
            await rig.release_readers()


async def wait_for(condition: Callable[[], bool], patience_s: float = 5.0) -> None:
    """Let others run until *condition* holds."""
    give_up = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < give_up, "it did not come about"
        await asyncio.sleep(0.001)
