"""A source that is farther away than it is: for tests, and to see in the field what distance would do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from time import monotonic

from erofsd.backends.measured import BackendWrapper, MeasuredBackend, streaming
from ondemand.ranges import Range


class SlowBackend(BackendWrapper):
    """Delays every answer, and shares a bandwidth among all of them. Both may be changed at any time.

    Attributes:
        latency_s: From request to first byte, on top of what *inner* takes.
        bytes_per_s: Of all streams together; None: as fast as *inner*.
    """

    def __init__(
        self, inner: MeasuredBackend, *, latency_s: float = 0.0, bytes_per_s: float | None = None
    ) -> None:
        super().__init__(inner)
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self._free_at = 0.0  # when the line has sent all it was given

    async def size(self, blob_id: str) -> int:
        """See Backend."""
        await asyncio.sleep(self.latency_s)
        return await self.inner.size(blob_id)

    async def stream(self, blob_id: str, want: Range) -> AsyncIterator[bytes]:
        """See Backend."""
        await asyncio.sleep(self.latency_s)
        async with streaming(self.inner, blob_id, want) as pieces:
            async for piece in pieces:
                if self.bytes_per_s is not None:
                    now = monotonic()
                    self._free_at = max(self._free_at, now) + len(piece) / self.bytes_per_s
                    await asyncio.sleep(self._free_at - now)
                yield piece
