"""Reads against a real store and real compressed data."""

from __future__ import annotations

import asyncio
import os
import random

import pytest
import structlog

from erofsd.blobs.store import FileSink
from erofsd.errors import BackendTemporary, BlobCorrupt
from erofsd.fill import flight
from ondemand.errors import FillError
from ondemand.ranges import Range
from tests.fill.images import MemorySource, Rig, build, content, key_of, restate, simple


@pytest.mark.parametrize("codec", ["zstd", "lz4_block", "none"])
@pytest.mark.parametrize("size", [4096, 10_000, 256 << 10])
@pytest.mark.parametrize("batch", [1, 4])
async def test_random_readers_get_right_bytes_and_every_unit_is_fetched_once(
    rig: Rig, codec: str, size: int, batch: int
) -> None:
    built = simple(40, size, codec=codec, batch=batch, header=512)
    source = MemorySource()
    source.piece = 10_000
    binding = rig.bind(built, source)

    async def reader(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            offset = rng.randrange(len(built.decoded))
            length = min(rng.randrange(1, 200_000), len(built.decoded) - offset)
            assert await rig.read(binding, offset, length) == built.decoded[offset : offset + length]

    async with asyncio.TaskGroup() as group:
        for seed in range(8):
            group.create_task(reader(seed))
    assert source.open_streams == 0 or binding.missing_count
    seen: set[int] = set()
    for want in source.requests:
        units = [
            unit
            for unit, offset in enumerate(built.layout.unit_offset)
            if want.covers(Range.of(offset, built.layout.unit_stored[unit]))
        ]
        assert len(want) <= sum(built.layout.unit_stored[u] for u in units) + (64 << 10) * len(units)
        seen.update(units)
    assert source.asked_bytes <= 1.3 * len(built.stored) + (64 << 10)


async def test_a_single_read_moves_one_large_chunk_only(rig: Rig) -> None:
    built = simple(8, 1 << 20)
    source = MemorySource()
    binding = rig.bind(built, source)
    await rig.read(binding, 3 << 20, 4096)
    assert source.requests == [Range.of(built.layout.unit_offset[3], built.layout.unit_stored[3])]
    assert list(binding.missing()) == [0, 1, 2, 4, 5, 6, 7]


async def test_a_single_read_of_small_chunks_brings_a_few_neighbours(rig: Rig) -> None:
    built = simple(2000, 4096)
    source = MemorySource()
    binding = rig.bind(built, source)
    await rig.read(binding, 400_000, 10)
    assert 64 << 10 <= source.asked_bytes <= 512 << 10


async def test_readers_of_one_chunk_share_one_fetch(rig: Rig) -> None:
    built = simple(4, 256 << 10)
    source = MemorySource()
    source.gate.clear()
    binding = rig.bind(built, source)
    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(rig.read(binding, 4096 * i, 4096)) for i in range(16)]
        await until(lambda: bool(source.requests))
        source.gate.set()
    for i, reader in enumerate(readers):
        assert reader.result() == built.decoded[4096 * i : 4096 * i + 4096]
    assert len(source.requests) == 1
    assert rig.provider.statistics("image").waits == 16


async def test_the_first_chunk_is_served_before_the_request_ends(rig: Rig) -> None:
    built = simple(64, 4096, codec="none")
    source = MemorySource()
    source.piece = 4096
    binding = rig.bind(built, source)
    pieces = 0

    def count(want: Range) -> Exception | None:
        nonlocal pieces
        pieces += 1
        if pieces == 3:
            source.gate.clear()
        return None

    source.fail = count
    assert await rig.read(binding, 0, 4096) == built.decoded[:4096]
    assert source.open_streams == 1
    source.gate.set()


async def test_a_cancelled_reader_cancels_its_own_wait_only(rig: Rig) -> None:
    built = simple(4, 256 << 10)
    source = MemorySource()
    source.gate.clear()
    binding = rig.bind(built, source)
    async with asyncio.TaskGroup() as group:
        impatient = group.create_task(rig.read(binding, 0, 4096))
        patient = group.create_task(rig.read(binding, 4096, 4096))
        await until(lambda: bool(source.requests))
        impatient.cancel()
        await until(impatient.done)
        source.gate.set()
    assert patient.result() == built.decoded[4096:8192]
    assert len(source.requests) == 1


