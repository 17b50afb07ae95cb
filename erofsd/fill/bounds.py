"""Bounds that all flights share: memory and threads. Readers first in both."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum, auto

import structlog

from erofsd.fill.flight import SILENT_S, Flight
from erofsd.fill.work import Job

COMMITTED = 4

log = structlog.get_logger("erofsd.fill")


@dataclass(slots=True, eq=False)
class _Waiting:
    """A flight that wants memory."""

    flight: Flight
    size: int
    granted: asyncio.Future[None]


class Budget:
    """Bytes that flights may hold, readers first.

    A source that has fallen silent holds up its own flights, not those of others: what they hold does not
    count for others, who have nearly all of it for themselves. So that not everything comes at once in the
    end, all together never hold more than ``COMMITTED`` times the limit.

    Args:
        limit: For all together; the background may use half. A flight that is larger goes alone.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[Flight, int] = {}
        self._urgent: deque[_Waiting] = deque()
        self._background: deque[_Waiting] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def held(self, flight: Flight, size: int) -> AsyncIterator[None]:
        """Wait for *size* bytes, have them, give them back."""
        try:
            await self._take(flight, size)
            yield
        finally:
            self._held.pop(flight, None)
            self._wake()

    async def _take(self, flight: Flight, size: int) -> None:
        waiting = _Waiting(flight, size, asyncio.get_running_loop().create_future())
        (self._urgent if flight.urgent else self._background).append(waiting)

        def hurry() -> None:
            if waiting in self._background:
                self._background.remove(waiting)
                self._urgent.append(waiting)
                self._wake()

        flight.on_urgent = hurry
        self._wake()
        try:
            await waiting.granted
        finally:
            for queue in (self._urgent, self._background):
                if waiting in queue:
                    queue.remove(waiting)

    def _wake(self) -> None:
        if self._grant(self._urgent, self._limit):
            self._grant(self._background, self._limit // 2)
        if self._timer is None and (self._urgent or self._background):
            self._timer = asyncio.get_running_loop().call_later(SILENT_S / 2, self._look_again)

    def _grant(self, queue: deque[_Waiting], limit: int) -> bool:
        """Give to those in *queue* what there is; False if one of them has to wait for others."""
        for waiting in list(queue):
            room = self._room(waiting, limit)
            if room is _Room.TAKEN:
                return False  # those behind it must not overtake it for ever
            if room is _Room.THERE:
                queue.remove(waiting)
                self._held[waiting.flight] = waiting.size
                waiting.granted.set_result(None)
        return True

    def _look_again(self) -> None:
        self._timer = None
        self._wake()

    def _room(self, waiting: _Waiting, limit: int) -> _Room:
        source = waiting.flight.source
        own = sum(size for flight, size in self._held.items() if flight.source is source)
        others = sum(
            size
            for flight, size in self._held.items()
            if flight.source is not source and not flight.is_silent
        )
        if own and own + waiting.size > limit:
            return _Room.OWN_FAULT
        if own + others and own + others + waiting.size > limit:
            return _Room.TAKEN
        committed = sum(self._held.values())
        if committed and committed + waiting.size > COMMITTED * self._limit:
            return _Room.TAKEN
        return _Room.THERE


class _Room(Enum):
    THERE = auto()
    TAKEN = auto()
    OWN_FAULT = auto()  # its own source has taken all that one may


class Threads:
    """Runs jobs, readers' before others'.

    Args:
        count: Threads.
    """

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="fill")
        self._limit = count + 1  # the next job must not wait for the loop to come round
        self._running = 0
        self._urgent: deque[tuple[Job, Callable[[], None]]] = deque()
        self._background: deque[tuple[Job, Callable[[], None]]] = deque()
        self._closed = False

    def submit(self, job: Job, done: Callable[[], None], *, urgent: bool) -> None:
        """Run *job* in a thread, then *done* on the loop. *done* is called in any case."""
        (self._urgent if urgent else self._background).append((job, done))
        self._dispatch()

    def _dispatch(self) -> None:
        if self._closed:
            for _, done in [*self._urgent, *self._background]:
                done()
            self._urgent.clear()
            self._background.clear()
        while self._running < self._limit and (queue := self._urgent or self._background):
            job, done = queue.popleft()
            self._running += 1
            future = asyncio.get_running_loop().run_in_executor(self._pool, job.run)
            future.add_done_callback(lambda future, done=done: self._finished(future, done))  # type: ignore[misc]

    def _finished(self, future: asyncio.Future[None], done: Callable[[], None]) -> None:
        self._running -= 1
        self._dispatch()
        if not future.cancelled() and (exc := future.exception()) is not None:
            log.error("job.crashed", exc_info=exc)
        done()

    def close(self) -> None:
        """Let running jobs end, give up the others; blocks for as long as the longest takes."""
        self._closed = True
        self._dispatch()
        self._pool.shutdown(wait=True, cancel_futures=False)
