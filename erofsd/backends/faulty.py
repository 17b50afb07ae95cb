"""A source that fails as it is told to: for tests, and to see in the field what a fault would do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from erofsd.backends.measured import BackendWrapper, MeasuredBackend, streaming
from erofsd.errors import BackendDenied, BackendTemporary, BlobNotFound
from ondemand.ranges import Range


class Fault(Enum):
    """What goes wrong with a stream."""

    FLIP = "flip"  # one bit is wrong; nobody notices here
    TRUNCATE = "truncate"  # the body ends early
    RESET = "reset"  # the connection breaks
    HANG = "hang"  # silence, until the caller gives up
    HTML = "html"  # a page for humans instead of data
    DENIED = "denied"  # 401
    MISSING = "missing"  # 404
    BROKEN = "broken"  # 500
    BUSY = "busy"  # 429 with Retry-After: 0


@dataclass(slots=True)
class Plan:
    """When *fault* strikes.

    Attributes:
        after: Bytes of the stream that arrive before it; for FLIP the position of the bad byte.
        times: Streams that it strikes; None: all from now on.
        applies: Strikes only requests for which this is true.
    """

    fault: Fault
    after: int = 0
    times: int | None = 1
    applies: Callable[[str, Range], bool] = lambda _blob_id, _want: True


class FaultyBackend(BackendWrapper):
    """Does what the first applicable Plan in ``plans`` says, which may be changed at any time."""

    def __init__(self, inner: MeasuredBackend) -> None:
        super().__init__(inner)
        self.plans: list[Plan] = []
        self.struck = 0

    def fail(self, fault: Fault, *, after: int = 0, times: int | None = 1) -> None:
        """Add a plan that applies to every request."""
        self.plans.append(Plan(fault, after, times))

    def heal(self) -> None:
        """Drop all plans."""
        self.plans.clear()

    async def size(self, blob_id: str) -> int:
        """See Backend. Only refusals strike here."""
        plan = self._next(blob_id, Range(0, 0))
        if plan is not None:
            await _strike(plan.fault, blob_id)
        return await self.inner.size(blob_id)

    async def stream(self, blob_id: str, want: Range) -> AsyncIterator[bytes]:
        """See Backend."""
        plan = self._next(blob_id, want)
        at = 0
        if plan is not None and plan.after == 0 and plan.fault is not Fault.FLIP:
            await _strike(plan.fault, blob_id)
        async with streaming(self.inner, blob_id, want) as pieces:
            async for piece in pieces:
                if plan is not None and at <= plan.after < at + len(piece):
                    head = piece[: plan.after - at]
                    if plan.fault is Fault.FLIP:
                        piece = head + bytes([piece[len(head)] ^ 0x10]) + piece[len(head) + 1 :]
                    else:
                        if head:
                            yield head
                        await _strike(plan.fault, blob_id)
                at += len(piece)
                yield piece

    def _next(self, blob_id: str, want: Range) -> Plan | None:
        for plan in self.plans:
            if plan.applies(blob_id, want):
                self.struck += 1
                if plan.times is not None:
                    plan.times -= 1
                    if plan.times <= 0:
                        self.plans.remove(plan)
                return plan
        return None


async def _strike(fault: Fault, blob_id: str) -> None:
    match fault:
        case Fault.FLIP:
            return
        case Fault.TRUNCATE | Fault.RESET:
            raise BackendTemporary(f"{blob_id}: the answer broke off (injected)")
        case Fault.HTML:
            raise BackendTemporary(f"{blob_id}: a web page instead (injected)")
        case Fault.BROKEN:
            raise BackendTemporary(f"{blob_id}: answered 500 (injected)")
        case Fault.BUSY:
            raise BackendTemporary(f"{blob_id}: answered 429 (injected)", retry_after_s=0.0)
        case Fault.DENIED:
            raise BackendDenied(f"{blob_id}: answered 401 (injected)")
        case Fault.MISSING:
            raise BlobNotFound(f"{blob_id}: answered 404 (injected)")
        case Fault.HANG:
            await asyncio.Event().wait()
        case _:
            assert_never(fault)