async def test_a_hanging_source_is_left_when_the_last_reader_gives_up(rig: Rig) -> None:
    built = simple(4, 256 << 10)
    source = MemorySource()
    source.gate.clear()
    binding = rig.bind(built, source)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await rig.read(binding, 0, 4096)
    await until(lambda: source.open_streams == 0)
    source.gate.set()
    assert await rig.read(binding, 0, 4096) == built.decoded[:4096]
    assert rig.provider.statistics("image").errors == 1


async def test_a_hang_during_prefetch_does_not_hang_the_next_reader(rig: Rig) -> None:
    built = simple(4, 256 << 10)
    source = MemorySource()
    source.gate.clear()
    binding = rig.bind(built, source)
    async with asyncio.TaskGroup() as group:
        prefetch = group.create_task(rig.provider.prefetch(binding))
        await until(lambda: bool(source.requests))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await rig.read(binding, 0, 4096)
        await until(lambda: len(source.requests) == 2)  # the prefetch looks again
        source.gate.set()
        assert await rig.read(binding, 0, 4096) == built.decoded[:4096]
        await prefetch
    assert binding.missing_count == 0


async def test_a_flight_that_nobody_joins_any_more_because_it_is_stuck_is_replaced(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "LONG_S", 0.02)
    built = simple(4, 256 << 10)
    source = MemorySource()
    source.gate.clear()
    binding = rig.bind(built, source)
    async with asyncio.TaskGroup() as group:
        prefetch = group.create_task(rig.provider.prefetch(binding))
        await until(lambda: bool(source.requests))
        await asyncio.sleep(0.03)
        source.gate = asyncio.Event()  # the request under way never hears of the new gate
        source.gate.set()
        assert await rig.read(binding, 0, 4096) == built.decoded[:4096]
        await prefetch


async def test_readers_that_keep_coming_do_not_keep_a_hanging_request_alive(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "LONG_S", 0.02)
    built = simple(4, 256 << 10)
    source = MemorySource()
    source.gate.clear()
    binding = rig.bind(built, source)

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await rig.read(binding, 0, 4096)

    async with asyncio.TaskGroup() as group:
        group.create_task(impatient())
        await until(lambda: bool(source.requests))
        late = group.create_task(rig.read(binding, 0, 4096))
        await until(lambda: len(source.requests) == 2)  # the first one's time is up: a new request is made
        source.gate.set()
    assert late.result() == built.decoded[:4096]


@pytest.mark.parametrize("piece", [1000, 64 << 10])
async def test_cancelled_at_every_step_it_still_serves_right_bytes(rig: Rig, piece: int) -> None:
    built = simple(12, 100_000, batch=3)
    source = MemorySource()
    source.piece = piece
    binding = rig.bind(built, source)
    for steps in range(60):
        reader = asyncio.get_running_loop().create_task(rig.read(binding, (steps * 37_000) % 900_000, 5000))
        for _ in range(steps):
            await asyncio.sleep(0)
        reader.cancel()
        try:
            await reader
        except asyncio.CancelledError:
            pass
        claims_are_true(binding, built.decoded)
    assert await rig.read(binding, 0, len(built.decoded)) == built.decoded


async def test_a_corrupt_chunk_is_refused_and_its_neighbours_are_not(rig: Rig) -> None:
    built = simple(8, 20_000)
    source = MemorySource()
    binding = rig.bind(built, source, "registry/app:1")
    good = source.objects["blob"]
    bad = bytearray(good)
    bad[built.layout.unit_offset[3] + 100] ^= 1
    source.objects["blob"] = bytes(bad)
    with pytest.raises(FillError) as caught:
        await rig.read(binding, built.layout.chunk_offset[3], 4096)
    assert caught.value.errno == 5
    for part in ("registry/app:1", "blob blob", "chunk 3", "memory://"):
        assert part in rig.provider.statistics("registry/app:1").last_error
    assert rig.provider.statistics("registry/app:1").errors == 1
    for chunk in (2, 4, 5):
        start = built.layout.chunk_offset[chunk]
        assert await rig.read(binding, start, 4096) == built.decoded[start : start + 4096]
    claims_are_true(binding, built.decoded)
    source.objects["blob"] = good
    start = built.layout.chunk_offset[3]
    assert await rig.read(binding, start, 4096) == built.decoded[start : start + 4096]


