"""What only the cachefiles engine does, over a scripted device: mounts, closes, lost objects, odd kernels."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ondemand.cachefiles import CacheFileSink
from ondemand.canary import pattern
from ondemand.engines import cachefiles as engines
from ondemand.engines.cachefiles import BLOCK_SIZE, CachefilesEngine
from ondemand.errors import DeviceLost, EngineUnavailable, FillError, MalformedMessage
from ondemand.provider import ObjectKey, Sink
from ondemand.ranges import Range, RangeSet
from ondemand.scripted_cachefiles import ScriptedCachefiles
from ondemand.testing import PatternProvider
from ondemand.wire import cachefiles as wire
from tests.ondemand.cachefiles_rigs import KEYS, SEEDS, SIZE, VOLUME, wait_for

FIRST, SECOND = KEYS
PAGE = Range(0, BLOCK_SIZE)


class Provider(PatternProvider):
    """Also notes what is open, and looks at what is there whenever something is opened."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__(SEEDS, size)
        self.opened: list[ObjectKey] = []
        self.open_gate: asyncio.Event | None = None
        self.refusal: BaseException | None = None

    async def open(self, key: ObjectKey, sink: Sink) -> int:
        if self.open_gate:
            await self.open_gate.wait()
        if self.refusal:
            raise self.refusal
        data = sink.data()
        kept = RangeSet(self.filled.get(key, ()))
        for known in list(kept):
            for hole in data.missing(known):
                kept.discard(hole)
        self.filled[key] = kept
        size = await super().open(key, sink)
        self.opened.append(key)
        return size

    def closed(self, key: ObjectKey) -> None:
        self.opened.remove(key)


class Bench:
    """A device, an engine on it that serves, and its provider."""

    def __init__(self, device: ScriptedCachefiles) -> None:
        self.device = device
        self.provider = Provider()
        self.engine = CachefilesEngine(device, deadline_s=60.0)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            task = group.create_task(self.engine.serve(self.provider))
            try:
                yield
            finally:
                task.cancel()

    def replace_worker(self) -> None:
        self.engine.close()
        self.engine = CachefilesEngine(self.device, deadline_s=60.0)
        self.engine.restore()

    async def check_read(self, key: ObjectKey, offset: int = 0, length: int = BLOCK_SIZE) -> None:
        assert await self.device.read_object(key, offset, length) == pattern(offset, length, SEEDS[key])

    async def check_refused(self, key: ObjectKey, offset: int = 0) -> None:
        with pytest.raises(OSError) as refused:
            await self.device.read_object(key, offset, BLOCK_SIZE)
        assert refused.value.errno == errno.EIO

    async def check_mount_fails(self, *keys: ObjectKey) -> None:
        with pytest.raises(OSError) as refused:
            await self.device.mount(*keys)
        assert refused.value.errno == errno.EIO


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    fds = set(os.listdir("/proc/self/fd"))
    device = ScriptedCachefiles()
    bench = Bench(device)
    yield bench
    bench.engine.close()
    assert list(device.openings) == []
    device.dispose()
    assert set(os.listdir("/proc/self/fd")) == fds


async def hang(key: ObjectKey, want: Range) -> None:
    await asyncio.Event().wait()


def answers(device: ScriptedCachefiles) -> list[int]:
    return [command.size for command in device.commands if isinstance(command, wire.Copen)]


# -- OPEN ---------------------------------------------------------------------------------------------------


async def test_a_mount_is_told_sizes_and_an_unmount_closes(bench: Bench) -> None:
    async with bench.serving():
        await bench.device.mount(*KEYS)
        assert answers(bench.device) == [SIZE, SIZE]
        assert sorted(map(str, bench.device.openings)) == sorted(map(str, bench.provider.opened))
        await bench.check_read(FIRST)
        await bench.device.unmount(*KEYS)
        assert (list(bench.device.openings), bench.provider.opened) == ([], [])
        await bench.device.mount(FIRST)
        await bench.check_read(FIRST)
    assert bench.device.reads == 1
    assert bench.engine.statistics.in_flight == 0


async def test_descriptors_of_objects_are_not_inherited(bench: Bench) -> None:
    async with bench.serving():
        await bench.device.mount(FIRST)
        assert [os.get_inheritable(fd) for fd in bench.device._openings] == [False]


