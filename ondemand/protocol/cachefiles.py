"""Which objects are open, which requests are unanswered, and what happens to them when one closes.

Theory of operation
===================

An *object* is one opening of one cache file. Its key, ``(volume, cookie)``, names the file for good; the
kernel's ``object_id`` is an alias that holds from an OPEN to its CLOSE. States, and who moves an object:

    (OPEN read) -> OPENING --opened()--> OPEN <-> READING --CLOSE read--> CLOSING
                      |  \\--adopted()-> LOST --regained()--> OPEN
                      \\--refused()----> CLOSING

- OPENING: its OPEN is owed an answer. The mount that waits for it cannot be killed, so it is answered within
  a bounded time, with an error if need be.
- OPEN, READING: answered with a size. The two differ in whether a READ is owed an answer.
- LOST: the kernel had the object open before this process knew of it, and nobody says what it is now. See 4.
- CLOSING: the kernel has ended it and every READ of it. Nothing is owed; whoever still writes lets go soon.

Requests are *owed* from the moment they are read. The kernel knows them by ``msg_id`` only, whichever object
they are about. The rules:

1. Every request is answered once. A READ whose reader was killed is withdrawn without a word: its answer is
   refused by the kernel, and that is no error. When its ``msg_id`` comes again, the older request is void:
   an answer would release the newer one.
2. A key has one size for ever. It is recorded with the cache file; another size makes the kernel throw away
   what is cached. So an OPEN is refused rather than answered with another size than before.
3. An OPEN of a key that is open already ends the older object: the kernel has closed that without telling.
4. A worker that dies takes its descriptors along; that closes its objects, and each is opened again, under
   another ``object_id``, when a READ waits for it. ``restore`` makes the kernel offer what was read and not
   answered; a READ keeps its ``msg_id``. As long as READs wait, an OPEN that is refused comes again at once,
   for ever (seen on Linux 6.12 and 6.1: ten thousand in a second), and the READs cannot be answered at all;
   so an OPEN of an object that the kernel had open before is not refused: it is adopted with the size that
   its file has, and its READs fail until somebody knows it.
5. ``msg_id`` goes up, cyclically. A READ older than its object's OPEN waited before this worker opened it:
   it is *stale*, a predecessor's.
6. A CLOSE may come for an object that is not known: queued when the descriptor of a dead worker closed.

A key that would share its cache file with others is refused (`ondemand.wire.cachefiles.is_servable`).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias

from ondemand.errors import AnswerMisuse, FillError, MalformedMessage
from ondemand.provider import ObjectKey
from ondemand.ranges import Range
from ondemand.wire.cachefiles import Close, MsgId, ObjectId, Open, Read, is_servable

BLOCK_SIZE = 4096
"""What is written begins and ends on a multiple of this many bytes."""

SIZES_MAX = 1 << 16
"""Most keys whose size is remembered; the one that has been closed longest is forgotten first."""

_HALF = 1 << 31


class State(Enum):
    """See the theory of operation."""

    OPENING = auto()
    OPEN = auto()
    READING = auto()
    LOST = auto()
    CLOSING = auto()


class SizeChanged(FillError):
    """An object was opened before with another size."""


@dataclass(slots=True, eq=False)
class Object:
    """One opening of one cache file.

    Attributes:
        msg_id: Of its OPEN.
        size: In bytes; known from OPEN on. Of a lost object: that of its file, whole blocks.
    """

    key: ObjectKey
    object_id: ObjectId
    msg_id: MsgId
    size: int = 0
    reads: set[Request] = field(default_factory=set)
    _state: State = State.OPENING

    @property
    def state(self) -> State:
        if self._state is State.OPEN and self.reads:
            return State.READING
        return self._state

    @property
    def is_servable(self) -> bool:
        """False: its file may be another object's, too. To be refused."""
        return is_servable(self.key.cookie)


@dataclass(slots=True, eq=False)
class Request:
    """A READ that wants an answer.

    Attributes:
        want: Whole blocks; may reach past the object's end.
        stale: It waited for a dead process.
    """

    object: Object
    msg_id: MsgId
    want: Range
    stale: bool


Owed: TypeAlias = Object | Request
"""What waits for an answer: an object in OPENING for that to its OPEN."""


