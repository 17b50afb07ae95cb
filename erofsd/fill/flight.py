"""One fetch for each chunk, however many wait for it.

Theory of operation. A **flight** is one range request under way and the chunks it will bring. Each chunk that
somebody fetches has exactly one **landing**, in the table of its blob, from the moment the flight is planned
until the chunk is there, has failed or was given up. All three happen on the event loop's thread:

- *there*: the chunk is marked present, its landing is taken out of the table and resolved, in one step;
- *failed*: the landing is resolved with the error; the next read starts a flight of its own;
- *given up*: the flight was cancelled; those who still wait look again, and start another.

A landing's future is never cancelled by those who wait for it, so one impatient reader cancels its own wait
and nothing else. But a source that hangs must not keep the next reader hanging: the last reader that gives up
cancels the flight, and so does one that has waited for long and seen nothing of it arrive, on behalf of all
others. A flight of the background goes on without readers, unless one has waited for it until its deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from erofsd.backends.base import Backend
from erofsd.blobs.store import Binding
from erofsd.errors import ErofsdError
from erofsd.fill.plan import Run

SLOW_BYTES_PER_S = 16 << 10  # stored; a flight that does worse for ``LONG_S`` had better begin again
SILENT_S = 0.5
LONG_S = 5.0  # a flight that brings nothing for so long to a reader that then gives up is not worth joining


class GivenUp(ErofsdError):
    """The flight ended before the chunk; worth another look."""


class Flight:
    """One range request and what it brings.

    Attributes:
        background: Nobody waited for it when it was started.
        yields: It lets readers' flights go first while any reader waits.
        urgent: A reader waits for it, or did.
        readers: How many wait for one of its chunks now.
        progress: Grows with everything that arrives and every chunk that lands.
        began_at: When its request was sent; None before that. Monotonic seconds.
        moved_at: When something arrived last; at first, when its request was sent.
        received: Stored bytes that have arrived.
        begun: Its task has made its first step, and settles its landings from now on.
    """

    def __init__(self, binding: Binding, run: Run, *, background: bool, yields: bool = False) -> None:
        self.binding = binding
        self.run = run
        self.background = background
        self.yields = yields
        self.urgent = not background
        self.readers = 0
        self.progress = 0
        self.began_at: float | None = None
        self.moved_at = 0.0
        self.received = 0
        self.begun = False
        self.task: asyncio.Task[None] | None = None
        self.on_urgent: Callable[[], None] | None = None
        self.on_failed: Callable[[], None] | None = None

    def join(self) -> None:
        """A reader begins to wait."""
        self.readers += 1
        if not self.urgent:
            self.urgent = True
            if self.on_urgent is not None:
                self.on_urgent()

    @property
    def source(self) -> Backend | None:
        """Where it fetches from."""
        return self.binding.source

    @property
    def is_silent(self) -> bool:
        """True if its source has sent nothing for a while."""
        return self.began_at is not None and time.monotonic() - self.moved_at >= SILENT_S

    @property
    def is_stuck(self) -> bool:
        """True if nobody waits for it and it has brought nothing, or next to nothing, for long."""
        if self.readers or self.began_at is None:
            return False
        now = time.monotonic()
        age_s = now - self.began_at
        return now - self.moved_at >= LONG_S or (age_s >= LONG_S and self.received < SLOW_BYTES_PER_S * age_s)

    def give_up(self, *, in_vain: bool, waited_s: float) -> None:
        """A reader that waited for it was cancelled.

        Args:
            in_vain: Nothing arrived in the meantime.
        """
        if not self.readers or (in_vain and waited_s >= LONG_S):
            self.cancel()

    def cancel(self) -> None:
        """End it; its landings are given up."""
        if self.task is not None:
            self.task.cancel()


@dataclass(slots=True, eq=False)
class Landing:
    """One chunk under way.

    Attributes:
        done: Its result is None, or the error: a result, so that nobody has to collect it.
    """

    chunk: int
    flight: Flight
    done: asyncio.Future[Exception | None]


class Landings:
    """All chunks of one blob that are under way."""

    def __init__(self) -> None:
        self._by_chunk: dict[int, Landing] = {}

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._by_chunk

    def __len__(self) -> int:
        return len(self._by_chunk)

    def get(self, chunk: int) -> Landing | None:
        """The landing of *chunk*, if it is under way."""
        return self._by_chunk.get(chunk)

    def flights(self) -> set[Flight]:
        """Every flight that has not landed everything."""
        return {landing.flight for landing in self._by_chunk.values()}

    def expect(self, flight: Flight, chunks: Iterable[int]) -> None:
        """*flight* will bring *chunks*; none of them is under way yet."""
        loop = asyncio.get_running_loop()
        for chunk in chunks:
            self._by_chunk[chunk] = Landing(chunk, flight, loop.create_future())

    def settle(self, flight: Flight, chunks: Iterable[int], error: Exception | None) -> None:
        """*chunks* of *flight* are there, or have failed. Chunks settled before are passed over."""
        flight.progress += 1
        for chunk in chunks:
            landing = self._by_chunk.get(chunk)
            if landing is not None and landing.flight is flight:
                del self._by_chunk[chunk]
                landing.done.set_result(error)


async def wait_landed(landings: Sequence[Landing], *, reader: bool) -> None:
    """Wait until all *landings* are settled. Cancelling it cancels this wait only.

    Args:
        reader: A reader waits for them; else nobody is in a hurry.
    """
    began = time.monotonic()
    flights = {landing.flight: landing.flight.progress for landing in landings} if reader else {}
    for flight in flights:
        flight.join()
    gave_up = True
    try:
        pending = [landing.done for landing in landings if not landing.done.done()]
        if pending:
            await asyncio.wait(pending)
        gave_up = False
    finally:
        for flight, progress in flights.items():
            flight.readers -= 1
            if gave_up:
                flight.give_up(in_vain=flight.progress == progress, waited_s=time.monotonic() - began)