@pytest.mark.parametrize(
    ("refusal", "answer"),
    [
        (FillError("no such object", errno.ENOENT), -errno.ENOENT),
        (RuntimeError("crashed"), -errno.EIO),
        (asyncio.CancelledError(), -errno.EIO),
    ],
    ids=["refused", "crashed", "cancelled"],
)
async def test_an_object_that_nobody_vouches_for_is_refused(
    bench: Bench, refusal: BaseException, answer: int
) -> None:
    bench.provider.refusal = refusal
    async with bench.serving():
        await bench.check_mount_fails(FIRST)
        assert answers(bench.device) == [answer]
        assert list(bench.device.openings) == []
        bench.provider.refusal = None
        await bench.device.mount(FIRST)
    assert bench.engine.statistics.errors == 1


@pytest.mark.parametrize("cookie", [b"x" * 201, b"\xff" * 190, b"a/" + b"x" * 188])
async def test_a_key_without_a_file_of_its_own_is_refused_unasked(bench: Bench, cookie: bytes) -> None:
    key = ObjectKey(cookie, VOLUME)
    bench.provider.seeds = {key: 1}
    async with bench.serving():
        await bench.check_mount_fails(key)
    assert answers(bench.device) == [-errno.ENAMETOOLONG]
    assert bench.provider.opened == []


async def test_a_mount_that_nobody_decides_on_fails_within_the_deadline(bench: Bench) -> None:
    bench.provider.open_gate = asyncio.Event()
    bench.engine = CachefilesEngine(bench.device, deadline_s=60.0, open_deadline_s=0.05)
    async with bench.serving():
        await bench.check_mount_fails(FIRST)
    assert answers(bench.device) == [-errno.ETIMEDOUT]


async def test_another_size_than_before_is_refused_and_the_cache_kept(bench: Bench) -> None:
    async with bench.serving():
        await bench.device.mount(FIRST)
        await bench.check_read(FIRST)
        await bench.device.unmount(FIRST)
        bench.provider.size = SIZE + 1
        await bench.check_mount_fails(FIRST)
        assert answers(bench.device)[-1] == -errno.ESTALE
        assert bench.provider.opened == []
        bench.provider.size = SIZE
        await bench.device.mount(FIRST)
        await bench.check_read(FIRST)
    assert bench.device.reads == 1


async def test_a_failed_delivery_fails_one_mount_only(bench: Bench) -> None:
    bench.device.refusals = [errno.EMFILE, errno.EEXIST]
    async with bench.serving():
        await bench.check_mount_fails(FIRST)
        await bench.check_mount_fails(SECOND)
        await bench.device.mount(FIRST)
        await bench.check_read(FIRST)
    assert bench.engine.statistics.errors == 2


# -- READ ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1])
async def test_what_lies_past_the_end_is_zeros(bench: Bench, size: int) -> None:
    bench.provider.size = size
    async with bench.serving():
        await bench.device.mount(FIRST)
        got = await bench.device.read_object(FIRST, 0, 300_000)
    end = Range(0, size).aligned(BLOCK_SIZE).stop
    assert got == pattern(0, end) + bytes(300_000 - end)


async def test_an_object_of_no_size_reads_as_zeros(bench: Bench) -> None:
    bench.provider.size = 0
    async with bench.serving():
        await bench.device.mount(FIRST)
        assert await bench.device.read_object(FIRST, 1 << 20, 8) == bytes(8)
    assert answers(bench.device) == [0]


async def test_what_was_lost_behind_the_providers_back_is_filled_again(bench: Bench) -> None:
    async with bench.serving():
        await bench.device.mount(FIRST)
        await bench.check_read(FIRST, 0, 16 * BLOCK_SIZE)
        bench.device.files[FIRST].data.discard(Range.of(4 * BLOCK_SIZE, 2 * BLOCK_SIZE))
        bench.device.files[FIRST].content[4 * BLOCK_SIZE : 6 * BLOCK_SIZE] = bytes(2 * BLOCK_SIZE)
        bench.device.forget(FIRST)
        await bench.check_read(FIRST, 0, 16 * BLOCK_SIZE)
    assert bench.engine.statistics.errors == 0


async def test_a_provider_that_fills_nothing_is_eio(bench: Bench) -> None:
    async def fill(key: ObjectKey, want: Range, sink: Sink) -> None:
        return None

    bench.provider.fill = fill  # type: ignore[method-assign]
    async with bench.serving():
        await bench.device.mount(FIRST)
        await bench.check_refused(FIRST)
    assert bench.engine.statistics.in_flight == 0


