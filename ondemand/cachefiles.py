"""/dev/cachefiles, and the cache files that it opens: system calls and where their results go.

`Device` is the boundary to the kernel, `ondemand.scripted_cachefiles.ScriptedCachefiles` stands in for it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ondemand import syscalls
from ondemand.buffers import AlignedBuffers
from ondemand.protocol.cachefiles import BLOCK_SIZE
from ondemand.ranges import Range, RangeSet
from ondemand.wire import cachefiles as wire

FILE_WAIT_S = 0.5
ROOM_TRIES = 3
"""So often a write that found no room is made again after somebody made some."""

_FILE_LOOK_S = 0.001

_BUFFERS = AlignedBuffers()


class Device:
    """/dev/cachefiles as the engine sees it.

    Args:
        device_fd: From `ondemand.binding.open_device`; belongs to the caller.
    """

    def __init__(self, device_fd: int) -> None:
        self._device_fd = device_fd

    def fileno(self) -> int:
        """Readable while there is a request that was not read; sometimes also when there is none."""
        return self._device_fd

    def read(self) -> bytes:
        """One message; empty if there is none. Never waits.

        Raises:
            OSError: An OPEN could not be delivered (EMFILE and others): the kernel has failed it.
        """
        return os.read(self._device_fd, wire.MSG_MAX_SIZE)

    def command(self, command: wire.Command) -> None:
        """Write one command. Raises OSError as the kernel answers it; EIO when the cache is dead."""
        os.write(self._device_fd, wire.encode_command(command))

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        """Write to an object; returns the number of bytes.

        Args:
            data: Begins on a page. Its length and *offset* are multiples of 4096: others corrupt the object
                on some kernels, with success as the result.

        Raises:
            OSError: ENOBUFS where the object has no file, or the file system is fuller than the cache's
                limits allow.
        """
        return os.pwrite(fd, data, offset)

    def seek(self, fd: int, offset: int, whence: int) -> int:
        """lseek(2) on an object's file. ENOBUFS where it has none."""
        return os.lseek(fd, offset, whence)

    def complete(self, fd: int, msg_id: int) -> None:
        """Answer a READ of the object. EINVAL where none waits with that id."""
        syscalls.read_complete(fd, msg_id)

    def close(self, fd: int) -> None:
        """Close an object's descriptor."""
        os.close(fd)


class CacheFileSink:
    """Writes into one opening of an object. Usable from any thread; owns the object's descriptor.

    The object has no file until the kernel has digested the answer to its OPEN, in a thread of its own: what
    is written directly after the answer waits for that. The descriptor is closed when the last thread has
    let go of it.

    Args:
        fd: As it came with the OPEN.
        make_room: Called when there is no room, from whatever thread writes; False if that was in vain.
    """

    block_size = BLOCK_SIZE

    def __init__(self, device: Device, fd: int, make_room: Callable[[], bool] = lambda: False) -> None:
        self._device = device
        self._fd = fd
        self._make_room = make_room
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False
        self._answered = False
        self._has_file = False

    # -- see `ondemand.provider.Sink` -------------------------------------------------------------------

    def write(self, offset: int, data: memoryview) -> None:
        """See `Sink.write`.

        Raises:
            OSError: ENOSPC also where the cache's limits are reached; ESTALE when the object is closed.
        """
        if offset % BLOCK_SIZE or len(data) % BLOCK_SIZE:
            raise ValueError(f"{len(data)} bytes at {offset} are not whole blocks")
        with self._use() as fd:
            for piece in _BUFFERS.pieces(data.cast("B")):
                self._write_aligned(fd, offset, piece)
                offset += len(piece)

    def data(self) -> RangeSet:
        """See `Sink.data`. Of a new object's file nothing is known before its OPEN is answered: all of it."""
        with self._use() as fd:
            if not self._wait_file(fd):
                return RangeSet([Range(0, wire.POSITION_MAX)])
            found = RangeSet()
            at = 0
            while (start := self._seek(fd, at, os.SEEK_DATA)) is not None:
                at = self._device.seek(fd, start, os.SEEK_HOLE)
                found.add(Range(start, at))
            return found

    # -- for the engine ---------------------------------------------------------------------------------

    def holds(self, want: Range) -> bool:
        """True if the kernel would find all of *want* in the file. Never waits."""
        if not want:
            return True
        with self._use() as fd:
            hole = self._seek(fd, want.start, os.SEEK_HOLE)
            return hole is not None and hole >= want.stop

    def file_size(self) -> int | None:
        """Size of the object's file; None if it has none, as before the first answer."""
        with self._use() as fd:
            return self._device.seek(fd, 0, os.SEEK_END) if self._find_file(fd) else None

    def answered(self) -> None:
        """The OPEN is about to be answered with a size: there will be a file."""
        self._answered = True

    def complete(self, msg_id: int) -> None:
        """See `Device.complete`."""
        with self._use() as fd:
            self._device.complete(fd, msg_id)

    def close(self) -> None:
        """No more of it: what begins from now on fails with ESTALE."""
        with self._lock:
            closing = not self._closed and not self._users
            self._closed = True
        if closing:
            self._device.close(self._fd)

    # -- in here ----------------------------------------------------------------------------------------

    @contextmanager
    def _use(self) -> Iterator[int]:
        with self._lock:
            if self._closed:
                raise OSError(errno.ESTALE, "the kernel has closed the object")
            self._users += 1
        try:
            yield self._fd
        finally:
            with self._lock:
                self._users -= 1
                closing = self._closed and not self._users
            if closing:
                self._device.close(self._fd)

    def _write_aligned(self, fd: int, offset: int, data: memoryview) -> None:
        tries = ROOM_TRIES
        while data:
            try:
                written = self._device.write(fd, data, offset)
            except OSError as exc:
                if exc.errno not in (errno.ENOBUFS, errno.ENOSPC):
                    raise
                if exc.errno == errno.ENOBUFS and not self._has_file and self._wait_file(fd):
                    continue
                explained = self._explained(fd)
                if explained.errno == errno.ENOSPC and tries and self._make_room():
                    tries -= 1
                    continue
                raise explained from exc
            written -= written % BLOCK_SIZE  # a block that is there in part counts as there: write it again
            if not written:
                raise OSError(errno.EIO, f"less than a block was written at {offset}")
            offset += written
            data = data[written:]

    def _explained(self, fd: int) -> OSError:
        if self._seek(fd, 0, os.SEEK_END) is None:
            return OSError(errno.ESTALE, "the object has no file, or not any more")
        return OSError(errno.ENOSPC, "the file system is fuller than the cache's limits allow")

    def _wait_file(self, fd: int) -> bool:
        """True once the object has a file. Waits for one that will come, but not on every call."""
        if self._find_file(fd):
            return True
        if not self._answered:
            return False
        self._answered = False  # if there is none in the end, the object could not be made: do not wait again
        give_up = time.monotonic() + FILE_WAIT_S
        while time.monotonic() < give_up:
            time.sleep(_FILE_LOOK_S)
            if self._find_file(fd):
                return True
        return False

    def _find_file(self, fd: int) -> bool:
        if not self._has_file:
            try:
                self._device.seek(fd, 0, os.SEEK_END)
                self._has_file = True
            except OSError as exc:
                if exc.errno != errno.ENOBUFS:
                    raise
        return self._has_file

    def _seek(self, fd: int, offset: int, whence: int) -> int | None:
        try:
            return self._device.seek(fd, offset, whence)
        except OSError as exc:
            if exc.errno in (errno.ENXIO, errno.ENOBUFS):  # behind the end; no file
                return None
            raise
