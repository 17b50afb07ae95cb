"""What every backend does, whatever is behind it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from erofsd.backends.measured import MeasuredBackend, streaming
from erofsd.errors import BlobCorrupt, BlobNotFound
from ondemand.ranges import Range

from .conftest import BLOB_ID, BODY, EMPTY_ID, MISSING_ID, Make


@pytest.fixture
async def backend(make: Make) -> AsyncIterator[MeasuredBackend]:
    made = make()
    yield made
    await made.aclose()


async def read(backend: MeasuredBackend, want: Range, blob_id: str = BLOB_ID) -> bytes:
    async with streaming(backend, blob_id, want) as pieces:
        return b"".join([piece async for piece in pieces])


async def test_size_is_that_of_the_blob(backend: MeasuredBackend) -> None:
    assert await backend.size(BLOB_ID) == len(BODY)
    assert await backend.size(EMPTY_ID) == 0


async def test_whole_blob_arrives(backend: MeasuredBackend) -> None:
    assert await read(backend, Range(0, len(BODY))) == BODY


async def test_any_range_arrives_exactly(backend: MeasuredBackend) -> None:
    random_ = random.Random(1)
    ends = [sorted(random_.sample(range(len(BODY) + 1), 2)) for _ in range(10)]
    for start, stop in [*ends, [0, 1], [len(BODY) - 1, len(BODY)], [4095, 4097]]:
        assert await read(backend, Range(start, stop)) == BODY[start:stop]


async def test_empty_range_is_empty(backend: MeasuredBackend) -> None:
    assert await read(backend, Range(5, 5)) == b""
    assert await read(backend, Range(0, 0), EMPTY_ID) == b""


async def test_range_past_the_end_is_refused_as_corrupt(backend: MeasuredBackend) -> None:
    for want in (Range(len(BODY) - 10, len(BODY) + 1), Range(len(BODY) + 10, len(BODY) + 20)):
        with pytest.raises(BlobCorrupt):
            await read(backend, want)


async def test_blob_that_is_not_there_is_not_found(backend: MeasuredBackend) -> None:
    with pytest.raises(BlobNotFound, match=MISSING_ID):
        await read(backend, Range(0, 10), MISSING_ID)
    with pytest.raises(BlobNotFound, match=MISSING_ID):
        await backend.size(MISSING_ID)


@pytest.mark.parametrize("blob_id", ["../index.json", "..", "a/b", "%2e%2e", "a b", ""])
async def test_strange_blob_ids_reach_nothing(backend: MeasuredBackend, blob_id: str) -> None:
    with pytest.raises(BlobNotFound):
        await read(backend, Range(0, 1), blob_id)


async def test_many_readers_at_once_get_their_own_bytes(backend: MeasuredBackend) -> None:
    wants = [Range.of(n * 60_000, 60_000) for n in range(40)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(read(backend, want)) for want in wants]
    assert [task.result() for task in tasks] == [BODY[want.start : want.stop] for want in wants]


async def test_giving_up_early_leaves_the_backend_usable(backend: MeasuredBackend) -> None:
    for _ in range(20):
        async with streaming(backend, BLOB_ID, Range(0, len(BODY))) as pieces:
            async for piece in pieces:
                assert BODY.startswith(piece)
                break
    assert await read(backend, Range(100, 200)) == BODY[100:200]


async def test_cancelled_reader_leaves_the_backend_usable(backend: MeasuredBackend) -> None:
    for delay_s in (0, 0.001, 0.003):
        task = asyncio.get_running_loop().create_task(read(backend, Range(0, len(BODY))))
        await asyncio.sleep(delay_s)
        task.cancel()
        try:
            assert await task == BODY
        except asyncio.CancelledError:
            pass  # the usual case; a fast backend may have been done
    assert await read(backend, Range(100, 200)) == BODY[100:200]


async def test_what_it_cost_is_counted(backend: MeasuredBackend) -> None:
    assert (backend.requests, backend.transferred_bytes) == (0, 0)
    await read(backend, Range(0, 5000))
    first = backend.requests
    await read(backend, Range(5000, 10_000))
    assert backend.transferred_bytes >= 10_000
    assert backend.requests == first + 1


async def test_name_says_what_it_is_without_secrets(backend: MeasuredBackend) -> None:
    assert backend.name
    assert "?" not in backend.name


async def test_bytes_before_a_missing_close_do_not_leak_connections(make: Make) -> None:
    backend = make()
    stream = backend.stream(BLOB_ID, Range(0, len(BODY)))
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    await backend.aclose()
