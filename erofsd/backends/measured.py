"""A backend that counts what it cost, and the least that wrappers share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Protocol, cast

from erofsd.backends.base import Backend
from ondemand.ranges import Range


class MeasuredBackend(Backend, Protocol):
    """A Backend that counts.

    Attributes:
        transferred_bytes: Body bytes that came from the source, useful or not.
        requests: Requests sent to it: GETs, HEADs, and those for tokens; for files, reads begun.
    """

    @property
    def transferred_bytes(self) -> int: ...

    @property
    def requests(self) -> int: ...


def streaming(
    backend: Backend, blob_id: str, want: Range
) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
    """The stream of *want*, closed when the block is left, however that happens."""
    return aclosing(cast("AsyncGenerator[bytes, None]", backend.stream(blob_id, want)))


class BackendWrapper:
    """Passes everything on to *inner*; a wrapper overrides what it changes."""

    def __init__(self, inner: MeasuredBackend) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        """What *inner* is called: a wrapper is no other source."""
        return self.inner.name

    @property
    def transferred_bytes(self) -> int:
        """As *inner* counts."""
        return self.inner.transferred_bytes

    @property
    def requests(self) -> int:
        """As *inner* counts."""
        return self.inner.requests

    async def size(self, blob_id: str) -> int:
        """See Backend."""
        return await self.inner.size(blob_id)

    def stream(self, blob_id: str, want: Range) -> AsyncIterator[bytes]:
        """See Backend."""
        return self.inner.stream(blob_id, want)

    async def aclose(self) -> None:
        """See Backend."""
        await self.inner.aclose()