async def test_a_killed_readers_request_is_answered_in_vain(bench: Bench) -> None:
    gate = asyncio.Event()

    async def before_fill(key: ObjectKey, want: Range) -> None:
        await gate.wait()

    bench.provider.before_fill = before_fill
    async with bench.serving():
        await bench.device.mount(FIRST)
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(bench.device.read_object(FIRST, 0, 100))
            await wait_for(lambda: bool(bench.provider.fills))
            reader.cancel()
        gate.set()
        await wait_for(lambda: bench.engine.statistics.in_flight == 0)
        await bench.check_read(FIRST)
        assert bench.device.reads == 1, "what was filled stays filled"


async def test_a_full_disk_is_eio_until_there_is_room(bench: Bench) -> None:
    async with bench.serving():
        await bench.device.mount(FIRST)
        bench.device.is_full = True
        await bench.check_refused(FIRST)
        bench.device.is_full = False
        await bench.check_read(FIRST)


async def test_many_requests_are_taken_a_bounded_number_at_a_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "IN_FLIGHT_MAX", 3)
    most = 0

    async def before_fill(key: ObjectKey, want: Range) -> None:
        nonlocal most
        most = max(most, bench.engine.statistics.in_flight)
        await asyncio.sleep(0)

    bench.provider.before_fill = before_fill
    async with bench.serving():
        await bench.device.mount(FIRST)
        async with asyncio.TaskGroup() as group:
            for n in range(40):
                group.create_task(bench.check_read(FIRST, n * 2 * BLOCK_SIZE))
    assert most == 3
    assert bench.engine.statistics.in_flight == 0


# -- CLOSE --------------------------------------------------------------------------------------------------


async def test_a_close_ends_what_is_being_filled(bench: Bench) -> None:
    cancelled = asyncio.Event()

    async def before_fill(key: ObjectKey, want: Range) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    bench.provider.before_fill = before_fill
    async with bench.serving():
        await bench.device.mount(*KEYS)
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(bench.check_refused(FIRST))
            await wait_for(lambda: bool(bench.provider.fills))
            await bench.device.unmount(FIRST)
            await cancelled.wait()
            assert list(bench.device.openings) == bench.provider.opened == [SECOND]
            assert bench.engine.statistics.in_flight == 0
            reader.cancel()
        await bench.device.mount(FIRST)
        bench.provider.before_fill = PatternProvider(SEEDS, SIZE).before_fill
        await bench.check_read(FIRST)


async def test_a_close_before_the_first_step_of_a_fill_ends_it(bench: Bench) -> None:
    async with bench.serving():
        await bench.device.mount(FIRST)
        async with asyncio.TaskGroup() as group:
            group.create_task(bench.check_refused(FIRST))
            await asyncio.sleep(0)
            await bench.device.unmount(FIRST)  # READ and CLOSE are read in one go
        await wait_for(lambda: not list(bench.device.openings))
    assert bench.engine.statistics.in_flight == 0
    assert bench.provider.opened == []


async def test_a_provider_that_crashes_when_something_closes_does_no_harm(bench: Bench) -> None:
    def closed(key: ObjectKey) -> None:
        raise RuntimeError("crashed")

    bench.provider.closed = closed  # type: ignore[method-assign]
    async with bench.serving():
        await bench.device.mount(FIRST)
        await bench.device.unmount(FIRST)
        await bench.device.mount(FIRST)
        await bench.check_read(FIRST)


# -- workers come and go ------------------------------------------------------------------------------------


async def test_a_mount_that_waits_when_the_worker_dies_is_answered_by_the_next(bench: Bench) -> None:
    bench.provider.open_gate = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        async with bench.serving():
            mount = group.create_task(bench.device.mount(FIRST))
            await wait_for(lambda: bench.engine.statistics.in_flight == 1)
        assert not mount.done()
        bench.replace_worker()
        bench.provider.open_gate.set()
        async with bench.serving():
            await mount
    assert answers(bench.device) == [SIZE]


async def test_without_restore_what_was_read_stays_unanswered(bench: Bench) -> None:
    bench.provider.open_gate = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        async with bench.serving():
            mount = group.create_task(bench.device.mount(FIRST))
            await wait_for(lambda: bench.engine.statistics.in_flight == 1)
        await bench.engine.aclose(deny=False)
        bench.engine = CachefilesEngine(bench.device, deadline_s=60.0)
        bench.provider.open_gate.set()
        async with bench.serving():
            await bench.device.mount(SECOND)
            assert not mount.done()
            bench.engine.restore()
            await mount


