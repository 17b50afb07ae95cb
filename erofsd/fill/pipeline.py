"""From a range request to chunks in the cache: stream, cut into units, decode, verify, write, mark.

Units are handed on as they arrive, not when the request is over: a reader that waits for the first chunk of
4 MiB waits for that chunk. Whatever units one piece from the network completes make one **job**, done in one
hop to a thread, or inline where the hop would cost more than the work.

Three bounds: a flight has at most ``JOBS_A_FLIGHT`` jobs under way and stops reading its source meanwhile;
all flights together hold at most ``memory_limit`` bytes; at most one job waits in front of the threads, so
that a reader's job waits behind little else. Flights of the background get half of the memory, and while a
reader waits for anything prefetches take only a trickle from their sources, enough to keep connections alive.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from erofsd.blobs.layout import BlobLayout
from erofsd.blobs.store import BLOCK_SIZE, StoredBlob, aligned
from erofsd.blobs.units import UNIT_SIZE_MAX
from erofsd.errors import BackendTemporary, BlobCorrupt, ErofsdError, UnsupportedImage
from erofsd.fill.bounds import Budget, Threads
from erofsd.fill.flight import Flight, GivenUp, Landings
from erofsd.fill.statistics import FillStatistics, ImageStatistics, SourceGauge
from erofsd.fill.work import Buffers, Job, Part
from ondemand.provider import Sink

# Decoded. A hop to a thread and back costs 30-60 us, decoding, verifying and writing 64 KiB 150-250 us (zstd,
# blake3, ext4): up to here it is done inline, which measures 5-10% faster and keeps the loop for no longer.
INLINE_BYTES = 64 << 10
JOB_BYTES = 1 << 20  # decoded; small units are gathered up to this
JOBS_A_FLIGHT = 2
MEMORY_LIMIT = 96 << 20
TRICKLE_S = 0.05  # between two pieces of a background flight while a reader waits

log = structlog.get_logger("erofsd.fill")


@dataclass(slots=True, eq=False)
class Target:
    """One stored blob that is being filled.

    Attributes:
        sink: Where its bytes go now.
        landings: What is under way.
    """

    blob: StoredBlob
    sink: Sink
    landings: Landings = field(default_factory=Landings)


@dataclass(slots=True)
class _Incoming:
    """The unit that arrives just now and did not fit into one piece."""

    buffer: mmap.mmap
    filled: int = 0


class Pipeline:
    """Brings flights home. Owned by `erofsd.fill.provider.FillProvider`."""

    def __init__(self, *, workers: int, memory_limit: int, statistics: FillStatistics) -> None:
        self._threads = Threads(workers)
        self._budget = Budget(memory_limit)
        self.buffers = Buffers(keep_bytes=min(memory_limit // 4, 4 * (workers + 1) << 20))
        self._statistics = statistics
        self._readers_waiting = 0
        self._calm = asyncio.Event()
        self._calm.set()
        self._trickling: set[Callable[[], None]] = set()
        self.gauges: dict[str, SourceGauge] = {}
        self.images: dict[str, ImageStatistics] = {}
        self.on_landed: Callable[[StoredBlob], None] = lambda blob: None

    def statistics(self, image: str) -> ImageStatistics:
        """The counters of *image*."""
        found = self.images.get(image)
        if found is None:
            found = self.images[image] = ImageStatistics()
        return found

    def gauge(self, source: str) -> SourceGauge:
        """How far away the source called *source* is."""
        found = self.gauges.get(source)
        if found is None:
            found = self.gauges[source] = SourceGauge()
        return found

    def close(self) -> None:
        """End the threads, once no flight is left."""
        self._threads.close()

    # -- readers before everybody else ------------------------------------------------------------------

    def reader_waits(self) -> None:
        """A reader begins to wait: the background yields until `reader_served`."""
        self._readers_waiting += 1
        self._calm.clear()

    def reader_served(self) -> None:
        """A reader waits no more."""
        self._readers_waiting -= 1
        if not self._readers_waiting:
            self._calm.set()
            for wake in list(self._trickling):
                wake()

    async def wait_calm(self, timeout_s: float | None = None) -> None:
        """Wait until no reader waits, or for *timeout_s*."""
        if self._readers_waiting:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._calm.wait()
            except TimeoutError:
                pass

    async def _trickle(self, flight: Flight) -> None:
        """Let *flight* pause for those who wait, until a reader waits for it too, or for ``TRICKLE_S``."""
        loop = asyncio.get_running_loop()
        over = loop.create_future()

        def wake() -> None:
            if not over.done():
                over.set_result(None)

        self._trickling.add(wake)
        flight.on_urgent = wake
        timer = loop.call_later(TRICKLE_S, wake)
        try:
            await over
        finally:
            timer.cancel()
            self._trickling.discard(wake)

    # -- flights ----------------------------------------------------------------------------------------

    async def fly(self, target: Target, flight: Flight) -> None:
        """Bring *flight* home: every landing of it is settled when this returns, also if it is cancelled."""
        chunks = [chunk for unit in flight.run.units for chunk in flight.binding.layout.chunks_of(unit)]
        approach = _Approach(self, target, flight)
        flight.begun = True
        error: Exception = GivenUp("the request was given up")
        self._statistics.in_flight += 1
        try:
            self._check(flight)
            async with self._budget.held(flight, self._cost(flight)):
                await self._receive(flight, approach)
                await approach.wait_jobs(below=1)
            return
        except ErofsdError as exc:
            error = exc
        except OSError as exc:
            # A backend translates its own; this is a fault of ours that should not hurt more than it must.
            error = BackendTemporary(f"{exc.strerror or exc}")
            log.exception("fetch.crashed", blob_id=flight.binding.blob.name)
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            error = ErofsdError(f"{type(exc).__name__}: {exc}")
            log.exception("fetch.crashed", blob_id=flight.binding.blob.name)
        finally:
            self._statistics.in_flight -= 1
            approach.drop_incoming()
            if not isinstance(error, GivenUp) and flight.on_failed is not None:
                flight.on_failed()
            # Jobs under way settle theirs themselves; what no job has seen will not come any more.
            target.landings.settle(flight, [c for c in chunks if c not in approach.in_jobs], error)

    @staticmethod
    def _check(flight: Flight) -> None:
        layout = flight.binding.layout
        for unit in flight.run.units:
            if max(layout.unit_size[unit], layout.unit_stored[unit]) > UNIT_SIZE_MAX:
                raise UnsupportedImage(f"blob {layout.blob_id}: unit {unit} is over {UNIT_SIZE_MAX} bytes")

    @staticmethod
    def _cost(flight: Flight) -> int:
        """Bytes that *flight* holds at most, stored and decoded: of jobs under way and one that gathers."""
        layout = flight.binding.layout
        units = flight.run.units
        largest = max(layout.unit_size[unit] + layout.unit_stored[unit] for unit in units)
        if len(units) == 1:
            return largest
        total = sum(layout.unit_size[unit] + layout.unit_stored[unit] for unit in units)
        return min(total, (JOBS_A_FLIGHT + 1) * max(largest, 2 * JOB_BYTES))

    async def _receive(self, flight: Flight, approach: _Approach) -> None:
        binding = flight.binding
        source = binding.source
        assert source is not None
        counted = self.statistics(binding.image)
        counted.requests += 1
        began = flight.began_at = flight.moved_at = time.monotonic()
        first = 0.0
        received = 0
        stream = source.stream(binding.layout.blob_id, flight.run.compressed)
        try:
            async for piece in stream:
                flight.moved_at = time.monotonic()
                if not received:
                    first = flight.moved_at
                    first_bytes = len(piece)
                received += len(piece)
                flight.received = received
                flight.progress += 1
                counted.transferred_bytes += len(piece)
                if received > len(flight.run.compressed):
                    raise BlobCorrupt(f"{received} bytes came, {len(flight.run.compressed)} were asked for")
                if approach.take(piece):
                    await approach.wait_jobs(below=JOBS_A_FLIGHT)
                if self._readers_waiting and flight.yields and not flight.urgent:
                    await self._trickle(flight)
        finally:
            if (aclose := getattr(stream, "aclose", None)) is not None:
                await aclose()
        if received != len(flight.run.compressed):
            raise BackendTemporary(f"{received} bytes came, {len(flight.run.compressed)} were asked for")
        if received:
            elapsed_s = time.monotonic() - first
            self.gauge(source.name).saw(first - began, received - first_bytes, elapsed_s)

    # -- jobs -------------------------------------------------------------------------------------------

    def start_job(self, target: Target, flight: Flight, parts: list[Part], done: Callable[[], None]) -> bool:
        """Have *parts* decoded and written; their landings are settled before *done* is called.

        Returns:
            False if all is done already.
        """
        layout = flight.binding.layout
        blob = target.blob
        out_size, scratch_size, decoded = _room_for(layout, parts)
        held = [part.memory for part in parts if isinstance(part.memory, mmap.mmap)]
        job = Job(layout, parts, target.sink, blob.map, blob.map.epoch)
        if not blob.retain():  # while a thread writes, its descriptor stays open and the file is not spoilt
            raise ErofsdError(f"{blob.name}: was destroyed")
        if out_size:
            held.append(buffer := self.buffers.take(out_size))
            job.out = memoryview(buffer)
        if scratch_size:
            held.append(buffer := self.buffers.take(scratch_size))
            job.scratch = memoryview(buffer)

        def finished() -> None:
            self._account(job, decoded)
            self._settle(target, flight, job)
            blob.release()
            for memory in held:
                self.buffers.give(memory)
            done()

        if decoded <= INLINE_BYTES:
            try:
                job.run()
            except Exception:
                log.exception("job.crashed", blob_id=blob.name)
            finished()
            return False
        self._threads.submit(job, finished, urgent=flight.urgent)
        return True

    def _account(self, job: Job, decoded: int) -> None:
        self._statistics.decoded_bytes += decoded
        self._statistics.decode_s += job.decode_s
        self._statistics.digest_s += job.digest_s
        self._statistics.write_s += job.write_s

    def _settle(self, target: Target, flight: Flight, job: Job) -> None:
        binding = flight.binding
        # No await between these two: who sees a landing settled sees the chunk present.
        target.blob.mark(job.landed, job.epoch)
        target.landings.settle(flight, job.landed, GivenUp("it was evicted meanwhile") if job.stale else None)
        for chunks, error in job.failed:
            if isinstance(error, BlobCorrupt):
                self._statistics.corrupt_chunks += len(chunks)
                error = self._named(flight, chunks[0], error)
            target.landings.settle(flight, chunks, error)
        left = [chunk for part in job.parts for chunk, _ in part.chunks if chunk in target.landings]
        target.landings.settle(flight, left, ErofsdError("decoding it failed, see the log"))
        if job.landed:
            self.on_landed(binding.blob)

    @staticmethod
    def _named(flight: Flight, chunk: int, error: BlobCorrupt) -> BlobCorrupt:
        """The same error, with all that somebody needs to find the culprit."""
        binding = flight.binding
        source = binding.source.name if binding.source is not None else "?"
        where = f"{binding.image}: blob {binding.layout.blob_id} chunk {chunk} from {source}"
        named = type(error)(f"{where}: {error}", hint=error.hint)
        named.__cause__ = error
        return named


def _room_for(layout: BlobLayout, parts: Sequence[Part]) -> tuple[int, int, int]:
    """Bytes of ``Job.out`` and ``Job.scratch`` for *parts*, and bytes that are decoded."""
    out = scratch = decoded = 0
    for part in parts:
        size = layout.unit_size[part.unit]
        decoded += size
        packed = layout.unit_packed[part.unit]
        for chunk, _ in part.chunks:
            if packed or layout.chunk_size[chunk] % BLOCK_SIZE:
                out += aligned(layout.chunk_size[chunk])
        if packed and (len(part.chunks) > 1 or layout.chunk_size[part.chunks[0][0]] != size):
            scratch = max(scratch, size)
    return out, scratch, decoded


class _Approach:
    """Cuts what one flight brings into units, and hands them on."""

    def __init__(self, pipeline: Pipeline, target: Target, flight: Flight) -> None:
        self._pipeline = pipeline
        self._target = target
        self._flight = flight
        self._layout = flight.binding.layout
        self._next = 0  # index into the run's units
        self._at = flight.run.compressed.start
        self._incoming: _Incoming | None = None
        self._parts: list[Part] = []
        self._parts_bytes = 0
        self._jobs = 0
        self._job_done = asyncio.Event()
        self.in_jobs: set[int] = set()

    def take(self, piece: bytes) -> bool:
        """Use the next *piece*; True if threads have something to do now."""
        view = memoryview(piece)
        layout, units = self._layout, self._flight.run.units
        stop = self._at + len(view)
        busy = False
        while self._next < len(units):
            unit = units[self._next]
            offset, stored = layout.unit_offset[unit], layout.unit_stored[unit]
            if offset >= stop and stored:
                break
            start = max(offset - self._at, 0)
            if offset + stored > stop:
                self._begin(view[start:], stored)
                break
            self._complete(unit, view, start, offset + stored - self._at, piece)
            self._next += 1
            if self._parts_bytes >= JOB_BYTES:
                busy |= self._hand_on()
        self._at = stop
        # All that has arrived goes on at once: the network may have nothing more for a while.
        return self._hand_on() | busy

    def _begin(self, view: memoryview, stored: int) -> None:
        if self._incoming is None:
            self._incoming = _Incoming(self._pipeline.buffers.take(stored))
        incoming = self._incoming
        incoming.buffer[incoming.filled : incoming.filled + len(view)] = view
        incoming.filled += len(view)

    def _complete(self, unit: int, view: memoryview, start: int, stop: int, piece: bytes) -> None:
        stored = self._layout.unit_stored[unit]
        memory: object = piece
        if self._incoming is not None:
            self._begin(view[start:stop], stored)
            memory, start = self._incoming.buffer, 0
            self._incoming = None
            view = memoryview(memory)
            stop = stored
        chunks = self._wanted(unit)
        if chunks:
            self._parts.append(Part(unit, view[start:stop], chunks, memory, start))
            self._parts_bytes += self._layout.unit_size[unit]
        elif isinstance(memory, mmap.mmap):
            self._pipeline.buffers.give(memory)

    def _wanted(self, unit: int) -> list[tuple[int, bytes]]:
        """Chunks of *unit* that this flight is to land, each with the digest it must have."""
        layout, target, flight = self._layout, self._target, self._flight
        wanted = []
        for chunk in layout.chunks_of(unit):
            landing = target.landings.get(chunk)
            if landing is not None and landing.flight is flight:
                digest = _digest(target.blob, layout, chunk)
                if digest is not None:
                    wanted.append((chunk, digest))
        return wanted

    def _hand_on(self) -> bool:
        if not self._parts:
            return False
        parts, self._parts, self._parts_bytes = self._parts, [], 0
        # What is handed on settles its own landings; nothing else runs before this returns, but inline jobs.
        busy = self._pipeline.start_job(self._target, self._flight, parts, self._done)
        self.in_jobs.update(chunk for part in parts for chunk, _ in part.chunks)
        self._jobs += 1
        return busy

    def _done(self) -> None:
        self._jobs -= 1  # -1 for a moment, if it was inline
        self._job_done.set()

    async def wait_jobs(self, *, below: int) -> None:
        """Wait until fewer than *below* jobs are under way."""
        while self._jobs >= below:
            self._job_done.clear()
            await self._job_done.wait()

    def drop_incoming(self) -> None:
        """Give back the memory of a unit that will not be complete."""
        if self._incoming is not None:
            self._pipeline.buffers.give(self._incoming.buffer)
            self._incoming = None


def _digest(blob: StoredBlob, layout: BlobLayout, chunk: int) -> bytes | None:
    """What *chunk* must hash to, by the first image that states it: all agreed when they were bound."""
    if layout.stated[chunk]:
        return layout.digest(chunk)
    for tally in blob.tallies:
        if tally.layout.stated[chunk]:
            return tally.layout.digest(chunk)
    return None  # the image that stated it is gone


def default_workers() -> int:
    """Threads that decode: one for each processor we may use."""
    return len(os.sched_getaffinity(0))
