"""Bytes to parse: in memory, in a file, or far away behind a small cache."""

from __future__ import annotations

import os
from collections import OrderedDict

from erofsd.errors import BlobNotFound, CorruptImage, SourceError
from erofsd.images.base import ByteSource


def corrupt(name: str, offset: int, field: str, problem: str) -> CorruptImage:
    """The error for bytes that no sound image has: names the object, the offset in it and the field."""
    return CorruptImage(f"{name}: at byte {offset}: {field}: {problem}")


def check_range(name: str, size: int, offset: int, length: int) -> None:
    """Refuse a range that reaches past *size*; every ByteSource calls this first.

    Raises:
        CorruptImage: Names the range and the size.
    """
    if offset < 0 or length < 0 or offset + length > size:
        raise corrupt(name, offset, "range", f"{length} bytes reach past the end at {size}")


class BytesSource:
    """An image, or a part of one, in memory."""

    __slots__ = ("_data", "name", "size")

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.size = len(data)
        self._data = data

    def pread(self, offset: int, length: int) -> bytes:
        """See ByteSource."""
        if offset < 0 or length < 0 or offset + length > self.size:
            check_range(self.name, self.size, offset, length)
        return self._data[offset : offset + length]


class FileSource:
    """An image in a regular file. Owns its descriptor."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open *path*.

        Raises:
            BlobNotFound, SourceError: The file is not there, or not readable.
        """
        self.name = os.fspath(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._fd).st_size
        except FileNotFoundError as exc:
            raise BlobNotFound(f"{self.name}: no such file") from exc
        except OSError as exc:
            raise SourceError(f"{self.name}: {exc.strerror}") from exc

    def pread(self, offset: int, length: int) -> bytes:
        """See ByteSource."""
        check_range(self.name, self.size, offset, length)
        try:
            data = os.pread(self._fd, length, offset)
            while len(data) < length and (more := os.pread(self._fd, length - len(data), offset + len(data))):
                data += more
        except OSError as exc:
            raise SourceError(f"{self.name}: at byte {offset}: {exc.strerror}") from exc
        if len(data) < length:
            raise SourceError(f"{self.name}: became shorter while it was read")
        return data

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)


class PagedSource:
    """Another source, read in aligned pages that are kept for a while.

    Metadata is read a few dozen bytes at a time; a source behind a network should see few, sizeable reads.

    Args:
        source: Where pages come from.
        page_size: Bytes of one read, a power of two.
        page_limit: Pages kept; the least recently used goes first.
    """

    def __init__(self, source: ByteSource, *, page_size: int = 64 << 10, page_limit: int = 256) -> None:
        self.name = source.name
        self.size = source.size
        self._source = source
        self._page_size = page_size
        self._page_limit = page_limit
        self._pages: OrderedDict[int, bytes] = OrderedDict()

    def pread(self, offset: int, length: int) -> bytes:
        """See ByteSource."""
        check_range(self.name, self.size, offset, length)
        first = offset // self._page_size
        last = (offset + length - 1) // self._page_size
        at = offset - first * self._page_size
        if first >= last:
            return self._page(first)[at : at + length]
        if last - first >= self._page_limit // 4:  # bulk data would only push metadata out
            return self._source.pread(offset, length)
        self._load(first, last)
        return b"".join(self._page(i) for i in range(first, last + 1))[at : at + length]

    def _page(self, index: int) -> bytes:
        page = self._pages.get(index)
        if page is None:
            self._load(index, index)
            return self._pages[index]
        self._pages.move_to_end(index)
        return page

    def _load(self, first: int, last: int) -> None:
        # One read for a run of pages of which any is missing: a request costs more than the bytes.
        if all(i in self._pages for i in range(first, last + 1)):
            return
        start = first * self._page_size
        data = self._source.pread(start, min((last + 1) * self._page_size, self.size) - start)
        for i in range(first, last + 1):
            at = (i - first) * self._page_size
            self._pages[i] = data[at : at + self._page_size]
            self._pages.move_to_end(i)
        while len(self._pages) > max(self._page_limit, last - first + 1):
            self._pages.popitem(last=False)
