"""A keeper that forks workers and kills them, while readers read: run as a program of its own.

    python -m tests.ondemand.kill_rig DIRECTORY SECONDS

It forks, so it must not share a process with a test runner's threads. Prints one line of JSON: how many
reads, wrong bytes and errors the readers had, and how many kills and stale events there were.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import structlog
import uvloop

from ondemand import syscalls
from ondemand.canary import image, pattern
from ondemand.engines.fanotify import BLOCK_SIZE, FanotifyEngine, open_group
from ondemand.journal import Journal
from ondemand.provider import ObjectKey, Provider, Sink
from ondemand.ranges import Range

SIZE = 64 << 20
SEEDS = {ObjectKey(b"first"): 1, ObjectKey(b"second"): 1 << 40}
READERS = 8
COUNTERS = struct.Struct("=QQQ")  # reads, wrong bytes, errors
WORKER_LIFE_S = (0.02, 0.2)


class Present:
    """Which blocks are filled, in memory that survives the worker, as a chunk map on disk would."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, len(SEEDS) * SIZE // BLOCK_SIZE)

    def covers(self, number: int, want: Range) -> bool:
        first = number * (SIZE // BLOCK_SIZE)
        blocks = slice(first + want.start // BLOCK_SIZE, first + -(-want.stop // BLOCK_SIZE))
        return 0 not in self._map[blocks]

    def add(self, number: int, done: Range) -> None:
        first = number * (SIZE // BLOCK_SIZE) + done.start // BLOCK_SIZE
        count = len(done) // BLOCK_SIZE
        self._map[first : first + count] = b"\1" * count


class SlowProvider:
    """Takes its time over each fill, and forgets none."""

    def __init__(self, present: Present) -> None:
        self._present = present
        self._numbers = {key: n for n, key in enumerate(SEEDS)}

    def present(self, key: ObjectKey, want: Range) -> bool:
        return self._present.covers(self._numbers[key], want.clamp(SIZE))

    async def fill(self, key: ObjectKey, want: Range, sink: Sink) -> None:
        await asyncio.sleep(random.uniform(0.0, 0.01))
        whole = want.clamp(SIZE).aligned(BLOCK_SIZE)
        sink.write(whole.start, memoryview(pattern(whole.start, len(whole), SEEDS[key])))
        self._present.add(self._numbers[key], whole)

    async def open(self, key: ObjectKey, sink: Sink) -> int:
        raise NotImplementedError

    def closed(self, key: ObjectKey) -> None:
        raise NotImplementedError


def read_until(stop: mmap.mmap, counters: mmap.mmap, number: int, mount_fd: int) -> None:
    """A reader: random places of both files, dropping what EROFS has cached now and then."""
    dice = random.Random(number)
    files = [os.open(str(n), os.O_RDONLY, dir_fd=mount_fd) for n in range(len(SEEDS))]
    seeds = list(SEEDS.values())
    reads = wrong = errors = 0
    while not stop[0]:
        n = dice.randrange(len(files))
        length = dice.choice((100, 4096, 20000, 131072))
        offset = dice.randrange(SIZE - length)
        try:
            if os.pread(files[n], length, offset) != pattern(offset, length, seeds[n]):
                wrong += 1
        except OSError:
            errors += 1
        reads += 1
        if dice.random() < 0.05:
            os.posix_fadvise(files[n], 0, 0, os.POSIX_FADV_DONTNEED)
        COUNTERS.pack_into(counters, number * COUNTERS.size, reads, wrong, errors)


def work(group_fd: int, journal_fd: int, fds: dict[str, int], provider: Provider, stale: mmap.mmap) -> None:
    """A worker, from its first step to the signal that kills it."""
    engine = FanotifyEngine(group_fd, Journal(journal_fd), deadline_s=60.0)
    held = engine.recover(fds)
    stale[:8] = (int.from_bytes(stale[:8], "little") + engine.statistics.stale).to_bytes(8, "little")
    for key in SEEDS:
        engine.adopt(key, held[str(key)])
    uvloop.run(engine.serve(provider))


def fork(body: Callable[..., None], *arguments: object) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        body(*arguments)
    except BaseException as exc:
        print(f"{body.__name__} ended with {exc!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main(directory: Path, seconds: float) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    syscalls.raise_descriptor_limit()
    group_fd = open_group()
    journal_fd = os.memfd_create("journal", os.MFD_CLOEXEC)
    Journal.create(journal_fd, 1024).close()
    keeper = FanotifyEngine(group_fd, Journal(journal_fd), deadline_s=60.0)
    fds = {}
    for key in SEEDS:
        fds[str(key)] = os.open(directory / str(key), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.truncate(fds[str(key)], SIZE)
        keeper.guard(key, fds[str(key)])
    (directory / "image").write_bytes(image([SIZE] * len(SEEDS)))
    mount_fd = syscalls.fsmount_erofs(str(directory / "image"), [str(directory / str(key)) for key in SEEDS])

    stop, stale = mmap.mmap(-1, 1), mmap.mmap(-1, 8)
    counters = mmap.mmap(-1, READERS * COUNTERS.size)
    provider = SlowProvider(Present())

    def reader(number: int) -> None:
        os.close(group_fd)  # a reader that held it would wait for itself
        read_until(stop, counters, number, mount_fd)

    readers = [fork(reader, number) for number in range(READERS)]
    kills = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        worker = fork(work, group_fd, journal_fd, fds, provider, stale)
        time.sleep(random.uniform(*WORKER_LIFE_S))  # the point: a kill at any instant
        os.kill(worker, signal.SIGKILL)
        _, status = os.waitpid(worker, 0)
        if not os.WIFSIGNALED(status):
            break  # it ended by itself: what it printed says why
        kills += 1
    stop[0] = 1
    worker = fork(work, group_fd, journal_fd, fds, provider, stale)
    for pid in readers:
        os.waitpid(pid, 0)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    os.close(mount_fd)
    os.close(group_fd)
    totals = [sum(column) for column in zip(*COUNTERS.iter_unpack(counters), strict=True)]
    result = dict(zip(("reads", "wrong", "errors"), totals, strict=True))
    print(json.dumps({**result, "kills": kills, "stale": int.from_bytes(stale[:8], "little")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