async def test_every_flipped_bit_is_noticed(rig: Rig) -> None:
    built = build([content(5000, 1)], codec="none")
    source = MemorySource()
    binding = rig.bind(built, source)
    for at in range(0, 5000, 499):
        bad = bytearray(built.stored)
        bad[at] ^= 0x10
        source.objects["blob"] = bytes(bad)
        with pytest.raises(FillError):
            await rig.read(binding, 0, 100)
    assert binding.missing_count == 1


async def test_a_source_that_fails_is_asked_again_by_the_next_read(rig: Rig) -> None:
    built = simple(4, 64 << 10)
    source = MemorySource()
    binding = rig.bind(built, source)
    source.fail = lambda want: BackendTemporary("503")
    with pytest.raises(FillError):
        await rig.read(binding, 0, 10)
    source.fail = lambda want: None
    assert await rig.read(binding, 0, 10) == built.decoded[:10]


async def test_a_body_that_ends_early_is_an_error(rig: Rig) -> None:
    built = simple(4, 64 << 10)
    source = MemorySource()
    binding = rig.bind(built, source)
    source.objects["blob"] = built.stored[: built.layout.unit_stored[0] - 1]
    with pytest.raises(FillError):
        await rig.read(binding, 0, 10)
    claims_are_true(binding, built.decoded)


async def test_a_shared_blob_is_fetched_from_the_next_image_if_the_first_source_fails(rig: Rig) -> None:
    built = simple(4, 64 << 10)
    broken, sound = MemorySource("memory://a"), MemorySource("memory://b")
    broken.fail = lambda want: BlobCorrupt("changed")
    first, second = rig.bind(built, broken, "a"), rig.bind(built, sound, "b")
    assert first.blob is second.blob
    assert await rig.read(first, 0, 10) == built.decoded[:10]
    assert broken.requests
    assert sound.requests


async def test_an_image_that_lies_about_a_shared_blob_gets_nothing_of_it(rig: Rig) -> None:
    built = simple(4, 64 << 10)
    evil = build([content(len(chunk), 99) for chunk in built.chunks])
    good_source, evil_source = MemorySource(), MemorySource()
    good = rig.bind(built, good_source)
    bad = rig.bind(evil, evil_source, "evil")
    if built.layout.chunk_offset == evil.layout.chunk_offset:
        assert good.blob is not bad.blob
    assert await rig.read(good, 0, 4096) == built.decoded[:4096]
    assert await rig.read(bad, 0, 4096) == evil.decoded[:4096]
    assert os.pread(good.blob.fd, 4096, 0) == built.decoded[:4096]


async def test_a_chunk_that_no_image_states_is_an_error_not_zeros(rig: Rig) -> None:
    built = restate(simple(4, 64 << 10), [0, 2])
    source = MemorySource()
    binding = rig.bind(built, source)
    with pytest.raises(FillError):
        await rig.read(binding, 64 << 10, 4096)
    assert not source.requests
    await rig.provider.prefetch(binding)
    assert list(binding.blob.map.present) == [1, 0, 1, 0]
    assert binding.blob.complete
    assert not rig.provider.present(key_of(binding.blob), Range(64 << 10, 68 << 10))


async def test_padding_and_what_lies_past_the_end_need_no_fill(rig: Rig) -> None:
    built = build([content(100, 1), content(8000, 2)])
    binding = rig.bind(built, MemorySource())
    key = key_of(binding.blob)
    assert rig.provider.present(key, Range(2048, 4096))
    assert rig.provider.present(key, Range(12288, 1 << 20))
    assert rig.provider.present(key, Range(0, 0))
    assert not rig.provider.present(key, Range(0, 4096))


async def test_the_disk_is_full_then_is_not(rig: Rig) -> None:
    built = simple(4, 64 << 10)
    source = MemorySource()
    binding = rig.bind(built, source)

    class FullSink:
        block_size = 4096

        def write(self, offset: int, data: memoryview) -> None:
            raise OSError(28, "No space left on device")

        def data(self) -> None:
            raise AssertionError

    key, blob = key_of(binding.blob), binding.blob
    rig.provider.attach(key, blob, FullSink())  # type: ignore[arg-type]
    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            with pytest.raises(FillError) as caught:
                await rig.read(binding, 0, 4096)
            assert caught.value.errno == 5
    assert [entry["event"] for entry in logged if entry["log_level"] == "error"] == ["cache.full"]
    assert binding.missing_count == 4
    rig.provider.attach(key, blob, FileSink(blob.fd))
    assert await rig.read(binding, 0, 4096) == built.decoded[:4096]


