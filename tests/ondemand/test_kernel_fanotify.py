"""Claims about the kernel, proved on it: fanotify behind an EROFS mount."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import uvloop

from ondemand.canary import pattern
from ondemand.engines.fanotify import BLOCK_SIZE, FanotifyEngine, FileSink, open_group
from ondemand.errors import EngineUnavailable, FillError
from ondemand.provider import ObjectKey
from ondemand.ranges import Range
from ondemand.testing import PatternProvider, check_engine, serving, wait_until
from tests.conftest import ROOT
from tests.ondemand import fanotify_rigs
from tests.ondemand.fanotify_rigs import KEYS, SEEDS, SIZE, KernelRig, new_journal

pytestmark = pytest.mark.kernel


@pytest.fixture
async def rig(fanotify_directory: Path) -> AsyncIterator[KernelRig]:
    async with fanotify_rigs.kernel(fanotify_directory) as rig:
        yield rig


@pytest.fixture
def provider() -> PatternProvider:
    return PatternProvider(SEEDS, SIZE)


def test_the_suite_passes_on_uvloop_too(fanotify_directory: Path) -> None:
    uvloop.run(check_engine(partial(fanotify_rigs.kernel, fanotify_directory)))


async def test_a_complete_file_that_is_unguarded_asks_nobody(
    rig: KernelRig, provider: PatternProvider
) -> None:
    sink = FileSink(rig.fds[KEYS[0]])
    await provider.fill(KEYS[0], Range(0, SIZE), sink)
    async with serving(rig, provider):
        assert await rig.read(KEYS[0], 0, SIZE) == pattern(0, SIZE)
        assert rig.engine.statistics.hits > 0
        rig.engine.unguard(KEYS[0])
        before = rig.engine.statistics.events
        await rig.forget(KEYS[0])
        assert await rig.read(KEYS[0], 0, SIZE) == pattern(0, SIZE)
        assert rig.engine.statistics.events == before
        assert await rig.read(KEYS[1], 0, 8) == pattern(0, 8, SEEDS[KEYS[1]])
        assert rig.engine.statistics.events > before


async def test_complete_data_is_read_while_nobody_serves(rig: KernelRig, provider: PatternProvider) -> None:
    await provider.fill(KEYS[0], Range(0, SIZE), FileSink(rig.fds[KEYS[0]]))
    rig.engine.unguard(KEYS[0])
    assert await rig.read(KEYS[0], 0, SIZE) == pattern(0, SIZE)


async def test_a_denied_readahead_is_asked_for_again_page_by_page(
    rig: KernelRig, provider: PatternProvider
) -> None:
    refused = []

    async def refuse_more_than_a_page(key: ObjectKey, want: Range) -> None:
        if len(want) > BLOCK_SIZE:
            refused.append(want)
            raise FillError("not so much at once")

    provider.before_fill = refuse_more_than_a_page
    async with serving(rig, provider):
        assert await rig.read(KEYS[0], 0, 16 * BLOCK_SIZE) == pattern(0, 16 * BLOCK_SIZE)
    assert refused


async def test_what_is_filled_goes_past_what_is_asked(rig: KernelRig, provider: PatternProvider) -> None:
    """More than was wanted is welcome: later reads of it are hits."""

    async def fill_all(key: ObjectKey, want: Range) -> None:
        sink = rig.engine.guard(key, rig.fds[key])
        sink.write(0, memoryview(pattern(0, SIZE, SEEDS[key])))
        provider.filled[key].add(Range(0, SIZE))

    provider.before_fill = fill_all
    async with serving(rig, provider):
        assert await rig.read(KEYS[0], 0, 8) == pattern(0, 8)
        fills = len(provider.fills)
        assert await rig.read(KEYS[0], SIZE // 2, 8) == pattern(SIZE // 2, 8)
        assert len(provider.fills) == fills


async def test_a_dead_workers_number_is_not_given_to_a_new_event(
    rig: KernelRig, provider: PatternProvider
) -> None:
    """Without occupation the second reader would get the first one's number, and the first one zeros."""

    async def hang(key: ObjectKey, want: Range) -> None:
        await asyncio.Event().wait()

    provider.before_fill = hang
    async with asyncio.TaskGroup() as group:
        async with serving(rig, provider):
            old = group.create_task(rig.read(KEYS[0], 0, 8))
            await wait_until(lambda: bool(provider.fills))
            [number] = [request.fd for request in rig.engine._protocol.owed()]
        rig.replace_worker()
        assert rig.engine._occupied == {number}
        gate = asyncio.Event()

        async def wait(key: ObjectKey, want: Range) -> None:
            if key == KEYS[0]:
                await gate.wait()

        provider.before_fill = wait
        async with serving(rig, provider):
            assert await rig.read(KEYS[1], 0, 8) == pattern(0, 8, SEEDS[KEYS[1]])
            assert not old.done()
            gate.set()
            assert await old == pattern(0, 8)
    assert rig.engine._occupied == set()


