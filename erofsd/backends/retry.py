"""Tries again where that may help: the one place for retries and for a source's health."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from time import monotonic
from typing import TypeVar

import structlog

from erofsd.backends.measured import BackendWrapper, MeasuredBackend, streaming
from erofsd.errors import BackendTemporary, ErofsdError
from ondemand.ranges import Range

BACKOFF_S = 0.1
BACKOFF_MAX_S = 6.0
# An answer that brought at least this much before it broke off counts as a success.
PROGRESS_SIZE = 64 << 10

T = TypeVar("T")
log = structlog.get_logger()


@dataclass(slots=True)
class Health:
    """How a source has been doing, for ``ls`` and metrics.

    Attributes:
        consecutive_failures: Tries that failed since the last success.
        failures: Tries that failed, ever.
        last_error: Text of the last failure; empty if there was none.
        failed_at: ``monotonic()`` of it.
    """

    consecutive_failures: int = 0
    failures: int = 0
    last_error: str = ""
    failed_at: float = 0.0

    def succeeded(self) -> None:
        """A request got its answer."""
        self.consecutive_failures = 0

    def failed(self, exc: ErofsdError) -> None:
        """A request did not."""
        self.consecutive_failures += 1
        self.failures += 1
        self.last_error = str(exc)
        self.failed_at = monotonic()


def pause_s(exc: BackendTemporary, attempt: int, backoff_s: float = BACKOFF_S) -> float:
    """Seconds to wait after try number *attempt* failed with *exc*."""
    # Half of it random, so that readers whom one fault has struck do not come back as one.
    delay_s: float = min(backoff_s * 2 ** (attempt - 1), BACKOFF_MAX_S) * random.uniform(0.5, 1.0)
    return delay_s if exc.retry_after_s is None else max(delay_s, exc.retry_after_s)


class RetryBackend(BackendWrapper):
    """Repeats what failed with BackendTemporary, later and later; nothing else is worth another try.

    A stream goes on at the byte that arrived last. When to stop waiting is the caller's business: it cancels.

    Args:
        attempts: Tries in a row without progress, the first included.
    """

    def __init__(self, inner: MeasuredBackend, attempts: int, *, backoff_s: float = BACKOFF_S) -> None:
        super().__init__(inner)
        self.attempts = attempts
        self.health = Health()
        self._backoff_s = backoff_s

    async def size(self, blob_id: str) -> int:
        """See Backend."""
        return await self.call(lambda: self.inner.size(blob_id))

    async def call(self, request: Callable[[], Awaitable[T]]) -> T:
        """The result of *request*, which is called again as the policy says.

        Raises:
            As *request* the last time.
        """
        attempt = 1
        while True:
            try:
                result = await request()
            except BackendTemporary as exc:
                await self._back_off(exc, attempt)
                attempt += 1
            except ErofsdError as exc:
                self.health.failed(exc)
                raise
            else:
                self.health.succeeded()
                return result

    async def stream(self, blob_id: str, want: Range) -> AsyncIterator[bytes]:
        """See Backend."""
        at = want.start
        attempt = 1
        while True:
            began_at = at
            try:
                async with streaming(self.inner, blob_id, Range(at, want.stop)) as pieces:
                    async for piece in pieces:
                        at += len(piece)
                        yield piece
            except BackendTemporary as exc:
                if at - began_at >= PROGRESS_SIZE:
                    attempt = 1
                await self._back_off(exc, attempt, blob_id=blob_id, offset=at)
                attempt += 1
            except ErofsdError as exc:
                self.health.failed(exc)
                raise
            else:
                self.health.succeeded()
                return

    async def _back_off(self, exc: BackendTemporary, attempt: int, **where: object) -> None:
        """Wait before the next try, or raise *exc* if there is none."""
        self.health.failed(exc)
        if attempt >= self.attempts:
            raise exc
        delay_s = pause_s(exc, attempt, self._backoff_s)
        log.info("fetch.retried", backend=self.name, attempt=attempt, reason=str(exc), **where)
        await asyncio.sleep(delay_s)
