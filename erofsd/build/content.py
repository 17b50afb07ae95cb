"""Content of a source, hashed as it goes by: what the finished image is compared with."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Generator, Iterable

from blake3 import blake3

from erofsd.build.options import BuildOptions
from erofsd.build.source import Content, SourceEntry
from erofsd.errors import SourceError
from erofsd.images.tree import Node

_ZEROS = memoryview(bytes(1 << 20))


def with_digests(
    source: Iterable[SourceEntry], *, digests: bool = True, stop: threading.Event | None = None
) -> Generator[SourceEntry, None, None]:
    """*source*; when the content of a file has been read, ``Node.digest`` of its node is set.

    Closed before its end it closes the source too, which may own a thread.

    Args:
        digests: False: nobody will compare.
        stop: Ends it early, from another thread.

    Raises:
        SourceError: It was ended early; else as *source*.
    """
    entries = iter(source)
    try:
        for entry in entries:
            if stop is not None and stop.is_set():
                raise SourceError("given up")
            if digests and entry.content is not None and entry.content.size:
                entry.content = _Hashed(entry.content, entry.node)
            yield entry
    finally:
        if isinstance(entries, Generator):
            entries.close()


class _Hashed:
    """Passes content through. See `Content`."""

    __slots__ = ("_at", "_hasher", "_inner", "_node")

    def __init__(self, inner: Content, node: Node) -> None:
        self._inner = inner
        self._node = node
        self._hasher = blake3()
        self._at = 0

    @property
    def size(self) -> int:
        """See `Content`."""
        return self._inner.size

    @property
    def extents(self) -> list[tuple[int, int]] | None:
        """See `Content`."""
        return self._inner.extents

    def readinto(self, offset: int, view: memoryview) -> None:
        """See `Content`."""
        self._skip(offset)
        self._inner.readinto(offset, view)
        self._hasher.update(view)
        self._at += len(view)

    def close(self) -> None:
        """See `Content`. What was never asked for is a hole."""
        self._inner.close()
        self._skip(self.size)
        self._node.digest = self._hasher.digest()

    def _skip(self, offset: int) -> None:
        while self._at < offset:
            zeros = _ZEROS[: offset - self._at]
            self._hasher.update(zeros)
            self._at += len(zeros)


class Digester:
    """Takes the place of a packer where nothing is to be stored: reads content, so that it is hashed."""

    options = BuildOptions(jobs=1)

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(1 << 20))

    def add(self, content: Content) -> array[int]:
        """Read all of *content*; it gets no chunks."""
        extents = content.extents
        try:
            for start, length in [(0, content.size)] if extents is None else extents:
                for offset in range(start, start + length, len(self._buffer)):
                    view = self._buffer[: min(len(self._buffer), start + length - offset)]
                    content.readinto(offset, view)
        finally:
            content.close()
        return array("q")

    def finish(self) -> None:
        """There is no blob."""
