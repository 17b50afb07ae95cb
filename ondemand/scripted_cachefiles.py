"""A device that does what /dev/cachefiles and EROFS do, for mounts and readers that are tasks of ours.

It is trusted because the suite that it passes is the one that the kernel passes. What it does is written
after fs/cachefiles/ondemand.c of Linux 6.12; what 6.1 does otherwise is said where it matters.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from ondemand.buffers import is_aligned
from ondemand.cachefiles import Device
from ondemand.protocol.cachefiles import BLOCK_SIZE
from ondemand.provider import ObjectKey
from ondemand.ranges import Range, RangeSet
from ondemand.wire import cachefiles as wire
from ondemand.wire.cachefiles import MsgId, ObjectId, Opcode

READAHEAD = 128 << 10
_NOTHING = Range(0, 0)


@dataclass(eq=False)
class CacheFile:
    """What is cached of one object.

    Attributes:
        size: As the answer to its first OPEN said; another one makes the content worthless.
    """

    size: int
    content: bytearray = field(default_factory=bytearray)
    data: RangeSet = field(default_factory=RangeSet)

    def write(self, offset: int, data: memoryview) -> None:
        end = offset + len(data)
        self.content.extend(bytes(max(0, end - len(self.content))))
        self.content[offset:end] = data
        self.data.add(Range(offset, end))


@dataclass(eq=False)
class _Object:
    """struct cachefiles_object with its struct cachefiles_ondemand_info.

    Attributes:
        object_id: 0 before the first OPEN, -1 after its last descriptor was closed.
    """

    key: ObjectKey
    file: CacheFile | None = None
    object_id: int = 0
    is_open: bool = False
    is_reopening: bool = False
    in_page_cache: RangeSet = field(default_factory=RangeSet)


@dataclass(eq=False)
class _Request:
    """struct cachefiles_req.

    Attributes:
        is_new: Nobody has read it, or ``restore`` says so.
        done: Its errno, 0 without.
    """

    opcode: Opcode
    object: _Object
    done: asyncio.Future[int]
    want: Range = _NOTHING
    is_new: bool = True


class ScriptedCachefiles(Device):
    """Stands in for the device, the cache directory, and EROFS mounts of objects without a primary image.

    Attributes:
        files: The cache directory. What is taken out of here is gone, as if culled.
        commands: What was written to the device.
        refusals: Errnos with which the next OPENs cannot be delivered, as for want of a descriptor.
        is_full: Less than the ``stop`` limit of space is free.
        reads: READs that were sent, withdrawn ones included.
    """

    def __init__(self) -> None:
        super().__init__(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        self.files: dict[ObjectKey, CacheFile] = {}
        self.commands: list[wire.Command] = []
        self.refusals: list[int] = []
        self.is_full = False
        self.reads = 0
        self._objects: dict[ObjectKey, _Object] = {}
        self._openings: dict[int, tuple[_Object, int]] = {}  # by descriptor; the object, and its id then
        self._requests: dict[int, _Request] = {}
        self._next_msg_id = self._next_read = 0
        self._next_object_id = 1
        self._is_dead = False

    def die(self) -> None:
        """The last descriptor of the device closes: every request ends with EIO, new ones too."""
        self._is_dead = True
        for request in self._requests.values():
            self._end(request, errno.EIO)
        self._requests.clear()
        self._signal()

    def dispose(self) -> None:
        """Die, and let go of what the test has."""
        self.die()
        os.close(self.fileno())

    # -- as the engine sees it --------------------------------------------------------------------------

    def read(self) -> bytes:
        """See `Device.read`."""
        msg_id = self._select()
        if msg_id is None:
            self._signal()
            return b""
        request = self._requests[msg_id]
        request.is_new = False
        self._next_read = msg_id + 1
        message = self._message(MsgId(msg_id), request)
        if isinstance(message, wire.Close):
            del self._requests[msg_id]
            self._end(request, 0)
        self._signal()
        return wire.encode(message)

    def _select(self) -> int | None:
        new = sorted(msg_id for msg_id, request in self._requests.items() if request.is_new)
        for msg_id in [n for n in new if n >= self._next_read] + [n for n in new if n < self._next_read]:
            request = self._requests[msg_id]
            if request.opcode is Opcode.READ and not request.object.is_open:
                if not request.object.is_reopening:
                    request.object.is_reopening = True
                    asyncio.get_running_loop().call_soon(self._reopen, request.object)
                continue
            return msg_id
        return None

    def _reopen(self, reopened: _Object) -> None:
        if not self._is_dead:
            self._send(_Request(Opcode.OPEN, reopened, asyncio.get_running_loop().create_future()))

    def _message(self, msg_id: MsgId, request: _Request) -> wire.Message:
        about = request.object
        match request.opcode:
            case Opcode.OPEN:
                fd = self._open_fd(msg_id, request)
                return wire.Open(msg_id, ObjectId(about.object_id), fd, about.key.volume, about.key.cookie)
            case Opcode.READ:
                object_id = ObjectId(about.object_id)
                return wire.Read(msg_id, object_id, request.want.start, len(request.want))
            case Opcode.CLOSE:
                return wire.Close(msg_id, ObjectId(about.object_id % (1 << 32)))

    def _open_fd(self, msg_id: int, request: _Request) -> int:
        about = request.object
        refusal = self.refusals.pop(0) if self.refusals else errno.EEXIST if about.object_id > 0 else 0
        if refusal:
            del self._requests[msg_id]
            if about.object_id <= 0:
                about.is_open = about.is_reopening = False
            self._end(request, refusal)
            self._signal()
            raise OSError(refusal, os.strerror(refusal))
        fd = os.open("/dev/null", os.O_WRONLY)
        os.set_inheritable(fd, True)  # as the kernel leaves it
        about.object_id = self._next_object_id
        self._next_object_id += 1
        self._openings[fd] = (about, about.object_id)
        return fd

    def command(self, command: wire.Command) -> None:
        """See `Device.command`."""
        if self._is_dead:
            raise OSError(errno.EIO, "the cache is dead")
        command = wire.parse_command(wire.encode_command(command))
        self.commands.append(command)
        match command:
            case wire.Copen(msg_id, size):
                self._copen(msg_id, size)
            case wire.Restore():
                for request in self._requests.values():
                    request.is_new = True
                self._signal()
            case _:
                raise OSError(errno.EOPNOTSUPP, f"{command} is not scripted")

    def _copen(self, msg_id: int, size: int) -> None:
        request = self._requests.get(msg_id)
        if request is None or request.opcode is not Opcode.OPEN or not request.object.object_id:
            raise OSError(errno.EINVAL, f"no OPEN {msg_id}")
        del self._requests[msg_id]
        opened = request.object
        opened.is_reopening = False
        if size < 0:
            self._end(request, -size)
        elif opened.object_id < 0:
            self._end(request, errno.EBADFD)
        else:
            opened.is_open = True
            if opened.file is None:
                opened.file = self.files.get(opened.key)
                if opened.file is None or opened.file.size != size:
                    opened.file = self.files[opened.key] = CacheFile(size)
            self._end(request, 0)
        self._signal()

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        """See `Device.write`. Stricter than the kernel, which takes some misaligned writes and does harm."""
        opened, _ = self._openings[fd]
        if opened.file is None:
            raise OSError(errno.ENOBUFS, "no file")
        if not data or len(data) % BLOCK_SIZE or not is_aligned(data) or offset % BLOCK_SIZE:
            raise OSError(errno.EINVAL, f"{len(data)} bytes at {offset}")
        if self.is_full:
            raise OSError(errno.ENOBUFS, "no space")
        opened.file.write(offset, data)
        return len(data)

    def seek(self, fd: int, offset: int, whence: int) -> int:
        """See `Device.seek`."""
        opened, _ = self._openings[fd]
        if opened.file is None:
            raise OSError(errno.ENOBUFS, "no file")
        size = max(-(-opened.file.size // BLOCK_SIZE) * BLOCK_SIZE, len(opened.file.content))
        if whence == os.SEEK_END:
            return size + offset
        if offset >= size:
            raise OSError(errno.ENXIO, "behind the end")
        holes = list(opened.file.data.missing(Range(offset, size)))
        if whence == os.SEEK_HOLE:
            return holes[0].start if holes else size
        start = holes[0].stop if holes and holes[0].start == offset else offset
        if start == size:
            raise OSError(errno.ENXIO, "no data behind")
        return start

    def complete(self, fd: int, msg_id: int) -> None:
        """See `Device.complete`."""
        opened, _ = self._openings[fd]
        request = self._requests.get(msg_id)
        if request is None or request.opcode is not Opcode.READ or request.object is not opened:
            raise OSError(errno.EINVAL, f"no READ {msg_id} of this object")
        del self._requests[msg_id]
        self._end(request, 0)

    def close(self, fd: int) -> None:
        """See `Device.close`."""
        opened, object_id = self._openings.pop(fd)
        os.close(fd)
        if opened.object_id == object_id:
            opened.object_id = -1
            opened.is_open = opened.is_reopening = False
        self._signal()

    # -- as mounts and readers see it -------------------------------------------------------------------

    async def mount(self, *keys: ObjectKey) -> None:
        """Open objects. Raises OSError with EIO if one is refused; the others stay open."""
        for key in keys:
            opened = self._objects[key] = _Object(key)
            if await self._ask(_Request(Opcode.OPEN, opened, asyncio.get_running_loop().create_future())):
                del self._objects[key]
                raise OSError(errno.EIO, f"{key} was refused")

    async def unmount(self, *keys: ObjectKey) -> None:
        """Close objects; returns when their CLOSEs were read."""
        for key in keys:
            closed = self._objects.pop(key)
            if closed.is_open:
                await self._ask(_Request(Opcode.CLOSE, closed, asyncio.get_running_loop().create_future()))
            for msg_id, request in list(self._requests.items()):
                if request.object is closed:
                    del self._requests[msg_id]
                    self._end(request, errno.EIO)
            closed.file = None
            self._signal()

    async def read_object(self, key: ObjectKey, offset: int, length: int) -> bytes:
        """Read as through an EROFS mount: what is missing in pieces, then page by page, then EIO."""
        reading = self._objects[key]
        want = Range.of(offset, length).aligned(BLOCK_SIZE)
        for step in (READAHEAD, BLOCK_SIZE):
            for missing in list(reading.in_page_cache.missing(want)):
                for start in range(missing.start, missing.stop, step):
                    piece = Range(start, min(start + step, missing.stop))
                    if await self._read_through(reading, piece):
                        reading.in_page_cache.add(piece)
                    elif step == BLOCK_SIZE:
                        raise OSError(errno.EIO, f"{key} at {start}")
        assert reading.file is not None
        content = reading.file.content[offset : offset + length]
        return bytes(content) + bytes(length - len(content))

    async def _read_through(self, reading: _Object, piece: Range) -> bool:
        """Have the holes of *piece* filled: each is asked for once, and again only behind what has come."""
        asked = -1
        while reading.file is not None:
            hole = next(reading.file.data.missing(piece), None)
            if hole is None:
                return True
            if hole.start == asked:
                return False
            asked = hole.start
            done = asyncio.get_running_loop().create_future()
            self.reads += 1
            if await self._ask(_Request(Opcode.READ, reading, done, hole)):
                return False
        return False

    def forget(self, key: ObjectKey) -> None:
        """Drop the page cache of an object."""
        self._objects[key].in_page_cache = RangeSet()

    @property
    def openings(self) -> Iterator[ObjectKey]:
        """Keys of the objects of which the engine has a descriptor, one for each."""
        return (opened.key for opened, _ in self._openings.values())

    @property
    def queued_count(self) -> int:
        """Requests that nobody has read."""
        return sum(request.is_new for request in self._requests.values())

    # -- in here ----------------------------------------------------------------------------------------

    def _send(self, request: _Request) -> int:
        msg_id = self._next_msg_id
        self._next_msg_id = (msg_id + 1) % (1 << 32)
        self._requests[msg_id] = request
        self._signal()
        return msg_id

    async def _ask(self, request: _Request) -> int:
        if self._is_dead:
            return errno.EIO
        msg_id = self._send(request)
        try:
            return await request.done
        finally:  # the reader was killed, perhaps
            if self._requests.get(msg_id) is request:
                del self._requests[msg_id]
                self._signal()

    def _end(self, request: _Request, error: int) -> None:
        if not request.done.done():
            request.done.set_result(error)

    def _signal(self) -> None:
        try:
            os.eventfd_read(self.fileno())
        except BlockingIOError:
            pass
        if any(
            request.is_new and not (request.opcode is Opcode.READ and request.object.is_reopening)
            for request in self._requests.values()
        ):
            os.eventfd_write(self.fileno(), 1)
