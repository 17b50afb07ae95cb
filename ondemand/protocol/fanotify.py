"""Which files are guarded, which events are unanswered, and when an answer may be given.

Theory of operation
===================

An event is *read* by a worker, which notes it in the journal, and from then on *owed*: its reader waits until
an answer with the event's number reaches the group. It is *settled* with a verdict, 0 or an errno, once the
wanted bytes are in the file or cannot be had, and then *released*: its answer may be written. The shell that
uses this class moves an event from owed to settled; only this class decides when it is released.

The number is that of the event's descriptor in the process that read it, the lowest free one there, and the
kernel knows the event by nothing else. As long as one process reads and closes a descriptor only after the
answer, numbers are unique. After a crash they are not: events of dead workers (*stale* ones) stay owed under
numbers that the new worker may get again. An answer then releases the older event, whichever was meant: with
zeros, if that one is not filled yet, and the newer one waits for ever. Hence the rules:

1. Stale numbers are occupied in the new worker until they are answered, so that no new event gets one
   (`stale_numbers`; the shell does it). This makes collisions rare; the next rule makes them harmless.
2. Events with the same number are released together, when all of them are settled, with one verdict: 0 if
   all were filled, else the first errno. Then as many answers are due as there are events.
3. A stale event may have been answered by the dead worker just before it could clear the slot, so an answer
   that finds nobody (ENOENT) is no error where a stale event is involved. The surplus answer cannot hit a
   newer event: that would have the same number, and be settled too.
4. A stale event of which it is not known what file it is about (killed between the kernel's note and ours)
   is filled in every guarded file before it is allowed, each as far as the file goes; but for those of which
   nobody can read that range (`NobodyReads`).
5. An event about a file that is not guarded is denied: nobody vouches for its bytes. Events of a file that
   was guarded until a moment ago are allowed, because guarding ends only when all bytes are there.

Errors are for the reader only: the kernel takes a handful of errnos, refuses others, and leaves an event
unanswered whose answer it refused. `narrow` is the one place that knows which.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NewType, TypeAlias

from ondemand.errors import AnswerMisuse
from ondemand.provider import ObjectKey
from ondemand.ranges import Range
from ondemand.wire.fanotify import EventFd, PreAccess

Identity: TypeAlias = tuple[int, int]
"""st_dev and st_ino of a file."""

Slot = NewType("Slot", int)
"""Where the shell noted an event."""

RELEASED_MAX = 4096
"""Most files remembered after they were guarded; an event in flight is answered long before."""

_ACCEPTED = frozenset(
    {errno.EPERM, errno.EIO, errno.EBUSY, errno.ETXTBSY, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT}
)
_NEAREST = {errno.EACCES: errno.EPERM, errno.EROFS: errno.EPERM, errno.ENOBUFS: errno.ENOSPC}


def narrow(error: int) -> int:
    """The errno nearest to *error* that a denial can carry.

    Source: fs/notify/fanotify/fanotify_user.c, process_access_response; any other is EINVAL there, and the
    event stays unanswered.
    """
    if error in _ACCEPTED:
        return error
    return _NEAREST.get(error, errno.EIO)


@dataclass(frozen=True, slots=True)
class Guarded:
    """A file whose readers wait for us.

    Attributes:
        size: In bytes; ranges are cut off there.
    """

    key: ObjectKey
    identity: Identity
    size: int


@dataclass(slots=True, eq=False)
class Request:
    """An event that was read and wants an answer.

    Attributes:
        needs: What must be filled before it may be allowed. Empty: nothing, it may be allowed at once.
        refused: It must be denied, whatever is filled.
        stale: A dead worker read it: no descriptor comes with its number.
        guessed: It is about one of several files, nobody knows which.
        verdict: None while it is owed; 0 or an errno once it is settled.
    """

    fd: EventFd
    pid: int
    slot: Slot
    needs: tuple[tuple[ObjectKey, Range], ...]
    refused: bool = False
    stale: bool = False
    guessed: bool = False
    verdict: int | None = None


@dataclass(slots=True)
class FanotifyProtocol:
    """Pure bookkeeping: no descriptors, no clocks, no waiting."""

    _by_identity: dict[Identity, Guarded] = field(default_factory=dict)
    _by_key: dict[ObjectKey, Guarded] = field(default_factory=dict)
    _released: dict[Identity, None] = field(default_factory=dict)  # in order of release
    _owed: dict[EventFd, list[Request]] = field(default_factory=dict)

    def guard(self, key: ObjectKey, identity: Identity, size: int) -> None:
        """Events of the file *identity* are about *key* from now on. Saying so again changes nothing.

        Raises:
            ValueError: *key* is another file, or the file another key's, or the size has changed.
        """
        guarded = Guarded(key, identity, size)
        if self._by_key.get(key, guarded) != guarded or self._by_identity.get(identity, guarded) != guarded:
            raise ValueError(f"{key} as {identity} of {size} bytes contradicts what is guarded already")
        self._by_key[key] = self._by_identity[identity] = guarded
        self._released.pop(identity, None)

    def unguard(self, key: ObjectKey) -> None:
        """All bytes of *key* are there, or nobody can read it any more. What is owed stays owed.

        Raises:
            KeyError: It is not guarded.
        """
        guarded = self._by_key.pop(key)
        del self._by_identity[guarded.identity]
        self._released[guarded.identity] = None
        if len(self._released) > RELEASED_MAX:
            del self._released[next(iter(self._released))]

    def vouch(self, identity: Identity) -> None:
        """All bytes of the file *identity* are there, though this process never guarded it."""
        if identity not in self._by_identity:
            self._released[identity] = None

    def guarded(self, key: ObjectKey) -> Guarded | None:
        """What is known of *key*, None if it is not guarded."""
        return self._by_key.get(key)

    def admit(self, event: PreAccess, slot: Slot, identity: Identity) -> Request:
        """An event has been read; from now on it is owed."""
        needs, refused = self._needs(event, identity)
        request = Request(event.fd, event.pid, slot, needs, refused)
        self._owed.setdefault(event.fd, []).append(request)
        return request

    def admit_stale(self, event: PreAccess, slot: Slot) -> Request:
        """An event of a dead worker was found; `resolve` says what it needs once all files are guarded."""
        request = Request(event.fd, event.pid, slot, (), refused=True, stale=True)
        self._owed.setdefault(event.fd, []).append(request)
        return request

    def resolve(self, request: Request, event: PreAccess, identity: Identity | None) -> None:
        """Say what a stale request needs.

        Args:
            identity: None if nobody knows. Every file that its worker may have guarded is guarded again.
        """
        if identity is not None:
            request.needs, request.refused = self._needs(event, identity)
            return
        request.guessed = True
        want = Range.of(event.offset, event.count)
        parts = ((guarded.key, want.clamp(guarded.size)) for guarded in self._by_key.values())
        request.needs = tuple((key, part) for key, part in parts if part)
        request.refused = bool(want) and not self._by_key

    def settle(self, request: Request, verdict: int) -> list[Request]:
        """*request* is filled (0) or cannot be (an errno).

        Returns:
            The requests that are released by this: write one answer for each, with the verdict that all of
            them have now; none, while another one with the same number is owed.

        Raises:
            AnswerMisuse: It was settled before.
        """
        if request.verdict is not None:
            raise AnswerMisuse(f"event {request.fd} was settled with {request.verdict}, now with {verdict}")
        request.verdict = narrow(verdict) if verdict else 0
        group = self._owed[request.fd]
        if len(group) > 1:
            if any(other.verdict is None for other in group):
                return []
            common = next((other.verdict for other in group if other.verdict), 0)
            for other in group:
                other.verdict = common
        del self._owed[request.fd]
        return group

    def owed(self) -> Iterator[Request]:
        """The requests that are not settled."""
        return (request for group in self._owed.values() for request in group if request.verdict is None)

    def stale_numbers(self) -> set[EventFd]:
        """Numbers that no new event may get."""
        return {fd for fd, group in self._owed.items() if any(request.stale for request in group)}

    def _needs(
        self, event: PreAccess, identity: Identity
    ) -> tuple[tuple[tuple[ObjectKey, Range], ...], bool]:
        if not event.count:
            return (), False
        guarded = self._by_identity.get(identity)
        if guarded is None:
            return (), identity not in self._released
        want = Range.of(event.offset, event.count).clamp(guarded.size)
        return (((guarded.key, want),), False) if want else ((), False)
