"""Blobs read straight from their sources: decoded, verified, kept nowhere. For verbs without a daemon."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from erofsd.backends.base import Backend
from erofsd.backends.measured import streaming
from erofsd.blobs.layout import BlobLayout, decoded_bytes
from erofsd.blobs.units import decode_unit, verify_chunk
from erofsd.errors import BlobCorrupt, ImageRefused
from ondemand.ranges import Range

RUN_SIZE = 4 << 20
RUN_UNITS_MAX = 4096
RUNS_AT_ONCE = 4
GAP_MAX = 64 << 10
"""Bytes between two wanted units that are fetched rather than asked around."""
CACHE_SIZE = 64 << 20

Tell = Callable[[int], None]
"""Hears how many stored bytes are done."""


@dataclass(frozen=True, slots=True)
class Run:
    """Units that one range request brings.

    Attributes:
        want: Stored bytes.
    """

    want: Range
    units: tuple[int, ...]


def stated_units(layout: BlobLayout) -> list[int]:
    """The units that hold a chunk which the image states."""
    return sorted({layout.chunk_unit[chunk] for chunk, stated in enumerate(layout.stated) if stated})


def runs_of(layout: BlobLayout, units: list[int]) -> Iterator[Run]:
    """*units* in requests of about `RUN_SIZE`, in the order in which they are stored."""
    start = stop = 0
    members: list[int] = []
    for unit in sorted(units, key=lambda u: layout.unit_offset[u]):
        begin = layout.unit_offset[unit]
        end = begin + layout.unit_stored[unit]
        if members and (begin > stop + GAP_MAX or end - start > RUN_SIZE):
            yield Run(Range(start, stop), tuple(members))
            members = []
        if not members:
            start = stop = begin
        members.append(unit)
        stop = max(stop, end)
    if members:
        yield Run(Range(start, stop), tuple(members))


def name_chunk(layout: BlobLayout, chunk: int, backend: Backend) -> str:
    """How errors name a chunk."""
    unit = layout.chunk_unit[chunk]
    at = f"stored at {layout.unit_offset[unit]}, {layout.unit_stored[unit]} bytes"
    return f"{backend.name}: blob {layout.blob_id}: chunk {chunk} ({at})"


def faults_in_unit(layout: BlobLayout, unit: int, stored: memoryview, backend: Backend) -> list[str]:
    """What is wrong with the stated chunks of *unit*, one text a chunk."""
    chunks = [chunk for chunk in layout.chunks_of(unit) if layout.stated[chunk]]
    try:
        decoded = decode_unit(layout, unit, stored)
    except ImageRefused as exc:
        return [f"{name_chunk(layout, chunk, backend)}: {exc}" for chunk in chunks]
    faults = []
    for chunk in chunks:
        try:
            verify_chunk(layout, chunk, decoded)
        except ImageRefused as exc:
            faults.append(f"{name_chunk(layout, chunk, backend)}: {exc}")
    return faults


async def fetch(backend: Backend, blob_id: str, want: Range) -> bytes:
    """All bytes of *want*.

    Raises:
        SourceError, BlobCorrupt: As the backend's ``stream`` does.
    """
    buffer = bytearray()
    async with streaming(backend, blob_id, want) as pieces:
        async for piece in pieces:
            buffer += piece
    return bytes(buffer)


async def verify_blob(layout: BlobLayout, backend: Backend, faults: list[str], tell: Tell) -> int:
    """Fetch, decode and verify every chunk that the image states; returns their number.

    Args:
        faults: Takes a text for each chunk that is not what the image states.

    Raises:
        SourceError: The source fails; what is wrong with the data is no error here.
    """
    runs = runs_of(layout, stated_units(layout))  # shared: each worker takes the next one

    async def work() -> None:
        for run in runs:
            data = memoryview(await fetch(backend, layout.blob_id, run.want))
            faults.extend(await asyncio.to_thread(_verify_run, layout, run, data, backend))
            tell(sum(layout.unit_stored[unit] for unit in run.units))

    async with asyncio.TaskGroup() as group:
        for _ in range(RUNS_AT_ONCE):
            group.create_task(work())
    return sum(map(bool, layout.stated))


async def verify_pin(layout: BlobLayout, backend: Backend, faults: list[str], tell: Tell) -> int:
    """Fetch all of a blob without chunk digests; compare it with the digest it is pinned by, if it is one.

    Raises:
        SourceError: As for `verify_blob`.
    """
    stated = re.match(r"sha256:([0-9a-f]{64})\b", layout.pin)
    hasher = hashlib.sha256()
    try:
        async with streaming(backend, layout.blob_id, Range(0, layout.stored_size)) as pieces:
            async for piece in pieces:
                hasher.update(piece)
                tell(len(piece))
    except BlobCorrupt as exc:
        faults.append(str(exc))
        return layout.chunk_count
    if stated and stated[1] != hasher.hexdigest():
        name = f"{backend.name}: blob {layout.blob_id}"
        faults.append(f"{name}: sha256 is {hasher.hexdigest()}, the manifest says {stated[1]}")
    return layout.chunk_count


def _verify_run(layout: BlobLayout, run: Run, data: memoryview, backend: Backend) -> list[str]:
    faults = []
    for unit in run.units:
        at = layout.unit_offset[unit] - run.want.start
        faults += faults_in_unit(layout, unit, data[at : at + layout.unit_stored[unit]], backend)
    return faults


class DecodedBlob:
    """Random access to a blob as the kernel sees it. Blocking: for a thread beside the event loop.

    Args:
        loop: Runs the backend.
    """

    def __init__(self, layout: BlobLayout, backend: Backend, loop: asyncio.AbstractEventLoop) -> None:
        self._layout = layout
        self._backend = backend
        self._loop = loop
        self._order = sorted(stated_units(layout), key=lambda unit: layout.unit_offset[unit])
        self._place = {unit: place for place, unit in enumerate(self._order)}
        self._stored: dict[int, memoryview] = {}  # of the newest run, units that were not asked for yet
        self._units: OrderedDict[int, memoryview] = OrderedDict()
        self._cached = 0

    def read(self, want: Range) -> bytes:
        """The decoded bytes of *want*; zeros between chunks.

        Raises:
            CorruptImage: *want* reaches past the blob's end, or touches a chunk that is not stated.
            BlobCorrupt, SourceError: The data cannot be had.
        """
        return decoded_bytes(self._layout, want, self._unit)

    def _unit(self, unit: int) -> memoryview:
        if (decoded := self._units.get(unit)) is not None:
            self._units.move_to_end(unit)
            return decoded
        layout = self._layout
        if unit not in self._stored:
            self._fetch_from(unit)
        stored = self._stored.pop(unit)
        chunks = [chunk for chunk in layout.chunks_of(unit) if layout.stated[chunk]]
        try:
            decoded = decode_unit(layout, unit, stored)
            for chunk in chunks:
                verify_chunk(layout, chunk, decoded)
        except ImageRefused as exc:
            raise BlobCorrupt(f"{name_chunk(layout, chunks[0], self._backend)}: {exc}") from exc
        self._keep(unit, decoded)
        return decoded

    def _fetch_from(self, unit: int) -> None:
        # Files lie in blobs in about the order in which they are read: those behind it are wanted next.
        layout = self._layout
        place = self._place[unit]
        run = next(runs_of(layout, self._order[place : place + RUN_UNITS_MAX]))
        coming = asyncio.run_coroutine_threadsafe(fetch(self._backend, layout.blob_id, run.want), self._loop)
        data = memoryview(coming.result())
        self._stored = {}
        for member in run.units:
            at = layout.unit_offset[member] - run.want.start
            self._stored[member] = data[at : at + layout.unit_stored[member]]

    def _keep(self, unit: int, decoded: memoryview) -> None:
        self._units[unit] = decoded
        self._cached += len(decoded)
        while self._cached > CACHE_SIZE and len(self._units) > 1:
            self._cached -= len(self._units.popitem(last=False)[1])