async def test_prefetch_brings_everything_and_says_when_it_is_durable(rig: Rig) -> None:
    built = simple(50, 200_000, batch=2)
    source = MemorySource()
    done: list[str] = []
    rig.provider.on_complete = lambda blob: done.append(blob.name)
    binding = rig.bind(built, source)
    steps: list[tuple[int, int]] = []
    await rig.provider.prefetch(binding, progress=lambda have, total: steps.append((have, total)))
    assert binding.blob.complete
    assert steps[0][0] == 0
    assert steps[-1] == (binding.total_stored_bytes, binding.total_stored_bytes)
    assert binding.fetched_stored_bytes == binding.total_stored_bytes == sum(built.layout.unit_stored)
    await until(lambda: bool(done))
    assert done == [binding.blob.name]
    assert binding.blob.map.is_durable
    assert os.pread(binding.blob.fd, len(built.decoded), 0) == built.decoded
    assert source.asked_bytes == len(built.stored)


async def test_prefetch_of_chosen_chunks_brings_those(rig: Rig) -> None:
    built = simple(20, 64 << 10)
    source = MemorySource()
    binding = rig.bind(built, source)
    await rig.provider.prefetch(binding, chunks=[3, 4, 17])
    assert [i for i in range(20) if binding.blob.map.present[i]] == [3, 4, 17]


async def test_prefetch_reports_a_corrupt_chunk_and_brings_the_others(rig: Rig) -> None:
    built = simple(20, 64 << 10)
    source = MemorySource()
    binding = rig.bind(built, source)
    bad = bytearray(built.stored)
    bad[built.layout.unit_offset[7] + 50] ^= 1
    source.objects["blob"] = bytes(bad)
    with pytest.raises(BlobCorrupt, match="chunk 7"):
        await rig.provider.prefetch(binding)
    assert list(binding.missing()) == [7]


async def test_prefetch_fails_when_its_source_does(rig: Rig) -> None:
    built = simple(20, 64 << 10)
    source = MemorySource()
    binding = rig.bind(built, source)
    source.fail = lambda want: BackendTemporary("gone")
    with pytest.raises(BackendTemporary):
        await rig.provider.prefetch(binding)
    source.fail = lambda want: None
    await rig.provider.prefetch(binding)


async def test_a_miss_does_not_wait_behind_a_prefetch(rig: Rig) -> None:
    built = simple(64, 1 << 20, codec="none")
    source = MemorySource()
    source.piece = 16 << 10
    binding = rig.bind(built, source)
    async with asyncio.TaskGroup() as group:
        prefetch = group.create_task(rig.provider.prefetch(binding))
        await until(lambda: binding.missing_count < 60)
        before = source.asked_bytes
        assert await rig.read(binding, 63 << 20, 4096) == built.decoded[63 << 20 : (63 << 20) + 4096]
        assert source.asked_bytes - before <= 6 << 20
        assert not prefetch.done()
        await prefetch


async def test_a_sequential_reader_finds_its_data_there(rig: Rig) -> None:
    built = simple(64, 256 << 10)
    source = MemorySource()
    source.delay_s = 0.002
    binding = rig.bind(built, source)
    step = 128 << 10
    for offset in range(0, len(built.decoded), step):
        want = built.decoded[offset : offset + step]
        assert await rig.read(binding, offset, len(want)) == want
    assert rig.provider.statistics("image").waits < len(built.decoded) // step // 2
    assert source.asked_bytes == len(built.stored)


async def test_detached_readers_get_an_error_at_once(rig: Rig) -> None:
    built = simple(4, 64 << 10)
    source = MemorySource()
    source.gate.clear()
    binding = rig.bind(built, source)
    reader = asyncio.get_running_loop().create_task(rig.read(binding, 0, 10))
    await until(lambda: bool(source.requests))
    rig.provider.detach(key_of(binding.blob))
    with pytest.raises(FillError):
        await reader
    with pytest.raises(FillError):
        await rig.read(binding, 0, 10)


def claims_are_true(binding, decoded: bytes) -> None:  # type: ignore[no-untyped-def]
    layout = binding.layout
    for chunk in range(layout.chunk_count):
        if binding.blob.map.present[chunk]:
            start, size = layout.chunk_offset[chunk], layout.chunk_size[chunk]
            assert os.pread(binding.blob.fd, size, start) == decoded[start : start + size]


async def until(condition) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # a condition of somebody else's state has no event
            await asyncio.sleep(0.001)