async def test_a_kernel_without_restore_is_refused_with_a_hint(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(command: wire.Command) -> None:
        raise OSError(errno.EOPNOTSUPP, "unknown")

    monkeypatch.setattr(bench.device, "command", command)
    with pytest.raises(EngineUnavailable) as refused:
        bench.engine.restore()
    assert "kernel" in refused.value.hint


async def test_readers_of_an_object_that_nobody_knows_any_more_get_eio_until_somebody_does(
    bench: Bench,
) -> None:
    async with bench.serving():
        await bench.device.mount(FIRST)
        await bench.check_read(FIRST)
    bench.replace_worker()
    bench.provider.refusal = FillError("not registered", errno.ENOENT)
    async with bench.serving():
        await bench.check_refused(FIRST, 8 * BLOCK_SIZE)
        await bench.check_refused(FIRST, 8 * BLOCK_SIZE)
        assert answers(bench.device) == [SIZE, SIZE], "refused, it would be opened again for ever"
        bench.provider.refusal = None
        await bench.check_read(FIRST, 8 * BLOCK_SIZE)
    assert bench.engine.statistics.in_flight == 0


async def test_another_size_than_a_dead_worker_said_is_not_served(bench: Bench) -> None:
    async with bench.serving():
        await bench.device.mount(FIRST)
        await bench.check_read(FIRST)
    bench.replace_worker()
    bench.provider.size = SIZE + 1
    async with bench.serving():
        await bench.check_refused(FIRST, 8 * BLOCK_SIZE)
        assert answers(bench.device) == [SIZE, SIZE]
        bench.provider.size = SIZE
        await bench.check_read(FIRST, 8 * BLOCK_SIZE)


async def test_the_end_refuses_mounts_and_readers_and_leaves_nothing(bench: Bench) -> None:
    bench.provider.before_fill = hang
    async with asyncio.TaskGroup() as group:
        async with bench.serving():
            await bench.device.mount(FIRST)
            reader = group.create_task(bench.check_refused(FIRST))
            await wait_for(lambda: bool(bench.provider.fills))
            bench.provider.open_gate = asyncio.Event()
            mount = group.create_task(bench.check_mount_fails(SECOND))
            await wait_for(lambda: bench.engine.statistics.in_flight == 2)
        queued = group.create_task(bench.check_mount_fails(ObjectKey(b"third", VOLUME)))
        await wait_for(lambda: bench.device.queued_count == 1)
        while not (reader.done() and mount.done() and queued.done()):
            await bench.engine.aclose(deny=True)
            await asyncio.sleep(0)
    assert bench.engine.statistics.in_flight == 0


# -- broken kernels -----------------------------------------------------------------------------------------


async def ended(bench: Bench, *more: Coroutine[Any, Any, None]) -> None:
    """Serve while *more* happens, until the engine ends by itself, which raises."""
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for each in more:
            group.create_task(each)
        try:
            await bench.engine.serve(bench.provider)
        finally:
            bench.device.die()


async def test_a_dead_cache_ends_the_engine(bench: Bench) -> None:
    gate = bench.provider.open_gate = asyncio.Event()

    async def die() -> None:
        await wait_for(lambda: bench.engine.statistics.in_flight == 1)
        bench.device.die()
        gate.set()

    with pytest.raises(ExceptionGroup) as failed:
        await ended(bench, bench.check_mount_fails(FIRST), die())
    assert failed.group_contains(DeviceLost)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (b"what is this?", MalformedMessage),
        (wire.encode(wire.Read(wire.MsgId(9), wire.ObjectId(9), 0, 4096)), MalformedMessage),
        (OSError(errno.EMSGSIZE, ""), MalformedMessage),
        (OSError(errno.EIO, ""), DeviceLost),
    ],
    ids=["garbage", "stranger", "too long", "broken"],
)
async def test_what_is_not_understood_ends_the_engine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, message: bytes | OSError, error: type[Exception]
) -> None:
    def read() -> bytes:
        if isinstance(message, OSError):
            raise message
        return message

    monkeypatch.setattr(bench.device, "read", read)
    os.eventfd_write(bench.device.fileno(), 1)
    with pytest.raises(ExceptionGroup) as failed:
        await ended(bench)
    assert failed.group_contains(error)


async def test_a_close_of_an_unknown_object_and_a_spurious_wake_up_do_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: Iterator[bytes] = iter([wire.encode(wire.Close(wire.MsgId(3), wire.NOT_OPEN)), b""])
    read = bench.device.read
    async with bench.serving():
        monkeypatch.setattr(bench.device, "read", lambda: next(messages, None) or read())
        os.eventfd_write(bench.device.fileno(), 1)
        await wait_for(lambda: bench.engine.statistics.events == 1)
        await bench.device.mount(FIRST)
        await bench.check_read(FIRST)


# -- sinks --------------------------------------------------------------------------------------------------


