"""Archives as one sequential stream of decompressed bytes, read and decompressed ahead by a thread.

What an archive is packed with is told from its first bytes. gzip may have several members (and zeros behind
them, as tapes leave them), zstd several frames and skippable ones. A stream that ends inside a member or
frame is an error here and never looks like the end of the archive.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import IO, Any, Protocol, cast

import zstandard

from erofsd.errors import CorruptImage, SourceError, UnsupportedImage

_new_inflater: Callable[[int], Any] = zlib.decompressobj
_InflateErrors: tuple[type[Exception], ...] = (zlib.error,)
try:
    from isal import isal_zlib
except ImportError:
    pass  # zlib takes 2.5 times as long (288 against 712 MB/s on one core), and does the same
else:
    _new_inflater = isal_zlib.decompressobj
    _InflateErrors = (zlib.error, cast("type[Exception]", isal_zlib.error))

_PIECE_SIZE = 1 << 20
_READ_SIZE = 256 << 10
_AHEAD_MAX = 8 << 20  # decompressed bytes that may wait for the consumer
_GZIP_WBITS = 31  # zlib.h, inflateInit2: 15 for the window, plus 16 for a gzip header and nothing else
# What zstd(1) allows without --long. RFC 8878 recommends 8 MiB at least.
_ZSTD_WINDOW_MAX = 1 << 27
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_ZSTD_MAGIC = 0xFD2FB528
_RLE_BLOCK = 1
_REFUSED = {b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"\x04\x22\x4d\x18": "lz4", b"\x1f\x9d": "compress (.Z)"}


class Readable(Protocol):
    """What archives are read from: a file opened in binary mode, or anything that reads like one."""

    def read(self, size: int, /) -> bytes:
        """At most *size* bytes; none at the end."""
        ...


class ByteStream:
    """Sequential bytes. Owns the thread that reads ahead, not the file: use as a context manager.

    Attributes:
        name: For error messages.
        offset: Bytes given so far: where in the decompressed archive the next one lies.
    """

    def __init__(self, file: Readable, name: str) -> None:
        self.name = name
        self.offset = 0
        self._pieces = _ReadAhead(_decompressed(_Counted(file, name)))
        self._piece = memoryview(b"")

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; returns when the file is left alone."""
        self._piece = memoryview(b"")
        self._pieces.close()

    def readinto(self, view: memoryview) -> int:
        """Fill *view* as far as there are bytes; returns their number."""
        done = 0
        while done < len(view) and self._more():
            step = min(len(view) - done, len(self._piece))
            view[done : done + step] = self._piece[:step]
            self._piece = self._piece[step:]
            done += step
        self.offset += done
        return done

    def read(self, size: int) -> bytes:
        """*size* bytes, or those that are left."""
        if len(self._piece) >= size:
            data = bytes(self._piece[:size])
            self._piece = self._piece[size:]
            self.offset += size
            return data
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.readinto(memoryview(buffer))])

    def skip(self, size: int) -> int:
        """Pass over *size* bytes, or those that are left; returns their number."""
        done = 0
        while done < size and self._more():
            step = min(size - done, len(self._piece))
            self._piece = self._piece[step:]
            done += step
        self.offset += done
        return done

    def drain(self) -> None:
        """Read what is left: only then has all of the compressed stream been checked."""
        while self._more():
            self.offset += len(self._piece)
            self._piece = memoryview(b"")

    def _more(self) -> bool:
        while not self._piece:
            piece = self._pieces.next()
            if piece is None:
                return False
            self._piece = memoryview(piece)
        return True


class _Counted:
    # The file with its offset, for messages; can give bytes back once, which is how its kind is told.

    def __init__(self, file: Readable, name: str) -> None:
        self.name = name
        self.offset = 0
        self._file = file
        self._back = b""

    def read(self, size: int) -> bytes:
        if self._back:
            data, self._back = self._back, b""
        else:
            try:
                data = self._file.read(size)
            except OSError as exc:
                raise SourceError(f"{self.name}: at byte {self.offset}: {exc.strerror or exc}") from exc
        self.offset += len(data)
        return data

    def give_back(self, data: bytes) -> None:
        self._back = data
        self.offset -= len(data)

    def bad(self, what: str, problem: str) -> CorruptImage:
        return CorruptImage(f"{self.name}: at byte {self.offset}: {what}: {problem}")


