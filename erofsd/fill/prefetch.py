"""Fills nobody waits for yet: whole images, or chunks that a file list or a trace names.

Runs on what readers leave over: a request is started when no reader waits, those under way take a trickle
while one does (`erofsd.fill.pipeline`), and there are never more than ``REQUESTS`` of them for one prefetch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from erofsd.blobs.store import Binding
from erofsd.errors import BlobCorrupt, ErofsdError
from erofsd.fill import plan
from erofsd.fill.flight import Flight, GivenUp, Landing, wait_landed
from erofsd.fill.pipeline import Pipeline, Target
from erofsd.fill.plan import Policy, Run

REQUESTS = 4
PATIENCE_S = 0.5  # a new request waits so long for a moment without waiting readers; then it trickles
LOOKS_MAX = 4

Progress = Callable[[int, int], None]


class Launcher(Protocol):
    """What a prefetch needs of `erofsd.fill.provider.FillProvider`."""

    def launch(
        self, target: Target, binding: Binding, run: Run, *, background: bool, yields: bool
    ) -> Flight: ...

    def wanted(self, target: Target, binding: Binding) -> Callable[[int], bool]: ...


async def fetch_all(
    launcher: Launcher,
    pipeline: Pipeline,
    target: Target,
    binding: Binding,
    policy: Policy,
    chunks: Iterable[int] | None,
    progress: Progress | None,
) -> None:
    """Fill *chunks* of *binding*; None means all that it states. See `FillProvider.prefetch`."""
    prefetch = _Prefetch(launcher, pipeline, target, binding, policy, chunks, progress)
    for _ in range(LOOKS_MAX):
        units = prefetch.missing_units()
        prefetch.report()
        if not units:
            break
        await prefetch.fetch(units)
    else:
        if prefetch.missing_units():
            raise ErofsdError(f"{target.blob.name}: what was fetched was taken away {LOOKS_MAX} times")
    if prefetch.corrupt is not None:
        raise prefetch.corrupt


class _Prefetch:
    """One call of `fetch_all`."""

    def __init__(
        self,
        launcher: Launcher,
        pipeline: Pipeline,
        target: Target,
        binding: Binding,
        policy: Policy,
        chunks: Iterable[int] | None,
        progress: Progress | None,
    ) -> None:
        self._launcher = launcher
        self._pipeline = pipeline
        self._target = target
        self._binding = binding
        self._policy = policy
        self._chunks = None if chunks is None else sorted({c for c in chunks if binding.layout.stated[c]})
        self._refused: set[int] = set()
        self._progress = progress
        self._left = 0  # stored bytes
        self._total = self._bytes_of(
            range(binding.layout.chunk_count) if chunks is None else self._chunks or ()
        )
        self.corrupt: BlobCorrupt | None = None

    def _bytes_of(self, chunks: Iterable[int]) -> int:
        layout = self._binding.layout
        return sum(
            layout.unit_stored[unit] for unit in {layout.chunk_unit[c] for c in chunks if layout.stated[c]}
        )

    def _missing(self) -> list[int]:
        if self._chunks is None:
            return list(self._binding.missing())
        present = self._target.blob.map.present
        return [chunk for chunk in self._chunks if not present[chunk]]

    def report(self) -> None:
        """Tell how far it is."""
        if self._progress is not None:
            self._progress(self._total - self._left, self._total)

    def missing_units(self) -> list[int]:
        """Units to fetch; those that were refused are not asked for again."""
        missing = self._missing()
        layout = self._binding.layout
        self._left = self._bytes_of(missing)
        return sorted({layout.chunk_unit[chunk] for chunk in missing if chunk not in self._refused})

    async def fetch(self, units: list[int]) -> None:
        """Fetch *units*, each once; what is given up meanwhile is left for another look.

        Raises:
            ErofsdError: A source or the disk failed: the rest would fail as well.
        """
        requests = plan.runs(self._binding.layout, units, self._policy)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(REQUESTS):
                    group.create_task(self._work(requests))
        except ExceptionGroup as failed:
            # The first failure has cancelled the others; what is no error of ours is a bug, and shown whole.
            error = failed.exceptions[0]
            raise error if isinstance(error, ErofsdError) else failed from None

    async def _work(self, requests: Iterator[Run]) -> None:
        for run in requests:  # shared: each run is taken by one of us
            await self._pipeline.wait_calm(PATIENCE_S)
            landings = self._landings(run)
            await wait_landed(landings, reader=False)
            for landing in landings:
                self._judge(landing)
            still = self._launcher.wanted(self._target, self._binding)
            self._left -= sum(self._binding.layout.unit_stored[u] for u in run.units if not still(u))
            self.report()

    def _landings(self, run: Run) -> list[Landing]:
        target, layout = self._target, self._binding.layout
        wanted = self._launcher.wanted(target, self._binding)
        for part in plan.runs(layout, filter(wanted, run.units), self._policy):
            self._launcher.launch(target, self._binding, part, background=True, yields=True)
        found = (target.landings.get(chunk) for unit in run.units for chunk in layout.chunks_of(unit))
        return [landing for landing in found if landing is not None and layout.stated[landing.chunk]]

    def _judge(self, landing: Landing) -> None:
        match landing.done.result():
            case None | GivenUp():
                pass
            case BlobCorrupt() as error:
                self._refused.add(landing.chunk)
                self.corrupt = self.corrupt or error
            case Exception() as error:
                raise error
