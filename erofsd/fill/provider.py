"""Implements `ondemand.provider.Provider`: from "these bytes of that object" to chunks of a stored blob.

A read that hits costs a dictionary look-up and a search in a byte column. A read that misses becomes
landings: those of flights under way, joined, and those of new flights, planned by `erofsd.fill.plan` and
flown by `erofsd.fill.pipeline`. Whatever happens to a flight, the reader looks at the chunks again: they are
there, or their error counts, or another flight is started, at another image's source if the first has failed.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable, Iterable, Sequence

import structlog

from erofsd.blobs.store import Binding, StoredBlob
from erofsd.errors import BlobCorrupt, CacheFull, CorruptImage, ErofsdError
from erofsd.fill import plan
from erofsd.fill.flight import Flight, GivenUp, Landing, wait_landed
from erofsd.fill.pipeline import MEMORY_LIMIT, Pipeline, Target, default_workers
from erofsd.fill.plan import DEFAULT_POLICY, Policy, Run, Stream, Streams
from erofsd.fill.prefetch import Progress, fetch_all
from erofsd.fill.statistics import FillStatistics, ImageStatistics, Wait
from ondemand.errors import FillError, NobodyReads
from ondemand.provider import ObjectKey, Sink
from ondemand.ranges import Range, RangeSet

LOOKS_MAX = 8  # a reader looks again that often; what is taken away from under it more often is an error
FLUSH_INTERVAL_S = 10.0
SAME_ERROR_S = 10.0  # a full disk fails every read: it is logged once in this time
SHY_S = 2.0  # after a flight of the background failed, nothing is fetched ahead of readers of that blob

log = structlog.get_logger("erofsd.fill")


class Unstated(CorruptImage):
    """No image says what belongs there, so nobody reads it by an image."""


class _Object(Target):
    """A stored blob with what its readers do."""

    __slots__ = ("gone", "shy_until", "streams")

    def __init__(self, blob: StoredBlob, sink: Sink, policy: Policy) -> None:
        super().__init__(blob, sink)
        self.streams = Streams(policy)
        self.shy_until = 0.0
        self.gone = False  # nobody serves it any more

    def first_missing(self, chunks: range) -> int:
        """The first of *chunks* that is not present; -1 if all are."""
        return self.blob.map.present.find(0, chunks.start, chunks.stop)

    def is_stated(self, chunk: int) -> bool:
        """True if an image says what belongs there."""
        return any(tally.layout.stated[chunk] for tally in self.blob.tallies)

    def missing(self, chunks: range) -> list[int]:
        """Those of *chunks* that are not present."""
        found = []
        at = self.first_missing(chunks)
        while at >= 0:
            found.append(at)
            at = self.blob.map.present.find(0, at + 1, chunks.stop)
        return found


class FillProvider:
    """Fills objects from the sources of the images that are bound to them.

    Args:
        workers: Threads that decompress, verify and write; by default one for each processor.
        memory_limit: Bytes that fetches under way may hold.
        policy: How much to fetch beyond what is asked for.

    Attributes:
        on_complete: Called once whenever all that any image states of a blob has become present and
            durable; also soon after a blob is attached that is complete already.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        memory_limit: int = MEMORY_LIMIT,
        policy: Policy = DEFAULT_POLICY,
    ) -> None:
        self._policy = policy
        self.fill_statistics = FillStatistics()
        self._pipeline = Pipeline(
            workers=workers or default_workers(), memory_limit=memory_limit, statistics=self.fill_statistics
        )
        self._pipeline.on_landed = self._landed
        self._objects: dict[ObjectKey, _Object] = {}
        self._by_blob: dict[StoredBlob, _Object] = {}
        self._group: asyncio.TaskGroup | None = None
        self._begun = asyncio.Event()
        self._to_flush: set[StoredBlob] = set()
        self._flush_soon = asyncio.Event()
        self._full_logged_at = float("-inf")
        self.on_complete: Callable[[StoredBlob], None] = lambda blob: None

    # -- life -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Fly and flush until cancelled. What is asked for before waits, what is asked for after fails."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._begun.set()
                await self._keep_flushing()
        finally:
            self._group = None
            self._pipeline.close()

    def attach(self, key: ObjectKey, blob: StoredBlob, sink: Sink) -> None:
        """Serve *blob* as *key*, writing to *sink*. Again with the same pair: only the sink changes."""
        target = self._by_blob.get(blob)
        if target is None:
            target = self._by_blob[blob] = _Object(blob, sink, self._policy)
        target.sink = sink
        target.gone = False
        self._objects[key] = target
        if blob.complete:
            self._landed(blob)

    def can_fill(self, key: ObjectKey, want: Range) -> bool:
        """True if *key* is served, and for every chunk of *want* some image says what belongs there."""
        target = self._objects.get(key)
        if target is None:
            return False
        return all(map(target.is_stated, target.missing(target.blob.layout.chunks_in(want))))

    def attached(self, key: ObjectKey) -> bool:
        """True if *key* is served."""
        return key in self._objects

    def gone(self, key: ObjectKey) -> None:
        """The file of *key*, which was not open, is gone: its chunks are not there any more. Blocks."""
        if (target := self._objects.get(key)) is not None:
            try:
                data = target.sink.data()
            except OSError:  # of a closed object
                data = RangeSet()
            target.blob.reconcile(data)

    def detach(self, key: ObjectKey) -> None:
        """Serve *key* no more; what is under way for it is given up, its readers get EIO."""
        target = self._objects.pop(key, None)
        if target is not None and target not in self._objects.values():
            self._by_blob.pop(target.blob, None)
            self._to_flush.discard(target.blob)
            target.gone = True
            for flight in target.landings.flights():
                flight.cancel()

    def release(self, binding: Binding) -> None:
        """Its image does not use the blob any more: nothing more is fetched from its source."""
        binding.release()
        target = self._by_blob.get(binding.blob)
        if target is not None:
            for flight in target.landings.flights():
                if flight.binding is binding:
                    flight.cancel()  # readers of other images look again

    def statistics(self, image: str) -> ImageStatistics:
        """What happened for the image that `Binding.image` calls *image*."""
        return self._pipeline.statistics(image)

    # -- Provider ---------------------------------------------------------------------------------------

    def present(self, key: ObjectKey, want: Range) -> bool:
        """See `ondemand.provider.Provider`."""
        target = self._objects.get(key)
        if target is None or target.blob.spoilt:
            return False
        if not want:
            return True
        stream = target.streams.seen(want)
        chunks = target.blob.layout.chunks_in(want)
        if target.first_missing(chunks) >= 0:
            return False
        if stream.window and chunks:
            self._fetch_ahead(target, stream, chunks.start)
        return True

    async def fill(self, key: ObjectKey, want: Range, sink: Sink) -> None:
        """See `ondemand.provider.Provider`. Writes to the sink that *key* was attached with, or opened.

        A fetch serves more than this read, and goes on after it.
        """
        target = self._objects.get(key)
        if target is None:
            raise NobodyReads(f"{key}: not served")
        chunks = target.blob.layout.chunks_in(want)
        began, began_at = time.monotonic(), time.time()
        error = ""
        self._pipeline.reader_waits()
        try:
            await self._fill(target, chunks, want)
        except asyncio.CancelledError:
            self._distrust(target, chunks)
            error = self._named(target, chunks, "not within the deadline")
            log.error("fill.expired", blob_id=target.blob.name, chunk_index=chunks.start, error=error)
            raise
        except Exception as exc:
            error = self._named(target, chunks, str(exc))
            raise self._fill_error(target, chunks, exc) from exc
        finally:
            self._pipeline.reader_served()
            self._count(target, chunks, want, began_at, time.monotonic() - began, error)

    async def open(self, key: ObjectKey, sink: Sink) -> int:
        """See `ondemand.provider.Provider`. The object must have been attached before."""
        target = self._objects.get(key)
        if target is None:
            raise FillError(f"{key}: not served", errno.ENOENT)
        target.sink = sink
        target.gone = False
        if lost := target.blob.reconcile(sink.data()):
            log.warning("chunks.lost", blob_id=target.blob.name, count=lost)
        return target.blob.size

    def closed(self, key: ObjectKey) -> None:
        """See `ondemand.provider.Provider`."""
        if (target := self._objects.get(key)) is not None:
            target.gone = True
            for flight in target.landings.flights():
                flight.cancel()

    # -- for the daemon ---------------------------------------------------------------------------------

    async def ensure(self, binding: Binding, want: Range) -> None:
        """Fill *want* of the binding's blob, before any reader asks.

        Raises:
            ErofsdError: Why it cannot be.
        """
        target = self._target(binding)
        await self._fill(target, binding.layout.chunks_in(want), want)

    async def prefetch(
        self, binding: Binding, *, chunks: Iterable[int] | None = None, progress: Progress | None = None
    ) -> None:
        """Fill *chunks* (None: all that the image states); returns when all are present and verified.

        Args:
            progress: Called with stored bytes done and in all, whenever a request is done.

        Raises:
            ErofsdError: Why some cannot be. Corrupt chunks do not keep the others from coming.
        """
        target = self._target(binding)
        await self._begun.wait()
        await fetch_all(self, self._pipeline, target, binding, self._policy, chunks, progress)

    def _target(self, binding: Binding) -> _Object:
        target = self._by_blob.get(binding.blob)
        if target is None:
            raise ErofsdError(f"{binding.blob.name}: is not attached")
        return target

    # -- misses -----------------------------------------------------------------------------------------

    async def _fill(self, target: _Object, chunks: range, want: Range) -> None:
        """Wait until *chunks* are present.

        Raises:
            ErofsdError: Why they cannot be.
        """
        await self._begun.wait()
        tried: dict[int, set[Binding]] = {}
        stream = target.streams.last(want)
        for _ in range(LOOKS_MAX):
            missing = target.missing(chunks)
            if not missing:
                return
            wanted = [chunk for chunk in missing if target.is_stated(chunk)]
            if not wanted:
                # Nothing can tell right bytes from wrong ones there, and zeros would be a lie.
                raise Unstated(f"{target.blob.name}: no image states chunk {missing[0]}")
            if target.gone or target.blob.spoilt:
                raise ErofsdError(f"{target.blob.name}: not served any more")
            landings = self._landings(target, wanted, tried, stream)
            await wait_landed(landings, reader=True)
            for landing in landings:
                error = landing.done.result()
                if error is None or isinstance(error, GivenUp):
                    continue
                ours = isinstance(error, BlobCorrupt | CacheFull) or not landing.flight.background
                if not ours:
                    continue  # it failed before this reader came: it is due a try of its own
                binding = landing.flight.binding
                tried.setdefault(landing.chunk, set()).add(binding)
                if self._choose(target, landing.chunk, tried) is None or isinstance(error, CacheFull):
                    raise error
                log.warning(
                    "source.failed",
                    image=binding.image,
                    blob_id=target.blob.name,
                    chunk_index=landing.chunk,
                    backend=binding.source.name if binding.source is not None else "",
                    error=str(error),
                )
        raise ErofsdError(f"{target.blob.name}: what was filled was taken away {LOOKS_MAX} times")

    def _landings(
        self, target: _Object, missing: Sequence[int], tried: dict[int, set[Binding]], stream: Stream
    ) -> list[Landing]:
        """A landing for each of *missing*: of a flight under way, or of one started now."""
        needed: dict[Binding, list[int]] = {}
        for chunk in missing:
            if chunk not in target.landings:
                binding = self._choose(target, chunk, tried)
                if binding is None:
                    raise ErofsdError(f"{target.blob.name}: chunk {chunk} has no source")
                needed.setdefault(binding, []).append(chunk)
        for binding, chunks in needed.items():
            for run in self._plan(target, binding, chunks, stream):
                self.launch(target, binding, run, background=False)
        if stream.window:
            self._fetch_ahead(target, stream, missing[0])
        found = [target.landings.get(chunk) for chunk in missing]
        landings = [landing for landing in found if landing is not None]
        for flight in {landing.flight for landing in landings if landing.flight.is_stuck}:
            flight.cancel()  # we look again when it has settled
        return landings

    @staticmethod
    def _choose(target: _Object, chunk: int, tried: dict[int, set[Binding]]) -> Binding | None:
        """Whose source to ask for *chunk*: the first image's that states it and has not failed yet."""
        failed = tried.get(chunk, ())
        sources = {id(binding.source) for binding in failed}
        for binding in target.blob.bindings:
            if (
                binding.layout.stated[chunk]
                and binding.source is not None
                and id(binding.source) not in sources
            ):
                return binding
        return None

    def _plan(self, target: _Object, binding: Binding, chunks: list[int], stream: Stream) -> list[Run]:
        layout = binding.layout
        units = sorted({layout.chunk_unit[chunk] for chunk in chunks})
        budget = min(stream.window, self._policy.run)
        if not budget:
            assert binding.source is not None
            gauge = self._pipeline.gauge(binding.source.name)
            budget = self._policy.random(gauge.latency_s, gauge.bytes_per_s)
        needed = list(plan.runs(layout, units, self._policy))
        last = plan.widen(layout, list(needed[-1].units), self.wanted(target, binding), budget)
        return needed[:-1] + list(plan.runs(layout, last, self._policy))

    def wanted(self, target: Target, binding: Binding) -> Callable[[int], bool]:
        """Whether a unit has a chunk that *binding* states and that is neither present nor under way."""
        layout, present, landings = binding.layout, target.blob.map.present, target.landings

        def is_wanted(unit: int) -> bool:
            return any(
                layout.stated[chunk] and not present[chunk] and chunk not in landings
                for chunk in layout.chunks_of(unit)
            )

        return is_wanted

    def launch(
        self, target: Target, binding: Binding, run: Run, *, background: bool, yields: bool = False
    ) -> Flight:
        """Start fetching *run*.

        Args:
            background: Nobody waits for it.
            yields: And nobody is expected to soon.

        Raises:
            ErofsdError: `FillProvider.run` does not run: the daemon stops.
        """
        if self._group is None:
            raise ErofsdError("nothing is fetched any more: the daemon stops")
        flight = Flight(binding, run, background=background, yields=yields)
        blob, layout = target.blob, binding.layout
        chunks = [
            chunk
            for unit in run.units
            for chunk in layout.chunks_of(unit)
            if not blob.map.present[chunk]
            and chunk not in target.landings
            and (layout.stated[chunk] or any(tally.layout.stated[chunk] for tally in blob.tallies))
        ]
        target.landings.expect(flight, chunks)
        flight.task = self._group.create_task(self._pipeline.fly(target, flight))
        # A task that is cancelled before its first step never settles what it owes.
        flight.task.add_done_callback(
            lambda _: (
                target.landings.settle(flight, chunks, GivenUp("never begun")) if not flight.begun else None
            )
        )
        return flight

    def _fetch_ahead(self, target: _Object, stream: Stream, chunk: int) -> None:
        """Keep the window of *stream*, which has just read *chunk*, filled or being filled."""
        if self._group is None or time.monotonic() < target.shy_until:
            return
        binding = self._choose(target, chunk, {})
        if binding is None:
            return
        units = plan.ahead(binding.layout, stream, self._policy)
        if not units:
            return
        wanted = self.wanted(target, binding)
        for run in plan.runs(binding.layout, filter(wanted, units), self._policy):
            flight = self.launch(target, binding, run, background=True)
            flight.on_failed = lambda: self._be_shy(target)

    def _distrust(self, target: _Object, chunks: range) -> None:
        """A reader waited until its deadline: what the source brings unasked must not delay the next one."""
        sources = {id(b.source) for b in target.blob.bindings if chunks and b.layout.stated[chunks.start]}
        for other in self._by_blob.values():
            for flight in other.landings.flights():
                unasked = flight.background and not (flight.yields or flight.readers)
                if unasked and id(flight.binding.source) in sources:
                    flight.cancel()
                    self._be_shy(other)

    @staticmethod
    def _be_shy(target: _Object) -> None:
        target.shy_until = time.monotonic() + SHY_S

    # -- what readers and logs hear ---------------------------------------------------------------------

    @staticmethod
    def _named(target: _Object, chunks: range, problem: str) -> str:
        """*problem* with all that somebody needs to find the culprit: image, blob, chunk, source."""
        binding = next(
            (b for b in target.blob.bindings if chunks and b.layout.stated[chunks.start]), None
        ) or next(iter(target.blob.bindings), None)
        if binding is None:
            return f"{target.blob.name}: {problem}"
        blob_id = binding.layout.blob_id
        if f"blob {blob_id} chunk" not in problem:
            source = binding.source.name if binding.source is not None else "no source"
            problem = f"{binding.image}: blob {blob_id} chunk {chunks.start} from {source}: {problem}"
        last = getattr(binding.source, "health", None)
        if last is not None and last.consecutive_failures and last.last_error not in problem:
            problem += f"; the source's last word: {last.last_error}"
        return problem

    def _fill_error(self, target: _Object, chunks: range, exc: Exception) -> FillError:
        """What the reader hears. It is EIO for whatever reason; the log says which."""
        stating = [b for b in target.blob.bindings if chunks and b.layout.stated[chunks.start]]
        where = {
            "image": ", ".join(sorted({binding.image for binding in stating})[:3]),
            "blob_id": target.blob.name,
            "chunk_index": chunks.start,
            "backend": ", ".join(sorted({b.source.name for b in stating if b.source is not None})[:3]),
        }
        match exc:
            case Unstated():
                return NobodyReads(str(exc))
            case CacheFull():
                now = time.monotonic()
                if now - self._full_logged_at >= SAME_ERROR_S:
                    self._full_logged_at = now
                    log.error("cache.full", **where, error=str(exc), hint=exc.hint)
            case BlobCorrupt():
                log.error("chunk.corrupt", **where, error=str(exc))
            case ErofsdError():
                log.error("fill.failed", **where, error=str(exc))
            case _:
                log.error("fill.crashed", **where, exc_info=exc)
        return FillError(f"{target.blob.name}: {exc}")

    def _count(
        self, target: _Object, chunks: range, want: Range, at: float, elapsed_s: float, error: str
    ) -> None:
        if not chunks:
            return
        first = chunks.start
        for image, binding in {binding.image: binding for binding in target.blob.bindings}.items():
            if not any(binding.layout.stated[chunk] for chunk in (first, chunks.stop - 1)):
                continue
            seen = self.statistics(image)
            source = binding.source.name if binding.source is not None else ""
            seen.waits += 1
            seen.wait_s += elapsed_s
            if error:
                seen.errors += 1
                seen.last_error = error
            wait = Wait(image, target.blob.name, want.start, len(want), at, elapsed_s, source, error)
            seen.recent.append(wait)
        log.debug(
            "fill.done",
            blob_id=target.blob.name,
            offset=want.start,
            length=len(want),
            error=error,
            elapsed_ms=elapsed_s * 1e3,
        )

    # -- durability -------------------------------------------------------------------------------------

    def _landed(self, blob: StoredBlob) -> None:
        self._to_flush.add(blob)
        if blob.complete:
            self._flush_soon.set()

    async def _keep_flushing(self) -> None:
        while True:
            try:
                async with asyncio.timeout(FLUSH_INTERVAL_S):
                    await self._flush_soon.wait()
            except TimeoutError:
                pass
            self._flush_soon.clear()
            blobs, self._to_flush = self._to_flush, set()
            for blob in blobs:
                await self._flush(blob)

    async def _flush(self, blob: StoredBlob) -> None:
        try:
            await blob.flush()
        except OSError as exc:
            log.error("flush.failed", blob_id=blob.name, error=str(exc))
            return
        if blob.complete and blob.map.is_durable and blob in self._by_blob:
            log.info("blob.filled", blob_id=blob.name)
            self.on_complete(blob)