async def test_colliding_numbers_release_nobody_unfilled(rig: KernelRig, provider: PatternProvider) -> None:
    """The number of a stale event is free by mistake, and a new event gets it."""

    async def hang(key: ObjectKey, want: Range) -> None:
        await asyncio.Event().wait()

    provider.before_fill = hang
    async with asyncio.TaskGroup() as group:
        async with serving(rig, provider):
            old = group.create_task(rig.read(KEYS[0], 0, 8))
            await wait_until(lambda: bool(provider.fills))
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
            await wait_until(lambda: provider.present(KEYS[1], Range(0, BLOCK_SIZE)))
            assert {request.fd for request in rig.engine._protocol.owed()} == {number}
            assert not new.done()
            gate.set()
            assert await old == pattern(0, 8)
            assert await new == pattern(0, 8, SEEDS[KEYS[1]])


async def test_an_event_without_identity_is_filled_everywhere(
    rig: KernelRig, provider: PatternProvider
) -> None:
    """The worker died between the kernel's note and its own."""

    async def hang(key: ObjectKey, want: Range) -> None:
        await asyncio.Event().wait()

    provider.before_fill = hang
    async with asyncio.TaskGroup() as group:
        async with serving(rig, provider):
            reader = group.create_task(rig.read(KEYS[0], 0, 8))
            await wait_until(lambda: bool(provider.fills))
        for entry in rig.journal.entries():
            rig.journal.identify(entry.slot, (0, 0))
        rig.replace_worker()
        provider.before_fill = PatternProvider(SEEDS, SIZE).before_fill
        provider.fills.clear()
        async with serving(rig, provider):
            assert await reader == pattern(0, 8)
    assert {key for key, _ in provider.fills} == set(KEYS)


async def test_the_reader_of_a_file_that_nobody_guards_gets_eio_not_zeros(
    rig: KernelRig, provider: PatternProvider
) -> None:
    rig.engine = FanotifyEngine(rig.group_fd, rig.journal, deadline_s=60.0)  # it adopted nothing
    async with serving(rig, provider):
        with pytest.raises(OSError, match="Input/output") as refused:
            await rig.read(KEYS[0], 0, 8)
    assert refused.value.errno == errno.EIO


def test_a_file_system_that_takes_no_part_is_refused(fanotify_directory: Path) -> None:
    group_fd = open_group()
    fd = os.memfd_create("tmpfs")
    os.truncate(fd, SIZE)
    try:
        from contextlib import ExitStack

        with ExitStack() as stack:
            engine = FanotifyEngine(group_fd, new_journal(stack), deadline_s=1.0)
            with pytest.raises(EngineUnavailable, match="fanotify_mark"):
                engine.guard(KEYS[0], fd)
            with pytest.raises(KeyError):
                engine.unguard(KEYS[0])
    finally:
        os.close(group_fd)
        os.close(fd)


def test_workers_may_be_killed_at_any_moment(fanotify_directory: Path) -> None:
    """Eight readers of a hundred kinds of holes see right bytes, and no error."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ondemand.kill_rig", fanotify_directory, "4"],
        capture_output=True,
        cwd=ROOT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["wrong"], result["errors"]) == (0, 0), done.stderr
    assert result["kills"] >= 10, done.stderr
    assert result["stale"] > 0