@dataclass(slots=True)
class CachefilesProtocol:
    """Pure bookkeeping: no descriptors, no clocks, no waiting."""

    _by_id: dict[ObjectId, Object] = field(default_factory=dict)
    _by_key: dict[ObjectKey, Object] = field(default_factory=dict)
    _sizes: dict[ObjectKey, int] = field(default_factory=dict)  # in order of last use
    _owed: dict[MsgId, Owed] = field(default_factory=dict)

    @property
    def owed_count(self) -> int:
        """Requests that are not answered."""
        return len(self._owed)

    def owed(self) -> list[Owed]:
        """The requests that are not answered."""
        return list(self._owed.values())

    def objects(self) -> Iterator[Object]:
        """Every object that the kernel has open, as far as we know."""
        return iter(list(self._by_id.values()))

    def size_of(self, key: ObjectKey) -> int | None:
        """The size that *key* was ever opened with; None if it was not, or too long ago."""
        return self._sizes.get(key)

    def forget(self, key: ObjectKey) -> None:
        """The file of *key* is gone, and its size with it. Not while it is open."""
        if key not in self._by_key:
            self._sizes.pop(key, None)

    # -- requests come ----------------------------------------------------------------------------------

    def admit_open(self, message: Open) -> tuple[Object, Object | None]:
        """An OPEN has been read; from now on it is owed.

        Returns:
            The object, and the one that it ends, if its key was open already: treat that as closed.

        Raises:
            MalformedMessage: Its object_id is another open object's.
        """
        if message.object_id in self._by_id:
            raise MalformedMessage(f"object {message.object_id} is opened twice")
        key = ObjectKey(message.cookie_key, message.volume_key)
        ended = self._by_key.get(key)
        if ended is not None:
            self._end(ended)
        opening = Object(key, message.object_id, message.msg_id)
        self._owe(message.msg_id, opening)
        self._by_id[message.object_id] = self._by_key[key] = opening
        return opening, ended

    def admit_read(self, message: Read) -> Request:
        """A READ has been read; from now on it is owed.

        Raises:
            MalformedMessage: No such object is open. Whoever asks cannot be answered: only ending, and a
                successor that reopens everything, helps.
        """
        reading = self._by_id.get(message.object_id)
        if reading is None or reading.state is State.OPENING:
            raise MalformedMessage(f"READ {message.msg_id} of object {message.object_id}, which is not open")
        want = Range.of(message.offset, message.length).aligned(BLOCK_SIZE)
        stale = (message.msg_id - reading.msg_id) % (2 * _HALF) >= _HALF
        request = Request(reading, message.msg_id, want, stale)
        self._owe(message.msg_id, request)
        reading.reads.add(request)
        return request

    def admit_close(self, message: Close) -> Object | None:
        """A CLOSE has been read: the kernel has ended the object and all that waits for it.

        Returns:
            The object, now CLOSING, with its ``reads``, which are void; None if it is not known.
        """
        ended = self._by_id.get(message.object_id)
        if ended is not None:
            self._end(ended)
        return ended

    # -- answers go -------------------------------------------------------------------------------------

    def check_size(self, opening: Object, size: int) -> None:
        """Raises SizeChanged if *size* may not be the answer to the OPEN of *opening*."""
        before = self._sizes.get(opening.key)
        if before is not None and before != size:
            raise SizeChanged(
                f"{opening.key} has {size} bytes now, had {before}: what is cached would be lost",
                errno.ESTALE,
            )

    def opened(self, opening: Object, size: int) -> None:
        """The OPEN is about to be answered with *size*.

        Raises:
            SizeChanged: It had another one before; nothing has changed.
            AnswerMisuse: It was answered before.
        """
        self.check_size(opening, size)
        self._answered_open(opening)
        self._remember(opening.key, size)
        opening.size = size
        opening._state = State.OPEN

    def adopted(self, opening: Object, file_size: int) -> int:
        """The OPEN of an object that nobody knows any more is about to be answered.

        Args:
            file_size: Of the cache file: its object's size in whole blocks, or more.

        Returns:
            The size to answer with.
        """
        self._answered_open(opening)
        opening.size = self._sizes.get(opening.key, file_size)
        opening._state = State.LOST
        return opening.size

    def regained(self, lost: Object, size: int) -> None:
        """Somebody knows the object again, which was answered with the size of its file.

        Raises:
            SizeChanged: It had another one before; it stays lost.
        """
        self.check_size(lost, size)
        if lost.state is State.LOST:
            self._remember(lost.key, size)
            lost.size = size
            lost._state = State.OPEN

    def refused(self, opening: Object) -> None:
        """The OPEN is about to be answered with an errno.

        Raises:
            AnswerMisuse: It was answered before.
        """
        self._answered_open(opening)
        self._end(opening)

    def settle(self, request: Request) -> bool:
        """*request* is about to be answered.

        Returns:
            False if it is void: then it must not be.

        Raises:
            AnswerMisuse: It was answered before.
        """
        if self._owed.get(request.msg_id) is request:
            del self._owed[request.msg_id]
            request.object.reads.remove(request)
            return True
        if request in request.object.reads:  # void, and not settled so far
            request.object.reads.remove(request)
            return False
        raise AnswerMisuse(f"READ {request.msg_id} of {request.object.key} was answered before")

    # -- in here ----------------------------------------------------------------------------------------

    def _owe(self, msg_id: MsgId, owed: Owed) -> None:
        # An id that comes again: the kernel has withdrawn the request that had it. A void READ stays among
        # its object's, for `settle` to tell it from one that was answered.
        self._owed.pop(msg_id, None)
        self._owed[msg_id] = owed

    def _answered_open(self, opening: Object) -> None:
        if opening.state is not State.OPENING:
            raise AnswerMisuse(f"OPEN {opening.msg_id} of {opening.key} was answered before")
        if self._owed.get(opening.msg_id) is opening:
            del self._owed[opening.msg_id]

    def _end(self, ended: Object) -> None:
        ended._state = State.CLOSING
        if self._by_id.get(ended.object_id) is ended:
            del self._by_id[ended.object_id]
        if self._by_key.get(ended.key) is ended:
            del self._by_key[ended.key]
        waiting: tuple[Owed, ...] = (ended, *ended.reads)
        for owed in waiting:
            if self._owed.get(owed.msg_id) is owed:
                del self._owed[owed.msg_id]

    def _remember(self, key: ObjectKey, size: int) -> None:
        self._sizes.pop(key, None)
        self._sizes[key] = size
        if len(self._sizes) > SIZES_MAX:
            oldest = next((key for key in self._sizes if key not in self._by_key), None)
            if oldest is not None:
                del self._sizes[oldest]
