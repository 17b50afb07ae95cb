"""What tests of engines and providers share: a scripted device, and one suite for each seam.

`ScriptedDevice` stands in for a fanotify group. It is trusted because the suite that it passes is the one
that the kernel passes.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from ondemand.canary import pattern
from ondemand.engines.base import Engine
from ondemand.engines.fanotify import BLOCK_SIZE, Group
from ondemand.errors import FillError
from ondemand.protocol.fanotify import narrow
from ondemand.provider import ObjectKey, Provider, Sink
from ondemand.ranges import Range, RangeSet
from ondemand.wire import fanotify as wire

PATIENCE_S = 5.0
"""How long a check waits for what ought to happen."""


# -- a fanotify group ---------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Waiting:
    path: str
    want: Range
    answered: asyncio.Future[int]
    fd: int = -1


class ScriptedDevice(Group):
    """Does what the kernel does with a group, for readers that are tasks of this process.

    Numbers are those of real descriptors, answers are matched by number and oldest first, errnos are checked,
    and what is allowed is read from the file whether or not it was filled.
    """

    def __init__(self) -> None:
        super().__init__(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        self._queue: deque[_Waiting | None] = deque()  # None is an overflow record
        self._pending: list[_Waiting] = []
        self._marks: set[tuple[int, int]] = set()
        self.answers: list[wire.Response] = []

    def close(self) -> None:
        """The last descriptor closes: whoever waits is let go, with whatever is in the file."""
        os.close(self.fileno())
        for waiting in [*self._queue, *self._pending]:
            if waiting is not None and not waiting.answered.done():
                waiting.answered.set_result(0)

    # as the engine sees it

    def read(self, slots: list[memoryview]) -> int:
        """See `Group.read`."""
        length = 0
        for slot in slots:
            if not self._queue:
                break
            waiting = self._queue.popleft()
            if waiting is None:
                record = wire.encode(wire.Overflow())
            else:
                try:
                    waiting.fd = os.open(waiting.path, os.O_RDWR | os.O_CLOEXEC)
                except OSError:
                    waiting.answered.set_result(errno.EPERM)
                    self._signal()
                    if length:
                        return length
                    raise
                self._pending.append(waiting)
                event = wire.PreAccess(
                    wire.EventFd(waiting.fd), os.getpid(), waiting.want.start, len(waiting.want)
                )
                record = wire.encode(event)
            slot[: len(record)] = record
            length += len(record)
            if len(record) < len(slot):
                break
        self._signal()
        if not length:
            raise BlockingIOError(errno.EAGAIN, "no event")
        return length

    def answer(self, response: bytes) -> None:
        """See `Group.answer`."""
        parsed = wire.parse_response(response)
        if parsed.errno and narrow(parsed.errno) != parsed.errno:
            raise OSError(errno.EINVAL, "no such errno in an answer")
        for waiting in self._pending:
            if waiting.fd == parsed.fd:
                break
        else:
            raise FileNotFoundError(errno.ENOENT, f"no event {parsed.fd}")
        self._pending.remove(waiting)
        self.answers.append(parsed)
        if not waiting.answered.done():  # or its reader was killed: the answer is taken and does nothing
            waiting.answered.set_result(parsed.errno)

    def mark(self, fd: int) -> None:
        """See `Group.mark`."""
        status = os.fstat(fd)
        self._marks.add((status.st_dev, status.st_ino))

    def unmark(self, fd: int) -> None:
        """See `Group.unmark`."""
        status = os.fstat(fd)
        try:
            self._marks.remove((status.st_dev, status.st_ino))
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "no mark") from None

    # as readers see it

    async def read_file(self, path: str, offset: int, length: int) -> bytes:
        """Read as through an EROFS mount of *path*: whole pages; if refused, page by page; then EIO."""
        want = Range.of(offset, length).aligned(BLOCK_SIZE)
        if await self.ask(path, want):
            for start in range(want.start, want.stop, BLOCK_SIZE):
                if await self.ask(path, Range.of(start, BLOCK_SIZE)):
                    raise OSError(errno.EIO, f"{path} at {start}")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, length, offset)
        finally:
            os.close(fd)

    async def ask(self, path: str, want: Range) -> int:
        """Announce one access; returns the answer's errno, 0 if allowed or nobody guards *path*."""
        status = os.stat(path)
        if (status.st_dev, status.st_ino) not in self._marks:
            return 0
        waiting = _Waiting(path, want, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._signal()
        try:
            return await waiting.answered
        finally:
            if waiting in self._queue:  # killed before anybody read it
                self._queue.remove(waiting)
                self._signal()

    def overflow(self) -> None:
        """Queue the record that says that an event was dropped."""
        self._queue.append(None)
        self._signal()

    @property
    def queued_count(self) -> int:
        """Events that nobody has read."""
        return len(self._queue)

    def _signal(self) -> None:
        try:
            os.eventfd_read(self.fileno())
        except BlockingIOError:
            pass
        if self._queue:
            os.eventfd_write(self.fileno(), 1)


# -- providers ----------------------------------------------------------------------------------------------


async def _at_once(key: ObjectKey, want: Range) -> None:
    return None


@dataclass
class PatternProvider:
    """Fills objects with `pattern`.

    Attributes:
        seeds: What each object is filled with.
        size: Of each object, a multiple of `BLOCK_SIZE`.
        before_fill: Awaited before each fill: the place to wait, fail or be cancelled.
    """

    seeds: Mapping[ObjectKey, int]
    size: int
    before_fill: Callable[[ObjectKey, Range], Awaitable[None]] = _at_once
    filled: dict[ObjectKey, RangeSet] = field(default_factory=dict)
    asked: list[tuple[ObjectKey, Range]] = field(default_factory=list)
    fills: list[tuple[ObjectKey, Range]] = field(default_factory=list)

    def present(self, key: ObjectKey, want: Range) -> bool:
        """See `Provider.present`."""
        self.asked.append((key, want))
        return self.filled.setdefault(key, RangeSet()).covers(want.clamp(self.size))

    async def fill(self, key: ObjectKey, want: Range, sink: Sink) -> None:
        """See `Provider.fill`."""
        self.fills.append((key, want))
        await self.before_fill(key, want)
        whole = want.clamp(self.size).aligned(sink.block_size)
        if whole:
            sink.write(whole.start, memoryview(pattern(whole.start, len(whole), self.seeds[key])))
            self.filled.setdefault(key, RangeSet()).add(whole)

    async def open(self, key: ObjectKey, sink: Sink) -> int:
        """See `Provider.open`."""
        if key not in self.seeds:
            raise FillError(f"no object {key}", errno.ENOENT)
        return self.size

    def closed(self, key: ObjectKey) -> None:
        """See `Provider.closed`."""


class MemorySink:
    """A sink that keeps what it gets and refuses what a kernel would."""

    block_size = BLOCK_SIZE

    def __init__(self, size: int) -> None:
        self.content = bytearray(-(-size // BLOCK_SIZE) * BLOCK_SIZE)
        self._written = RangeSet()

    def write(self, offset: int, data: memoryview) -> None:
        """See `Sink.write`."""
        if offset % BLOCK_SIZE or len(data) % BLOCK_SIZE or offset + len(data) > len(self.content):
            raise OSError(errno.EINVAL, f"{len(data)} bytes at {offset}")
        self.content[offset : offset + len(data)] = data
        self._written.add(Range.of(offset, len(data)))

    def data(self) -> RangeSet:
        """See `Sink.data`."""
        return RangeSet(self._written)


async def check_provider(
    provider: Provider, key: ObjectKey, sink: MemorySink, expected: Callable[[int, int], bytes], size: int
) -> None:
    """What every provider owes every engine. *key* is an object of which nothing is filled yet.

    Args:
        expected: ``expected(offset, length)`` are the right bytes.
        size: Of the object, in bytes; at least 8 blocks.

    Raises:
        AssertionError: It does not keep to it.
    """
    nothing, beyond = Range(0, 0), Range.of(-(-size // BLOCK_SIZE) * BLOCK_SIZE, BLOCK_SIZE)
    assert provider.present(key, nothing), "an empty range lacks nothing"
    assert provider.present(key, beyond), "what is past the end lacks nothing"
    await provider.fill(key, nothing, sink)
    await provider.fill(key, beyond, sink)

    page = Range.of(BLOCK_SIZE, BLOCK_SIZE)
    assert not provider.present(key, page), "nothing was filled yet"
    await provider.fill(key, page, sink)
    _check_filled(provider, key, sink, expected, page)
    await provider.fill(key, page, sink)  # again: nothing to do

    last = Range(size - BLOCK_SIZE, size + BLOCK_SIZE).aligned(BLOCK_SIZE)
    await provider.fill(key, last, sink)
    _check_filled(provider, key, sink, expected, last.clamp(size))

    overlapping = [Range.of(n * BLOCK_SIZE, 3 * BLOCK_SIZE) for n in range(5)]
    async with asyncio.TaskGroup() as group:
        impatient = group.create_task(provider.fill(key, overlapping[2], sink))
        for want in overlapping:
            group.create_task(provider.fill(key, want, sink))
        await asyncio.sleep(0)
        impatient.cancel()
    for want in overlapping:
        _check_filled(provider, key, sink, expected, want)


def _check_filled(
    provider: Provider,
    key: ObjectKey,
    sink: MemorySink,
    expected: Callable[[int, int], bytes],
    want: Range,
) -> None:
    assert provider.present(key, want), f"{want} was filled"
    assert sink.data().covers(want.aligned(BLOCK_SIZE)), f"{want} did not reach the sink"
    assert sink.content[want.start : want.stop] == expected(want.start, len(want)), f"wrong bytes in {want}"


# -- engines ------------------------------------------------------------------------------------------------


class EngineRig(Protocol):
    """An engine with objects that it guards, and a way to read them as a process behind a mount does.

    Attributes:
        engine: The present worker's.
        seeds: The objects, at least two, with what to fill each with.
        size: Of each object, at least 1 MiB.
        deadline_s: The engine's.
    """

    @property
    def engine(self) -> Engine: ...
    @property
    def seeds(self) -> Mapping[ObjectKey, int]: ...
    @property
    def size(self) -> int: ...
    @property
    def deadline_s(self) -> float: ...

    async def read(self, key: ObjectKey, offset: int, length: int) -> bytes:
        """Raises OSError as the kernel does."""
        ...

    async def forget(self, key: ObjectKey) -> None:
        """Drop what readers of *key* have cached, so that the next read asks again."""
        ...

    def replace_worker(self) -> None:
        """The worker is gone without a word; `engine` is its successor's. Not while it serves."""
        ...


RigFactory = Callable[[float], AbstractAsyncContextManager[EngineRig]]
"""Makes a rig whose engine has the given deadline."""


@asynccontextmanager
async def serving(rig: EngineRig, provider: Provider) -> AsyncIterator[None]:
    """Serve, until the block ends; what is unanswered then stays so."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(rig.engine.serve(provider))
        try:
            async with asyncio.timeout(PATIENCE_S):
                yield
        finally:
            task.cancel()


async def wait_until(condition: Callable[[], bool]) -> None:
    """Let others run until *condition* holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def _provider(rig: EngineRig) -> PatternProvider:
    return PatternProvider(rig.seeds, rig.size)


async def _check_read(rig: EngineRig, key: ObjectKey, offset: int, length: int) -> None:
    got = await rig.read(key, offset, length)
    assert got == pattern(offset, length, rig.seeds[key]), f"wrong bytes at {offset} of {key}"


async def _check_refused(rig: EngineRig, key: ObjectKey, offset: int, length: int) -> None:
    refusal = 0
    try:
        await rig.read(key, offset, length)
    except OSError as exc:
        refusal = exc.errno or 0
    assert refusal == errno.EIO, f"a read at {offset} of {key} ended with errno {refusal}"


async def check_fill_then_hit(make: RigFactory) -> None:
    """What is missing is filled before its reader goes on; what is there is not filled again."""
    async with make(60.0) as rig:
        provider = _provider(rig)
        async with serving(rig, provider):
            for key in rig.seeds:
                await _check_read(rig, key, 3 * BLOCK_SIZE + 5, 1000)
                await _check_read(rig, key, 0, rig.size)  # all, because readahead goes further than a read
                assert {filled for filled, _ in provider.fills} == {key}
                provider.fills.clear()
                await rig.forget(key)
                await _check_read(rig, key, 3 * BLOCK_SIZE + 5, 1000)
                assert not provider.fills, "it was filled before"
        assert rig.engine.statistics.in_flight == 0
        assert rig.engine.statistics.fills >= 2


async def check_parallel_readers(make: RigFactory) -> None:
    """Eight readers in different orders all get the right bytes."""
    async with make(60.0) as rig:
        provider = _provider(rig)
        pages = rig.size // BLOCK_SIZE

        async def read_all(step: int) -> None:
            for n in range(0, pages, 4):
                for key in rig.seeds:
                    await _check_read(rig, key, n * step % pages * BLOCK_SIZE, BLOCK_SIZE)

        async with serving(rig, provider), asyncio.TaskGroup() as group:
            for step in (1, 3, 5, 7, 11, 13, 17, 19):
                group.create_task(read_all(step))
        assert rig.engine.statistics.in_flight == 0
        assert rig.engine.statistics.errors == 0


async def check_slow_fill_holds_up_nobody(make: RigFactory) -> None:
    """While one reader waits for its bytes, others get theirs."""
    async with make(60.0) as rig:
        provider = _provider(rig)
        slow, quick = list(rig.seeds)[:2]
        gate = asyncio.Event()

        async def before_fill(key: ObjectKey, want: Range) -> None:
            if key == slow:
                await gate.wait()

        provider.before_fill = before_fill
        async with serving(rig, provider), asyncio.TaskGroup() as group:
            waiting = group.create_task(_check_read(rig, slow, 0, BLOCK_SIZE))
            await wait_until(lambda: bool(provider.fills))
            await _check_read(rig, quick, 0, 4 * BLOCK_SIZE)
            assert not waiting.done()
            gate.set()


async def check_failed_fill_is_eio(make: RigFactory) -> None:
    """What cannot be filled, by error, crash or cancellation, is EIO; a later read tries afresh."""
    async with make(60.0) as rig:
        provider = _provider(rig)
        key = next(iter(rig.seeds))
        failures: list[BaseException] = [
            FillError("no such bytes", errno.ENODATA),
            FillError("no space", errno.ENOSPC),
            RuntimeError("crashed"),
            asyncio.CancelledError(),
        ]
        async with serving(rig, provider):
            for failure in failures:

                async def before_fill(key: ObjectKey, want: Range, failure: BaseException = failure) -> None:
                    raise failure

                provider.before_fill = before_fill
                await _check_refused(rig, key, 0, BLOCK_SIZE)
            provider.before_fill = _at_once
            await rig.forget(key)
            await _check_read(rig, key, 0, BLOCK_SIZE)
        assert rig.engine.statistics.in_flight == 0
        assert rig.engine.statistics.errors >= len(failures)


async def check_deadline(make: RigFactory) -> None:
    """A provider that never returns costs a reader the deadline, the kernel's second asking included."""
    async with make(1.0) as rig:
        provider = _provider(rig)
        key = next(iter(rig.seeds))

        async def hang(key: ObjectKey, want: Range) -> None:
            await asyncio.Event().wait()

        provider.before_fill = hang
        async with serving(rig, provider):
            loop = asyncio.get_running_loop()
            start = loop.time()
            await _check_refused(rig, key, 0, 16 * BLOCK_SIZE)
            elapsed = loop.time() - start
            assert 0.6 * rig.deadline_s < elapsed <= rig.deadline_s, f"EIO after {elapsed:.2f} s"
            provider.before_fill = _at_once
            await _check_read(rig, key, 8 * BLOCK_SIZE, BLOCK_SIZE)


async def check_replaced_worker(make: RigFactory) -> None:
    """Readers that wait when a worker dies, and while nobody serves, are served by the next one."""
    async with make(60.0) as rig:
        reads = [(key, n * 8 * BLOCK_SIZE) for key in rig.seeds for n in range(8)]
        async with asyncio.TaskGroup() as group:
            readers = [group.create_task(_check_read(rig, *read, BLOCK_SIZE)) for read in reads]
            for _ in range(3):
                provider = _provider(rig)

                async def hang(key: ObjectKey, want: Range) -> None:
                    await asyncio.Event().wait()

                provider.before_fill = hang
                async with serving(rig, provider):
                    await wait_until(lambda p=provider: len(p.fills) >= len(reads))  # type: ignore[misc]
                rig.replace_worker()
            async with serving(rig, _provider(rig)):
                await asyncio.wait(readers)
            assert rig.engine.statistics.stale >= len(reads)
        assert rig.engine.statistics.in_flight == 0
        assert rig.engine.statistics.errors == 0


async def check_denied_at_the_end(make: RigFactory) -> None:
    """An engine that ends for good leaves nobody waiting."""
    async with make(60.0) as rig:
        provider = _provider(rig)

        async def hang(key: ObjectKey, want: Range) -> None:
            await asyncio.Event().wait()

        provider.before_fill = hang
        async with asyncio.TaskGroup() as group:
            async with serving(rig, provider):
                readers = [
                    group.create_task(_check_refused(rig, key, 0, 4 * BLOCK_SIZE)) for key in rig.seeds
                ]
                await wait_until(lambda: len(provider.fills) >= len(readers))
            while any(not reader.done() for reader in readers):
                await rig.engine.aclose(deny=True)  # a reader that was denied asks again, page by page
                await asyncio.sleep(0.001)
        assert rig.engine.statistics.in_flight == 0


ENGINE_CHECKS: tuple[Callable[[RigFactory], Awaitable[None]], ...] = (
    check_fill_then_hit,
    check_parallel_readers,
    check_slow_fill_holds_up_nobody,
    check_failed_fill_is_eio,
    check_deadline,
    check_replaced_worker,
    check_denied_at_the_end,
)


async def check_engine(make: RigFactory) -> None:
    """Everything that an engine owes, on a real kernel or a scripted one.

    Raises:
        AssertionError: It does not keep to it.
    """
    for check in ENGINE_CHECKS:
        await check(make)
