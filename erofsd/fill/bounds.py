"""Bounds that all flights share: memory and threads. Readers first in both."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import structlog

from erofsd.fill.flight import Flight
from erofsd.fill.work import Job

log = structlog.get_logger("erofsd.fill")


class Budget:
    """Bytes that flights may hold, readers first.

    Args:
        limit: For all together; the background may use half. A flight that is larger goes alone.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._urgent: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._background: deque[tuple[int, asyncio.Future[None]]] = deque()

    def _fits(self, size: int, limit: int) -> bool:
        return self._used + size <= limit or not self._used

    @asynccontextmanager
    async def held(self, flight: Flight, size: int) -> AsyncIterator[None]:
        """Wait for *size* bytes, have them, give them back."""
        await self._take(flight, size)
        try:
            yield
        finally:
            self._used -= size
            self._wake()

    async def _take(self, flight: Flight, size: int) -> None:
        queue = self._urgent if flight.urgent else self._background
        if (
            not self._urgent
            and not queue
            and self._fits(size, self._limit if flight.urgent else self._limit // 2)
        ):
            self._used += size
            return
        entry = (size, asyncio.get_running_loop().create_future())
        queue.append(entry)

        def hurry() -> None:
            if entry in self._background:
                self._background.remove(entry)
                self._urgent.append(entry)
                self._wake()

        flight.on_urgent = hurry
        try:
            await entry[1]
        except asyncio.CancelledError:
            if entry[1].done() and not entry[1].cancelled():
                self._used -= size  # it was ours already
            for waiting in (self._urgent, self._background):
                if entry in waiting:
                    waiting.remove(entry)
            self._wake()
            raise

    def _wake(self) -> None:
        for queue, limit in ((self._urgent, self._limit), (self._background, self._limit // 2)):
            while queue:
                size, granted = queue[0]
                if not self._fits(size, limit):
                    return
                queue.popleft()
                if not granted.done():
                    self._used += size
                    granted.set_result(None)


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
