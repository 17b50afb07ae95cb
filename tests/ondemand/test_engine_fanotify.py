"""What only fanotify's engine does, over a scripted device: numbers, journals, floods and odd events."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import resource
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ondemand.canary import pattern
from ondemand.engines.fanotify import BLOCK_SIZE, FanotifyEngine, FileSink, Group
from ondemand.errors import AnswerMisuse, DeviceLost, FillError, MalformedMessage
from ondemand.journal import Journal
from ondemand.provider import ObjectKey
from ondemand.ranges import Range, RangeSet
from ondemand.testing import PatternProvider, serving, wait_until
from ondemand.wire import fanotify as wire
from tests.ondemand import fanotify_rigs
from tests.ondemand.fanotify_rigs import KEYS, SEEDS, SIZE, ScriptedRig

PAGE = Range(0, BLOCK_SIZE)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[ScriptedRig]:
    async with fanotify_rigs.scripted(tmp_path) as rig:
        yield rig


@pytest.fixture
def provider() -> PatternProvider:
    return PatternProvider(SEEDS, SIZE)


async def hang(key: ObjectKey, want: Range) -> None:
    await asyncio.Event().wait()


def note(rig: ScriptedRig, number: int, offset: int, identity: tuple[int, int] | None) -> None:
    """Put an event of a dead worker into the journal."""
    [slot], [buffer] = rig.journal.claim(1)
    buffer[:] = wire.encode(wire.PreAccess(wire.EventFd(number), 1, offset, BLOCK_SIZE))
    if identity:
        rig.journal.identify(slot, identity)


def identity(rig: ScriptedRig, key: ObjectKey) -> tuple[int, int]:
    status = os.stat(rig.paths[key])
    return status.st_dev, status.st_ino


def successor(rig: ScriptedRig) -> FanotifyEngine:
    return FanotifyEngine(rig.device, Journal(rig.journal.fd), deadline_s=60.0)


def adopt_all(rig: ScriptedRig, engine: FanotifyEngine) -> None:
    rig.engine = engine
    for key, fd in rig.fds.items():
        engine.adopt(key, fd)


# -- odd events ---------------------------------------------------------------------------------------------


async def test_an_event_without_bytes_is_allowed_unfilled(
    rig: ScriptedRig, provider: PatternProvider
) -> None:
    async with serving(rig, provider):
        assert await rig.device.ask(str(rig.paths[KEYS[0]]), Range(SIZE, SIZE)) == 0
        assert await rig.device.ask(str(rig.paths[KEYS[0]]), Range(SIZE, SIZE + BLOCK_SIZE)) == 0
    assert provider.fills == []


async def test_a_range_past_the_end_is_filled_up_to_the_end(
    rig: ScriptedRig, provider: PatternProvider
) -> None:
    async with serving(rig, provider):
        assert (
            await rig.device.ask(str(rig.paths[KEYS[0]]), Range(SIZE - BLOCK_SIZE, SIZE + 9 * BLOCK_SIZE))
            == 0
        )
    assert provider.fills == [(KEYS[0], Range(SIZE - BLOCK_SIZE, SIZE))]


async def test_an_event_of_an_unguarded_file_is_denied(
    rig: ScriptedRig, provider: PatternProvider, tmp_path: Path
) -> None:
    stranger = tmp_path / "stranger"
    stranger.write_bytes(bytes(BLOCK_SIZE))
    fd = os.open(stranger, os.O_RDONLY)
    rig.device.mark(fd)
    os.close(fd)
    async with serving(rig, provider):
        assert await rig.device.ask(str(stranger), PAGE) == errno.EIO
        assert await rig.device.ask(str(stranger), Range(0, 0)) == 0


async def test_an_overflow_is_counted_and_service_goes_on(
    rig: ScriptedRig, provider: PatternProvider
) -> None:
    rig.device.overflow()
    async with serving(rig, provider):
        assert await rig.read(KEYS[0], 0, 8) == pattern(0, 8)
        rig.device.overflow()
        await wait_until(lambda: rig.engine.statistics.overflows == 2)
    assert list(rig.journal.entries()) == []


@pytest.mark.parametrize(
    ("fails_with", "reader_sees"), [(errno.ENOSPC, errno.ENOSPC), (errno.ENODATA, errno.EIO)]
)
async def test_a_denial_carries_an_errno_that_the_kernel_takes(
    rig: ScriptedRig, provider: PatternProvider, fails_with: int, reader_sees: int
) -> None:
    async def fail(key: ObjectKey, want: Range) -> None:
        raise FillError("refused", fails_with)

    provider.before_fill = fail
    async with serving(rig, provider):
        assert await rig.device.ask(str(rig.paths[KEYS[0]]), PAGE) == reader_sees


async def test_a_provider_that_crashes_in_present_denies(rig: ScriptedRig, provider: PatternProvider) -> None:
    def present(key: ObjectKey, want: Range) -> bool:
        raise RuntimeError("crashed")

    provider.present = present  # type: ignore[method-assign]
    async with serving(rig, provider):
        assert await rig.device.ask(str(rig.paths[KEYS[0]]), PAGE) == errno.EIO


async def test_a_killed_readers_event_is_answered_all_the_same(
    rig: ScriptedRig, provider: PatternProvider
) -> None:
    gate = asyncio.Event()

    async def wait(key: ObjectKey, want: Range) -> None:
        await gate.wait()

    provider.before_fill = wait
    async with serving(rig, provider), asyncio.TaskGroup() as group:
        reader = group.create_task(rig.read(KEYS[0], 0, 8))
        await wait_until(lambda: bool(provider.fills))
        reader.cancel()
        gate.set()
        await wait_until(lambda: rig.engine.statistics.in_flight == 0)
    assert len(rig.device.answers) == 1


# -- numbers ------------------------------------------------------------------------------------------------


def free_number(at_least: int) -> int:
    """A descriptor number that nothing has."""
    number = fcntl.fcntl(0, fcntl.F_DUPFD, at_least)
    os.close(number)
    return number


async def test_stale_numbers_are_taken_until_they_are_answered(
    rig: ScriptedRig, provider: PatternProvider
) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = free_number(soft - 10)  # where no other descriptor is made meanwhile
    note(rig, number, 0, identity(rig, KEYS[0]))
    engine = successor(rig)
    engine.recover()
    os.fstat(number)
    adopt_all(rig, engine)
    async with serving(rig, provider):
        assert await rig.read(KEYS[1], 0, 8) == pattern(0, 8, SEEDS[KEYS[1]])
        await wait_until(lambda: engine.statistics.in_flight == 0)
    assert provider.fills[0] == (KEYS[0], PAGE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


async def test_descriptors_that_sit_on_a_stale_number_are_moved(rig: ScriptedRig) -> None:
    taken, other = os.dup(rig.fds[KEYS[0]]), os.dup(rig.fds[KEYS[0]])
    note(rig, taken, 0, identity(rig, KEYS[0]))
    engine = successor(rig)
    held = engine.recover({"taken": taken, "other": other})
    assert held["other"] == other
    assert held["taken"] != taken
    assert os.path.samestat(os.fstat(held["taken"]), os.stat(rig.paths[KEYS[0]]))
    assert not os.get_inheritable(held["taken"])
    assert not os.path.samestat(os.fstat(taken), os.stat(rig.paths[KEYS[0]]))
    for fd in (*held.values(), taken):
        os.close(fd)


async def test_a_number_beyond_the_limit_needs_no_descriptor(rig: ScriptedRig) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    note(rig, soft + 5, 0, identity(rig, KEYS[0]))
    engine = successor(rig)
    engine.recover()
    assert engine.statistics.stale == 1


async def test_two_events_of_one_number_wait_for_each_other(
    tmp_path: Path, provider: PatternProvider
) -> None:
    """A number that this process closed too early: a new event gets it while the stale one is owed."""
    async with fanotify_rigs.scripted(tmp_path) as rig:
        async with asyncio.TaskGroup() as group:
            provider.before_fill = hang
            async with serving(rig, provider):
                old = group.create_task(rig.read(KEYS[0], 0, 8))
                await wait_until(lambda: len(provider.fills) == 1)
            rig.replace_worker()
            [number] = rig.engine._occupied
            os.close(number)
            rig.engine._occupied.clear()

            gate = asyncio.Event()

            async def wait(key: ObjectKey, want: Range) -> None:
                if key == KEYS[0]:
                    await gate.wait()

            provider.before_fill = wait
            async with serving(rig, provider):
                new = group.create_task(rig.read(KEYS[1], 0, 8))
                await wait_until(lambda: provider.present(KEYS[1], PAGE))
                assert not rig.device.answers, "the answer would have released the stale reader, unfilled"
                gate.set()
                assert await old == pattern(0, 8, SEEDS[KEYS[0]])
                assert await new == pattern(0, 8, SEEDS[KEYS[1]])
        assert [answer.fd for answer in rig.device.answers] == [number, number]


async def test_an_event_of_an_unknown_file_is_filled_in_every_file(
    rig: ScriptedRig, provider: PatternProvider
) -> None:
    note(rig, 500, 3 * BLOCK_SIZE, None)
    rig.replace_worker()
    async with serving(rig, provider):
        await wait_until(lambda: rig.engine.statistics.in_flight == 0)
    wanted = Range.of(3 * BLOCK_SIZE, BLOCK_SIZE)
    assert sorted(map(str, provider.fills)) == sorted(str((key, wanted)) for key in KEYS)


@pytest.mark.parametrize("fails", KEYS)
async def test_an_event_of_an_unknown_file_is_denied_if_one_cannot_be_filled(
    rig: ScriptedRig, provider: PatternProvider, fails: ObjectKey
) -> None:
    async def fail(key: ObjectKey, want: Range) -> None:
        if key == fails:
            raise OSError(errno.ENOSPC, "full")

    provider.before_fill = fail
    note(rig, 500, 0, None)
    rig.replace_worker()
    async with serving(rig, provider):
        await wait_until(lambda: rig.engine.statistics.in_flight == 0)
    assert rig.engine.statistics.errors == 1


async def test_an_event_that_was_answered_but_not_cleared_is_harmless(
    rig: ScriptedRig, provider: PatternProvider
) -> None:
    note(rig, 500, 0, identity(rig, KEYS[0]))
    note(rig, 500, 0, identity(rig, KEYS[1]))
    rig.replace_worker()
    async with serving(rig, provider):
        assert await rig.read(KEYS[0], 0, 8) == pattern(0, 8)
        await wait_until(lambda: rig.engine.statistics.in_flight == 0)
    assert list(Journal(rig.journal.fd).entries()) == []


async def test_a_journalled_event_that_nobody_understands_is_denied_once(rig: ScriptedRig) -> None:
    [_], [buffer] = rig.journal.claim(1)
    buffer[:] = bytes([48, 0, 0, 0, 4, *bytes(43)])
    rig.replace_worker()
    assert rig.engine.statistics.stale == 0
    assert list(Journal(rig.journal.fd).entries()) == []


# -- guarding -----------------------------------------------------------------------------------------------


async def test_unguarding_lets_the_outstanding_be_answered(
    rig: ScriptedRig, provider: PatternProvider
) -> None:
    gate = asyncio.Event()

    async def wait(key: ObjectKey, want: Range) -> None:
        await gate.wait()

    provider.before_fill = wait
    async with serving(rig, provider), asyncio.TaskGroup() as group:
        reader = group.create_task(rig.read(KEYS[0], 0, 8))
        await wait_until(lambda: bool(provider.fills))
        queued = group.create_task(rig.read(KEYS[0], BLOCK_SIZE, 8))
        await asyncio.sleep(0)  # asked, and not yet read
        os.pwrite(rig.fds[KEYS[0]], pattern(0, SIZE), 0)
        rig.engine.unguard(KEYS[0])
        gate.set()
        assert await reader == pattern(0, 8)
        assert await queued == pattern(BLOCK_SIZE, 8)
        answers = len(rig.device.answers)
        assert await rig.read(KEYS[0], 2 * BLOCK_SIZE, 8) == pattern(2 * BLOCK_SIZE, 8)
        assert len(rig.device.answers) == answers, "nobody is asked any more"


async def test_guarding_twice_gives_the_same_sink(rig: ScriptedRig) -> None:
    sink = rig.engine.guard(KEYS[0], rig.fds[KEYS[0]])
    assert rig.engine.guard(KEYS[0], rig.fds[KEYS[0]]) is sink
    with pytest.raises(ValueError, match="contradicts"):
        rig.engine.guard(KEYS[0], rig.fds[KEYS[1]])


async def test_a_sink_writes_whole_blocks_and_shows_them(rig: ScriptedRig) -> None:
    sink = rig.engine.guard(KEYS[0], rig.fds[KEYS[0]])
    assert sink.block_size == BLOCK_SIZE
    sink.write(2 * BLOCK_SIZE, memoryview(pattern(2 * BLOCK_SIZE, BLOCK_SIZE)))
    assert sink.data() == RangeSet([Range.of(2 * BLOCK_SIZE, BLOCK_SIZE)])
    assert os.pread(rig.fds[KEYS[0]], BLOCK_SIZE, 2 * BLOCK_SIZE) == pattern(2 * BLOCK_SIZE, BLOCK_SIZE)
    for offset, length in [(1, BLOCK_SIZE), (0, 1)]:
        with pytest.raises(ValueError, match="whole blocks"):
            sink.write(offset, memoryview(bytes(length)))


def test_a_sink_outlives_the_descriptor_it_was_made_of(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    sink = FileSink(fd)
    os.close(fd)
    reused = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    sink.write(0, memoryview(bytes(BLOCK_SIZE)))
    assert os.stat(tmp_path / "file").st_size == BLOCK_SIZE
    assert os.fstat(reused).st_size == 0
    os.close(reused)
    number = sink.fileno()
    del sink
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


# -- floods and lost devices --------------------------------------------------------------------------------


async def test_a_full_journal_lets_events_queue_and_then_goes_on(
    tmp_path: Path, provider: PatternProvider
) -> None:
    with ExitStack() as stack:
        rig = ScriptedRig(stack, tmp_path, 60.0)
        rig.journal = fanotify_rigs.new_journal(stack, 4)
        rig.engine = FanotifyEngine(rig.device, rig.journal, deadline_s=60.0)
        adopt_all(rig, rig.engine)
        gate = asyncio.Event()

        async def wait(key: ObjectKey, want: Range) -> None:
            await gate.wait()

        provider.before_fill = wait
        async with serving(rig, provider), asyncio.TaskGroup() as group:
            readers = [group.create_task(rig.read(KEYS[0], n * BLOCK_SIZE, 8)) for n in range(20)]
            await wait_until(lambda: len(provider.fills) == 4)
            assert rig.engine.statistics.in_flight == 4
            assert rig.device.queued_count == 16
            gate.set()
            for n, reader in enumerate(readers):
                assert await reader == pattern(n * BLOCK_SIZE, 8)
        assert rig.journal.free_count == 4


async def test_where_no_descriptor_is_left_one_reader_is_denied(
    rig: ScriptedRig, provider: PatternProvider
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    path = str(rig.paths[KEYS[0]])
    async with serving(rig, provider), asyncio.TaskGroup() as group:
        asked = group.create_task(rig.device.ask(path, PAGE))
        await asyncio.sleep(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            await asked
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert asked.result() == errno.EPERM
        assert await rig.device.ask(path, PAGE) == 0
    assert rig.engine.statistics.errors == 1


class Broken(Group):
    """A device whose next read or answer goes wrong."""

    def __init__(self, record: bytes | OSError, refusal: OSError | None = None) -> None:
        super().__init__(os.eventfd(1))
        self.record = record
        self.refusal = refusal

    def read(self, slots: list[memoryview]) -> int:
        if isinstance(self.record, OSError):
            raise self.record
        slots[0][: len(self.record)] = self.record
        return len(self.record)

    def answer(self, response: bytes) -> None:
        if self.refusal:
            raise self.refusal

    def mark(self, fd: int) -> None:
        return None


@pytest.mark.parametrize(
    ("record", "raised"),
    [
        (OSError(errno.EBADF, "closed"), DeviceLost),
        (OSError(errno.EINVAL, "too small"), MalformedMessage),
        (bytes(24), MalformedMessage),
        (b"", DeviceLost),
    ],
)
async def test_a_device_that_makes_no_sense_ends_the_service(
    provider: PatternProvider, record: bytes | OSError, raised: type[Exception]
) -> None:
    with ExitStack() as stack:
        device = Broken(record)
        stack.callback(os.close, device.fileno())
        engine = FanotifyEngine(device, fanotify_rigs.new_journal(stack), deadline_s=1.0)
        with pytest.raises(raised):
            await engine.serve(provider)


@pytest.mark.parametrize(
    ("refusal", "raised"),
    [(FileNotFoundError(errno.ENOENT, "nobody"), AnswerMisuse), (OSError(errno.EBADF, "closed"), DeviceLost)],
)
@pytest.mark.parametrize("hit", [True, False])
async def test_an_answer_that_goes_nowhere_ends_the_service(
    provider: PatternProvider, tmp_path: Path, refusal: OSError, raised: type[Exception], hit: bool
) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(fd, SIZE)
    with ExitStack() as stack:
        stack.callback(os.close, fd)
        event_fd = os.dup(fd)
        device = Broken(wire.encode(wire.PreAccess(wire.EventFd(event_fd), 1, 0, BLOCK_SIZE)), refusal)
        stack.callback(os.close, device.fileno())
        engine = FanotifyEngine(device, fanotify_rigs.new_journal(stack), deadline_s=1.0)
        engine.guard(KEYS[0], fd)
        if hit:
            await provider.fill(KEYS[0], PAGE, FileSink(fd))
        with pytest.raises(raised):
            await engine.serve(provider)
        os.close(event_fd)
