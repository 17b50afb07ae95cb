"""Where blobs live: the seam every source implements."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from ondemand.ranges import Range


class Backend(Protocol):
    """Gives ranges of immutable blobs.

    Attributes:
        name: How logs and ``ls`` call this source: ``docker://host/repo``, ``/var/blobs``, ``https://…``.
    """

    @property
    def name(self) -> str: ...

    async def size(self, blob_id: str) -> int:
        """Size of the blob as stored, in bytes.

        Raises:
            BlobNotFound, BackendDenied, BackendTemporary: see erofsd.errors.
        """
        ...

    def stream(self, blob_id: str, want: Range) -> AsyncIterator[bytes]:
        """The bytes of *want*, in pieces as they arrive: exactly ``len(want)`` bytes in all, or an error.

        The caller closes the iterator (``aclosing``) to give up early; the connection is then dropped.

        Raises:
            BlobNotFound, BackendDenied, BackendTemporary: also for a body that ends early.
            BlobCorrupt: The source says that the object is not the one it was (size, ETag).
        """
        ...

    async def aclose(self) -> None:
        """Close connections. The backend is not used afterwards."""
        ...