class _ReadAhead:
    # A thread that steps through *pieces*, and a bounded queue. An error waits its turn in the queue.

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._queue: deque[bytes | BaseException | None] = deque()
        self._waiting = 0  # bytes in the queue
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def next(self) -> bytes | None:
        """The next piece; None at the end."""
        with self._changed:
            while not self._queue:
                self._changed.wait()
            item = self._queue[0]
            if item is None:
                return None
            if isinstance(item, BaseException):
                raise item
            self._queue.popleft()
            self._waiting -= len(item)
            self._changed.notify()
            return item

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._queue.append(None)
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            for piece in self._pieces:
                if not self._put(piece):
                    return
        except BaseException as exc:  # whatever it is, it belongs to the thread that consumes
            last = exc
        with self._changed:
            self._queue.append(last)
            self._changed.notify()

    def _put(self, piece: bytes) -> bool:
        with self._changed:
            while self._waiting >= _AHEAD_MAX and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            self._queue.append(piece)
            self._waiting += len(piece)
            self._changed.notify()
            return True


def _decompressed(file: _Counted) -> Iterator[bytes]:
    head = file.read(_READ_SIZE)
    while 0 < len(head) < 6 and (more := file.read(_READ_SIZE)):
        head += more
    file.give_back(head)
    for magic, kind in _REFUSED.items():
        if head.startswith(magic):
            raise UnsupportedImage(f"{file.name}: packed with {kind}", hint="Repack it with gzip or zstd.")
    number = int.from_bytes(head[:4], "little")
    if head.startswith(b"\x1f\x8b"):
        return _inflated(file)
    if number == _ZSTD_MAGIC or number in _SKIPPABLE:
        return _unzstd(file)
    return iter(lambda: file.read(_READ_SIZE), b"")


def _inflated(file: _Counted) -> Iterator[bytes]:
    """Source: RFC 1952, section 2.2: a file is a series of members."""
    inflater = _new_inflater(_GZIP_WBITS)
    pending, started = b"", False
    while True:
        if not pending and not (pending := file.read(_READ_SIZE)):
            break
        if inflater.eof:
            if not pending.strip(b"\0"):  # a tape's padding; gzip(1) ignores it, too
                pending = b""
                continue
            if pending[0] != 0x1F:
                raise file.bad("gzip", "bytes that are no member follow the last one")
            inflater, started = _new_inflater(_GZIP_WBITS), False
        started = True
        try:
            data = inflater.decompress(pending, _PIECE_SIZE)
        except _InflateErrors as exc:
            raise file.bad("gzip", str(exc)) from exc
        if data:
            yield data
        pending = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
    # All input has been taken, but output may be left: it was more than one piece.
    while started and not inflater.eof and (data := inflater.decompress(b"", _PIECE_SIZE)):
        yield data
    if started and not inflater.eof:
        raise file.bad("gzip", "ends inside a member: the archive is cut off")


def _unzstd(file: _Counted) -> Iterator[bytes]:
    source = cast("IO[bytes]", _Frames(file))  # read() is all that is called
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)
    reader = decompressor.stream_reader(source, read_across_frames=True, read_size=_READ_SIZE)
    try:
        while data := reader.read(_PIECE_SIZE):
            yield data
    except zstandard.ZstdError as exc:
        raise file.bad("zstd", str(exc)) from exc


class _Frames:
    # Follows the frames that it hands on: the library's reader ends silently where its input does.
    # Source: RFC 8878, sections 3.1.1 and 3.1.2.

    def __init__(self, file: _Counted) -> None:
        self._file = file
        self._skip = 0
        self._have = b""
        self._inside = False
        self._ends = True  # no more structure of the present frame is to come
        self._parser = self._parse()
        self._want = next(self._parser)

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if not data and (self._inside or self._have):
            raise self._file.bad("zstd", "ends inside a frame: the archive is cut off")
        self._follow(data)
        return data

    def _follow(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
            else:
                step = min(self._want - len(self._have), len(data) - at)
                self._have += data[at : at + step]
                if len(self._have) == self._want:
                    have, self._have = self._have, b""
                    self._want = self._parser.send(have)
            at += step
        if not self._skip and self._ends:
            self._inside = False

    def _parse(self) -> Generator[int, bytes, None]:
        """Yields how many bytes of structure it wants next; sets ``_skip`` to the content before them."""
        while True:
            self._ends = True
            magic = int.from_bytes((yield 4), "little")
            self._inside, self._ends = True, False
            if magic in _SKIPPABLE:
                self._skip = int.from_bytes((yield 4), "little")
                continue
            if magic != _ZSTD_MAGIC:
                raise self._file.bad("zstd", "bytes that are no frame follow the last one")
            descriptor = (yield 1)[0]
            single = descriptor >> 5 & 1
            self._skip = (1 - single) + (0, 1, 2, 4)[descriptor & 3] + (single, 2, 4, 8)[descriptor >> 6]
            last = False
            while not last:
                block = int.from_bytes((yield 3), "little")
                last = bool(block & 1)
                self._skip = 1 if block >> 1 & 3 == _RLE_BLOCK else block >> 3
            if descriptor >> 2 & 1:
                self._skip += 4  # checksum