async def sink_of(bench: Bench, key: ObjectKey) -> CacheFileSink:
    await bench.device.mount(key)
    return next(sink for about, sink in bench.engine._sinks.items() if about.key == key)


async def test_a_sink_shows_what_is_there(bench: Bench) -> None:
    async with bench.serving():
        sink = await sink_of(bench, FIRST)
        assert sink.data() == RangeSet()
        assert sink.file_size() == SIZE
        sink.write(2 * BLOCK_SIZE, memoryview(bytes(3 * BLOCK_SIZE)))
        sink.write(SIZE - BLOCK_SIZE, memoryview(bytes(BLOCK_SIZE)))
        written = [Range.of(2 * BLOCK_SIZE, 3 * BLOCK_SIZE), Range.of(SIZE - BLOCK_SIZE, BLOCK_SIZE)]
        assert sink.data() == RangeSet(written)
        assert sink.holds(written[0])
        assert not sink.holds(Range(BLOCK_SIZE, 3 * BLOCK_SIZE))
        assert not sink.holds(Range(SIZE, SIZE + 1))
        assert sink.holds(Range(5, 5))


@pytest.mark.parametrize(("offset", "length"), [(1, BLOCK_SIZE), (0, 512), (512, BLOCK_SIZE)])
async def test_a_sink_takes_whole_blocks_only(bench: Bench, offset: int, length: int) -> None:
    async with bench.serving():
        sink = await sink_of(bench, FIRST)
        with pytest.raises(ValueError, match="whole blocks"):
            sink.write(offset, memoryview(bytes(length)))
        assert sink.data() == RangeSet()


async def test_short_writes_go_on_at_a_block(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pattern(0, 8 * BLOCK_SIZE)
    write = bench.device.write
    lengths = iter([BLOCK_SIZE + 512, 2 * BLOCK_SIZE])

    def short(fd: int, data: memoryview, offset: int) -> int:
        return min(write(fd, data, offset), next(lengths, len(data)))

    async with bench.serving():
        sink = await sink_of(bench, FIRST)
        monkeypatch.setattr(bench.device, "write", short)
        sink.write(0, memoryview(data))
        assert bench.device.files[FIRST].content == data
        lengths = iter([512])
        with pytest.raises(OSError, match="less than a block"):
            sink.write(0, memoryview(data))


async def test_a_sink_says_why_it_takes_nothing(bench: Bench) -> None:
    page = memoryview(bytes(BLOCK_SIZE))
    async with bench.serving():
        sink = await sink_of(bench, FIRST)
        bench.device.is_full = True
        with pytest.raises(OSError) as failed:
            sink.write(0, page)
        assert failed.value.errno == errno.ENOSPC
        bench.device._objects[FIRST].file = None
        with pytest.raises(OSError) as failed:
            sink.write(0, page)
        assert failed.value.errno == errno.ESTALE
        await bench.device.unmount(FIRST)
        for use in (lambda: sink.write(0, page), sink.data, sink.file_size, lambda: sink.holds(PAGE)):
            with pytest.raises(OSError) as failed:
                use()
            assert failed.value.errno == errno.ESTALE


async def test_before_the_first_answer_anything_may_be_there(bench: Bench) -> None:
    async with bench.serving():
        bench.provider.open_gate = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(bench.device.mount(FIRST))
            await wait_for(lambda: bool(bench.engine._sinks))
            [sink] = bench.engine._sinks.values()
            assert sink.data().covers(Range(0, 1 << 60))
            assert sink.file_size() is None
            with pytest.raises(OSError) as failed:
                sink.write(0, memoryview(bytes(BLOCK_SIZE)))
            assert failed.value.errno == errno.ESTALE
            bench.provider.open_gate.set()
        assert sink.data() == RangeSet()


async def test_a_write_directly_after_the_answer_waits_for_the_file(bench: Bench) -> None:
    async with bench.serving():
        sink = await sink_of(bench, FIRST)
        about = bench.device._objects[FIRST]
        file, about.file = about.file, None
        write = asyncio.get_running_loop().run_in_executor(
            None, sink.write, 0, memoryview(pattern(0, BLOCK_SIZE))
        )
        await asyncio.sleep(0.01)
        assert not write.done()
        about.file = file
        await write
        await bench.check_read(FIRST)


async def test_a_descriptor_is_closed_when_its_last_user_has_let_go(bench: Bench) -> None:
    async with bench.serving():
        sink = await sink_of(bench, FIRST)
        with sink._use(), sink._use():
            await bench.device.unmount(FIRST)
            assert list(bench.device.openings) == [FIRST]
        assert list(bench.device.openings) == []
