"""Retries, health, and the wrappers that break and slow things down."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from erofsd.backends.faulty import Fault, FaultyBackend, Plan
from erofsd.backends.localfs import LocalBackend
from erofsd.backends.measured import MeasuredBackend, streaming
from erofsd.backends.retry import RetryBackend
from erofsd.backends.slow import SlowBackend
from erofsd.errors import BackendDenied, BackendTemporary, BlobNotFound, ErofsdError
from ondemand.ranges import Range

from .conftest import BLOB_ID, BODY

WHOLE = Range(0, len(BODY))


@pytest.fixture
def faulty(layout: Path) -> FaultyBackend:
    return FaultyBackend(LocalBackend([layout]))


async def read(backend: MeasuredBackend, want: Range = WHOLE) -> bytes:
    async with streaming(backend, BLOB_ID, want) as pieces:
        return b"".join([piece async for piece in pieces])


TEMPORARY = [Fault.TRUNCATE, Fault.RESET, Fault.HTML, Fault.BROKEN, Fault.BUSY]


@pytest.mark.parametrize("fault", TEMPORARY)
@pytest.mark.parametrize("after", [0, 1_500_000])
async def test_temporary_fault_is_overcome_at_the_byte_that_arrived_last(
    faulty: FaultyBackend, fault: Fault, after: int
) -> None:
    faulty.fail(fault, after=after, times=2)
    retry = RetryBackend(faulty, 3, backoff_s=0.001)
    assert await read(retry) == BODY
    assert retry.transferred_bytes < 2 * len(BODY)
    assert retry.health.consecutive_failures == 0
    assert retry.health.failures == faulty.struck >= 1
    assert "injected" in retry.health.last_error


async def test_attempts_are_bounded(faulty: FaultyBackend) -> None:
    faulty.fail(Fault.BROKEN, times=None)
    retry = RetryBackend(faulty, 4, backoff_s=0.001)
    with pytest.raises(BackendTemporary):
        await read(retry)
    assert faulty.struck == 4
    with pytest.raises(BackendTemporary):
        await retry.size(BLOB_ID)
    assert faulty.struck == 8
    assert retry.health.consecutive_failures == 8


async def test_progress_starts_the_count_afresh(faulty: FaultyBackend) -> None:
    faulty.fail(Fault.RESET, after=200_000, times=None)
    assert await read(RetryBackend(faulty, 2, backoff_s=0.001)) == BODY
    assert faulty.struck > 10


async def test_a_trickle_is_no_progress(faulty: FaultyBackend) -> None:
    faulty.fail(Fault.RESET, after=10, times=None)
    with pytest.raises(BackendTemporary):
        await read(RetryBackend(faulty, 3, backoff_s=0.001))
    assert faulty.struck == 3


@pytest.mark.parametrize(("fault", "error"), [(Fault.DENIED, BackendDenied), (Fault.MISSING, BlobNotFound)])
async def test_final_errors_are_not_retried(
    faulty: FaultyBackend, fault: Fault, error: type[ErofsdError]
) -> None:
    faulty.fail(fault, times=None)
    retry = RetryBackend(faulty, 5, backoff_s=0.001)
    with pytest.raises(error):
        await read(retry)
    assert faulty.struck == 1
    assert retry.health.consecutive_failures == 1


async def test_source_is_given_the_time_it_asks_for(faulty: FaultyBackend) -> None:
    retry = RetryBackend(faulty, 2, backoff_s=0.0)
    calls: list[float] = []

    async def request() -> str:
        calls.append(time.monotonic())
        if len(calls) == 1:
            raise BackendTemporary("later", retry_after_s=0.15)
        return "done"

    assert await retry.call(request) == "done"
    assert calls[1] - calls[0] >= 0.15


async def test_cancellation_ends_the_waiting_between_tries(faulty: FaultyBackend) -> None:
    faulty.fail(Fault.BROKEN, times=None)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await read(RetryBackend(faulty, 100, backoff_s=10))


async def test_hang_lasts_until_the_caller_gives_up(faulty: FaultyBackend) -> None:
    faulty.fail(Fault.HANG, after=100)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await read(faulty)
    assert await read(faulty) == BODY


async def test_flipped_bit_is_nobodys_business_here(faulty: FaultyBackend) -> None:
    faulty.fail(Fault.FLIP, after=2_000_000)
    found = await read(RetryBackend(faulty, 3))
    assert [n for n in range(len(BODY)) if found[n] != BODY[n]] == [2_000_000]


async def test_faults_may_be_aimed_and_healed(faulty: FaultyBackend) -> None:
    faulty.plans.append(Plan(Fault.MISSING, times=None, applies=lambda _, want: want.start >= 4096))
    assert await read(faulty, Range(0, 10)) == BODY[:10]
    with pytest.raises(BlobNotFound):
        await read(faulty, Range(4096, 4097))
    faulty.heal()
    assert await read(faulty, Range(4096, 4097)) == BODY[4096:4097]


async def test_slow_source_takes_its_time(layout: Path) -> None:
    slow = SlowBackend(LocalBackend([layout]), latency_s=0.05, bytes_per_s=30e6)
    began = time.monotonic()
    assert await read(slow) == BODY
    assert time.monotonic() - began >= 0.05 + len(BODY) / 30e6


async def test_bandwidth_is_shared(layout: Path) -> None:
    slow = SlowBackend(LocalBackend([layout]), bytes_per_s=60e6)
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(read(slow))
    assert time.monotonic() - began >= 3 * len(BODY) / 60e6
