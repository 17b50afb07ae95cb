"""Engines over two files each: one rig with a scripted device, one with the kernel."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from ondemand import syscalls
from ondemand.canary import image
from ondemand.engines.fanotify import FanotifyEngine, Group, open_group
from ondemand.journal import Journal
from ondemand.provider import ObjectKey
from ondemand.testing import ScriptedDevice

KEYS = (ObjectKey(b"first"), ObjectKey(b"second"))
SEEDS = {KEYS[0]: 1, KEYS[1]: 1 << 40}
SIZE = 1 << 20


def new_journal(stack: ExitStack, slot_count: int = 64) -> Journal:
    """A journal that is gone with *stack*."""
    fd = os.memfd_create("journal", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    journal = Journal.create(fd, slot_count)
    stack.callback(journal.close)
    return journal


class FanotifyRig:
    """What both rigs have: the keeper's part."""

    def __init__(self, stack: ExitStack, directory: Path, group: int | Group, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.seeds = SEEDS
        self.size = SIZE
        self.journal = new_journal(stack)
        self.paths = {key: directory / str(key) for key in KEYS}
        self.fds: dict[ObjectKey, int] = {}
        self._group = group
        self.engine = FanotifyEngine(group, self.journal, deadline_s=deadline_s)
        for key, path in self.paths.items():
            self.fds[key] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, self.fds[key])
            os.truncate(self.fds[key], SIZE)
            self.engine.guard(key, self.fds[key])

    def replace_worker(self) -> None:
        """A dead process' own descriptors are closed; the journal, the group and the marks stay."""
        journal = Journal(self.journal.fd)  # while the numbers are taken: it makes a descriptor, too
        for request in self.engine._protocol.owed():
            if not request.stale:
                os.close(request.fd)
        for number in self.engine._occupied:
            os.close(number)
        self.engine = FanotifyEngine(self._group, journal, deadline_s=self.deadline_s)
        self.engine.recover()
        for key, fd in self.fds.items():
            self.engine.adopt(key, fd)


class ScriptedRig(FanotifyRig):
    """Readers are tasks that ask the scripted device."""

    def __init__(self, stack: ExitStack, directory: Path, deadline_s: float) -> None:
        self.device = ScriptedDevice()
        stack.callback(self.device.close)
        super().__init__(stack, directory, self.device, deadline_s)

    async def read(self, key: ObjectKey, offset: int, length: int) -> bytes:
        return await self.device.read_file(str(self.paths[key]), offset, length)

    async def forget(self, key: ObjectKey) -> None:
        return None


class KernelRig(FanotifyRig):
    """Readers are threads that read through an EROFS mount of the two files."""

    def __init__(self, stack: ExitStack, directory: Path, deadline_s: float) -> None:
        self.group_fd = open_group()
        stack.callback(os.close, self.group_fd)  # after the mount is gone
        super().__init__(stack, directory, self.group_fd, deadline_s)
        (directory / "image").write_bytes(image([SIZE, SIZE]))
        mount_fd = syscalls.fsmount_erofs(str(directory / "image"), [str(self.paths[key]) for key in KEYS])
        stack.callback(os.close, mount_fd)
        self.files = {}
        for n, key in enumerate(KEYS):
            self.files[key] = os.open(str(n), os.O_RDONLY | os.O_CLOEXEC, dir_fd=mount_fd)
            stack.callback(os.close, self.files[key])
        self._threads = ThreadPoolExecutor(32)
        stack.callback(self._threads.shutdown)
        self._reads: set[Future[bytes]] = set()

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


@asynccontextmanager
async def scripted(directory: Path, deadline_s: float = 60.0) -> AsyncIterator[ScriptedRig]:
    with ExitStack() as stack:
        yield ScriptedRig(stack, directory, deadline_s)


@asynccontextmanager
async def kernel(directory: Path, deadline_s: float = 60.0) -> AsyncIterator[KernelRig]:
    with ExitStack() as stack:
        rig = KernelRig(stack, directory, deadline_s)
        try:
            yield rig
        finally:
            await rig.release_readers()
