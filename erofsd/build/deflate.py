"""A gzip file, of one member, compressed by several threads; the same bytes whatever their number.

Every piece is compressed by itself, with the 32 KiB before it as its dictionary, and ends with a sync flush:
such pieces one after the other are one deflate stream. As pigz does it.

Sources: RFC 1951, 3.2.4; RFC 1952, 2.3.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO

PIECE_SIZE = 1 << 20
LEVEL = 6
_WINDOW = 32 << 10
# No time, no name; "unknown" as the system: nothing of the machine shows.
_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
_END = b"\x03\0"  # an empty last block


class GzipWriter:
    """Compresses what is written to it into *file*, which the caller closes.

    Attributes:
        digest: ``sha256:…`` of what went into *file*; complete after the block.
        content_digest: Of what was written here.
        size: Bytes that went into *file*.

    Args:
        threads: Pieces that are compressed at the same time.
    """

    def __init__(self, file: BinaryIO, threads: int, level: int = LEVEL) -> None:
        self._file = file
        self._level = level
        self._pool = ThreadPoolExecutor(threads, "gzip")
        self._waiting_max = 2 * threads
        self._waiting: deque[Future[bytes]] = deque()
        self._piece = bytearray()
        self._window = b""
        self._crc = 0
        self._count = 0
        self._packed_hash = hashlib.sha256()
        self._content_hash = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> GzipWriter:
        self._put(_HEADER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._pool.shutdown(cancel_futures=True)

    @property
    def digest(self) -> str:
        """See the class."""
        return f"sha256:{self._packed_hash.hexdigest()}"

    @property
    def content_digest(self) -> str:
        """See the class."""
        return f"sha256:{self._content_hash.hexdigest()}"

    def write(self, data: bytes | memoryview) -> None:
        """Compress *data*."""
        view = memoryview(data)
        while view:
            room = PIECE_SIZE - len(self._piece)
            self._piece += view[:room]
            view = view[room:]
            if len(self._piece) == PIECE_SIZE:
                self._flush()

    def _flush(self) -> None:
        piece, self._piece = bytes(self._piece), bytearray()
        self._content_hash.update(piece)
        self._crc = zlib.crc32(piece, self._crc)
        self._count += len(piece)
        self._waiting.append(self._pool.submit(_deflate, piece, self._window, self._level))
        self._window = piece[-_WINDOW:]
        while len(self._waiting) > self._waiting_max:
            self._put(self._waiting.popleft().result())

    def _finish(self) -> None:
        if self._piece:
            self._flush()
        while self._waiting:
            self._put(self._waiting.popleft().result())
        self._put(_END + struct.pack("<II", self._crc, self._count & 0xFFFFFFFF))

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._packed_hash.update(data)
        self.size += len(data)


def _deflate(piece: bytes, window: bytes, level: int) -> bytes:
    if window:
        packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=window)
    else:
        packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH)
