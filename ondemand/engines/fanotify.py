"""The asyncio shell around fanotify's pre-content events: read, hand over, write what comes back.

The group, the journal and a descriptor of each guarded file belong to a process that outlives this one (a
*keeper*): when the last descriptor of a group closes, the kernel lets every waiting reader go with zeros.
What a worker does, in this order:

    engine = FanotifyEngine(group_fd, journal, deadline_s=60)
    held = engine.recover(held)      # before it opens anything: occupies the numbers of stale events
    engine.adopt(key, fd)            # each file that the dead worker guarded
    serve(provider)                  # stale events first, then new ones
    engine.guard(key, fd)            # further files, at any time, each before it is mounted

Why the loop's thread cannot wait for itself: reading and writing through a descriptor older than the mark,
through an event's descriptor, or through a duplicate of either, makes no event; and nothing in this process
opens a guarded file or a mount of it afresh, but from another thread, whose wait releases the GIL. An event
of our own process is served like any other, and that thread goes on.

Two operations on a guarded file make an event through any descriptor: truncate, and mmap of a mounted file.
The first belongs into a thread, the second into another process, because it holds the GIL.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import assert_never, cast

import structlog

from ondemand import syscalls
from ondemand.deadlines import Budget, Deadlines
from ondemand.engines.base import EngineStatistics
from ondemand.errors import (
    AnswerMisuse,
    DeviceLost,
    EngineUnavailable,
    FillError,
    MalformedMessage,
    NobodyReads,
)
from ondemand.journal import Journal
from ondemand.protocol.fanotify import FanotifyProtocol, Identity, Request, Slot
from ondemand.provider import ObjectKey, Provider, Sink
from ondemand.ranges import Range, RangeSet
from ondemand.syscalls import raise_descriptor_limit
from ondemand.wire import fanotify as wire

__all__ = [
    "BLOCK_SIZE",
    "FanotifyEngine",
    "FileSink",
    "Group",
    "open_group",
    "raise_descriptor_limit",
    "unavailable",
]

log = structlog.get_logger("ondemand.fanotify")

BLOCK_SIZE = 4096
BATCH_MAX = 8
"""Most events read at once; then the loop has its turn."""

_BROKEN = frozenset({errno.EBADF, errno.EFAULT, errno.ENOTCONN, errno.ENODEV})


def open_group() -> int:
    """A group for pre-content events; the caller closes it, after everything it guards is unmounted.

    Never without FAN_UNLIMITED_QUEUE: the reader of an event that does not fit is let go with zeros.

    Raises:
        EngineUnavailable: Not allowed here.
    """
    try:
        return syscalls.fanotify_init(
            syscalls.FAN_CLASS_PRE_CONTENT
            | syscalls.FAN_UNLIMITED_QUEUE
            | syscalls.FAN_UNLIMITED_MARKS
            | syscalls.FAN_NONBLOCK
            | syscalls.FAN_CLOEXEC,
            os.O_RDWR | syscalls.O_LARGEFILE | os.O_CLOEXEC,
        )
    except OSError as exc:
        raise unavailable(exc) from exc


def unavailable(exc: OSError) -> EngineUnavailable:
    """What the refusal of a group or a mark means, and what helps."""
    hints = {
        errno.EPERM: "run as root in the first user namespace: CAP_SYS_ADMIN is needed",
        errno.ENOSYS: "use a kernel with CONFIG_FANOTIFY and CONFIG_FANOTIFY_ACCESS_PERMISSIONS",
        errno.EINVAL: "the kernel has no pre-content events: use Linux 6.15 or later with "
        "CONFIG_FANOTIFY_ACCESS_PERMISSIONS, or another engine",
        errno.EOPNOTSUPP: "this file system takes no part (tmpfs and overlayfs do not): "
        "put the directory on ext4, xfs or btrfs",
        errno.EMFILE: "raise the limit of open files, or fs.fanotify.max_user_groups",
        errno.ENOSPC: "too many fanotify marks: end other programs that watch files",
    }
    return EngineUnavailable(str(exc), hints.get(exc.errno or 0, ""))


class Group:
    """A fanotify group as the engine sees it; `ondemand.testing.ScriptedDevice` is the other one.

    Args:
        group_fd: From `open_group`; belongs to the caller.
    """

    def __init__(self, group_fd: int) -> None:
        self._group_fd = group_fd

    def fileno(self) -> int:
        """Readable while an event can be read."""
        return self._group_fd

    def read(self, slots: list[memoryview]) -> int:
        """Read one event into each of *slots*, as many as there are; returns the number of bytes.

        One call for all of them: fanotify has no vectored read, so the kernel reads once per slot, and stops
        at the first one that stays empty.

        Raises:
            BlockingIOError: There is none.
            OSError: The event could not be delivered, and was denied (EMFILE and others).
        """
        return os.readv(self._group_fd, slots)

    def answer(self, response: bytes) -> None:
        """Raises FileNotFoundError if no event with that number waits."""
        os.write(self._group_fd, response)

    def mark(self, fd: int) -> None:
        """From now on, whoever opens the file that *fd* has open is asked for."""
        syscalls.fanotify_mark(self._group_fd, syscalls.FAN_MARK_ADD, syscalls.FAN_PRE_ACCESS, fd)

    def unmark(self, fd: int) -> None:
        """Raises FileNotFoundError if there is no mark."""
        syscalls.fanotify_mark(self._group_fd, syscalls.FAN_MARK_REMOVE, syscalls.FAN_PRE_ACCESS, fd)


class FileSink:
    """Writes into a guarded file.

    Args:
        fd: Writable, and opened before the file was marked, so that writing makes no events. A duplicate of
            it is kept until the last thread that uses the sink has let go: the caller may close it any time
            without bytes going astray.
    """

    block_size = BLOCK_SIZE

    def __init__(self, fd: int) -> None:
        self._fd = -1
        self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def fileno(self) -> int:
        """The duplicate; as silent as the original."""
        return self._fd

    def write(self, offset: int, data: memoryview) -> None:
        """See `ondemand.provider.Sink.write`."""
        if offset % BLOCK_SIZE or len(data) % BLOCK_SIZE:
            raise ValueError(f"{len(data)} bytes at {offset} are not whole blocks")
        while data:
            written = os.pwrite(self._fd, data, offset)
            offset += written
            data = data[written:]

    def data(self) -> RangeSet:
        """See `ondemand.provider.Sink.data`."""
        return syscalls.data_ranges(self._fd)


@dataclass(frozen=True, slots=True)
class _Stale:
    request: Request
    event: wire.PreAccess
    identity: Identity | None


class FanotifyEngine:
    """Serves the events of one group.

    Args:
        group: From `open_group`, or anything that behaves as one.
        journal: Where the events of this group are noted, by every process that ever reads them.
        deadline_s: A reader gets right bytes or EIO that soon.
    """

    name = "fanotify"

    def __init__(self, group: int | Group, journal: Journal, *, deadline_s: float) -> None:
        self.statistics = EngineStatistics()
        self._group = Group(group) if isinstance(group, int) else group
        self._journal = journal
        self._protocol = FanotifyProtocol()
        self._deadlines = Deadlines(deadline_s)
        self._sinks: dict[ObjectKey, FileSink] = {}
        self._stale: list[_Stale] = []
        self._occupied: set[int] = set()  # stale numbers that we hold with a descriptor of our own
        self._provider: Provider
        self._loop: asyncio.AbstractEventLoop
        self._tasks: asyncio.TaskGroup
        self._halted: asyncio.Future[None]
        self._in_flight_max = journal.slot_count
        self._serving = self._reading = False

    # -- a dead worker's events -------------------------------------------------------------------------

    def recover(self, held: Mapping[str, int] | None = None) -> dict[str, int]:
        """Find out what a dead worker left unanswered, and occupy those numbers.

        First of all, before anything opens a descriptor: the kernel gives a new event the lowest free number.
        A number at which this process has a descriptor already is occupied for as long as that is open.

        Args:
            held: Descriptors by name which their owner is going to close one day; not the group's and the
                journal's. If one of them sits on such a number, it is moved.

        Returns:
            *held*, with the numbers that they have now.
        """
        for entry in self._journal.entries():
            try:
                event = wire.parse(entry.event)
            except MalformedMessage as exc:
                self._refuse_unread(entry.event, Slot(entry.slot), exc)
                continue
            if isinstance(event, wire.Overflow):
                self._overflowed(Slot(entry.slot))
                continue
            request = self._protocol.admit_stale(event, Slot(entry.slot))
            self._stale.append(_Stale(request, event, entry.identity))
        self.statistics.stale = self.statistics.in_flight = len(self._stale)
        numbers = self._protocol.stale_numbers()
        for number in numbers:
            self._occupy(number)
        if numbers:
            log.info("events.recovered", engine=self.name, count=len(self._stale))
        return {
            name: self._move(fd) if wire.EventFd(fd) in numbers else fd for name, fd in (held or {}).items()
        }

    def _move(self, fd: int) -> int:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)  # stale numbers are all taken by now
        os.dup2(self._journal.fd, fd, inheritable=False)
        self._occupied.add(fd)
        return moved

    def _occupy(self, number: int) -> None:
        try:
            got = fcntl.fcntl(self._journal.fd, fcntl.F_DUPFD_CLOEXEC, number)  # the lowest free from there
        except OSError:
            return  # beyond the limit of open files: no event can get it either
        if got == number:
            self._occupied.add(number)
        else:
            os.close(got)

    def _refuse_unread(self, event: bytes, slot: Slot, exc: MalformedMessage) -> None:
        # Written by this kernel, read by a version of us that did not know it either and died of it. If we
        # died too, its reader would wait for ever; the number's place, at least, is the same in all versions.
        log.critical("event.malformed", engine=self.name, reason=str(exc))
        if len(event) >= wire.METADATA.size:
            fd = wire.EventFd(wire.METADATA.unpack_from(event)[5])
            try:
                self._group.answer(wire.encode_response(wire.Response(fd, errno.EIO)))
            except OSError as refused:
                log.error("event.unanswered", engine=self.name, msg_id=fd, errno=refused.errno)
        self._journal.clear(slot)

    # -- guarding ---------------------------------------------------------------------------------------

    def guard(self, key: ObjectKey, fd: int) -> Sink:
        """Have readers of a file wait for its bytes.

        Before it is mounted: for what is open already, nobody is asked.

        Args:
            fd: Open for reading and writing since before the first mark. The keeper holds it too by now. The
                file has its full size. Belongs to the caller.

        Returns:
            Where its bytes go. The same one, if *key* is guarded already.

        Raises:
            EngineUnavailable: The kernel or the file system refused.
            ValueError: *key* is guarded as another file.
        """
        try:
            self._group.mark(fd)
        except OSError as exc:
            raise unavailable(exc) from exc
        # Marked first: a file that is marked and not known here is denied to its readers, which is safe.
        status = os.fstat(fd)
        self._protocol.guard(key, (status.st_dev, status.st_ino), status.st_size)
        return self._sinks.setdefault(key, FileSink(fd))

    def adopt(self, key: ObjectKey, fd: int) -> Sink:
        """Guard a file that a dead worker guarded, between `recover` and `serve`.

        The mark is in place as a rule, and setting it again costs nothing; but the worker may have been
        killed just before it set it.
        """
        return self.guard(key, fd)

    def unguard(self, key: ObjectKey) -> None:
        """Ask nobody about *key* any more; its readers cost nothing from now on.

        Only when all of its bytes are there, verified, or when no superblock uses it: what is missing reads
        as zeros afterwards. Events that are under way are answered.

        Raises:
            KeyError: It is not guarded.
        """
        sink = self._sinks[key]
        try:
            self._group.unmark(sink.fileno())
        except FileNotFoundError:
            pass  # the goal is reached
        self._protocol.unguard(key)
        del self._sinks[key]

    def vouch(self, path: str) -> None:
        """Allow events about a file that a dead worker stopped guarding because all of its bytes are there.

        Such an event was queued before the mark went. Harmless where there is no such file.
        """
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return
        self._protocol.vouch((status.st_dev, status.st_ino))

    # -- serving ----------------------------------------------------------------------------------------

    async def serve(self, provider: Provider) -> None:
        """See `ondemand.engines.base.Engine.serve`. Once in the life of an engine."""
        self._provider = provider
        self._loop = asyncio.get_running_loop()
        self._halted = self._loop.create_future()
        self._serving = True
        # Each event holds a descriptor until it is answered; for want of one, the kernel denies the next.
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._in_flight_max = min(self._journal.slot_count, soft // 2)
        try:
            async with asyncio.TaskGroup() as self._tasks:
                try:
                    self._begin_stale()
                    self._start_reading()
                    await self._halted
                finally:
                    # Before the group cancels its tasks: they leave their requests to the successor.
                    self._stop_reading()
                    self._serving = False
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None  # of `_halted`; tasks do not fail

    async def aclose(self, *, deny: bool) -> None:
        """See `ondemand.engines.base.Engine.aclose`. Denies what is still queued, too."""
        if not deny:
            return
        for stale in self._stale:
            self._protocol.resolve(stale.request, stale.event, stale.identity)
        self._stale.clear()
        for request in list(self._protocol.owed()):
            self._answer(request, errno.EIO)
        while requests := self._read():
            for request in requests:
                self._answer(request, errno.EIO)

    def _start_reading(self) -> None:
        if not self._reading and not self._halted.done():
            self._reading = True
            self._loop.add_reader(self._group.fileno(), self._on_readable)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._group.fileno())

    def _halt(self, exc: Exception) -> None:
        """End `serve`: a lost device, or a bug. What is unanswered is a successor's."""
        if not self._halted.done():
            self._halted.set_exception(exc)
        self._stop_reading()

    def _on_readable(self) -> None:
        try:
            for request in self._read():
                self._begin(request)
            if self.statistics.in_flight >= self._in_flight_max:
                self._stop_reading()  # let further events queue in the kernel
        except Exception as exc:  # the loop would log it and go on
            self._halt(exc)

    def _read(self) -> list[Request]:
        room = self._in_flight_max - self.statistics.in_flight
        slots, buffers = self._journal.claim(max(0, min(BATCH_MAX, room)))
        if not slots:
            return []
        used = 0
        try:
            length = self._group.read(buffers)
            used = -(-length // wire.EVENT_SIZE)  # an overflow record is shorter, and ends the call
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as exc:
            self._read_failed(exc)
            return []
        finally:
            self._journal.unclaim(slots[used:])
        if not used:
            raise DeviceLost("the group's descriptor reads as empty: it is no fanotify group")
        # Before anything else: whoever is killed in between leaves events that could be about any file.
        identities = [
            self._identify(slot, buffer) for slot, buffer in zip(slots, buffers[:used], strict=False)
        ]
        events = []
        for slot, buffer, identity in zip(slots, buffers, identities, strict=False):
            message = wire.parse(buffer[: min(length, wire.EVENT_SIZE)])
            length -= wire.EVENT_SIZE
            match message:
                case wire.PreAccess():
                    events.append(self._protocol.admit(message, Slot(slot), identity))
                case wire.Overflow():
                    self._overflowed(Slot(slot))
                case _:
                    assert_never(message)
        self.statistics.events += len(events)
        self.statistics.in_flight += len(events)
        return events

    def _identify(self, slot: int, event: memoryview) -> Identity:
        fd = wire.METADATA.unpack_from(event)[5]
        if fd < 0:
            return 0, 0  # an overflow: the queue, not a file
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino)
        self._journal.identify(slot, identity)
        return identity

    def _overflowed(self, slot: Slot) -> None:
        self._journal.clear(slot)
        self.statistics.overflows += 1
        log.critical("events.overflowed", engine=self.name)

    def _read_failed(self, exc: OSError) -> None:
        if exc.errno in _BROKEN:
            raise DeviceLost(f"reading events: {exc}") from exc
        if exc.errno == errno.EINVAL:
            raise MalformedMessage(f"an event has more than {wire.EVENT_SIZE} bytes") from exc
        # No descriptor could be made for the event (EMFILE, ENFILE, ETXTBSY...): the kernel has denied it.
        self.statistics.errors += 1
        log.error("event.denied", engine=self.name, errno=exc.errno)

    def _begin_stale(self) -> None:
        stale, self._stale = self._stale, []
        for each in stale:
            self._protocol.resolve(each.request, each.event, each.identity)
        for each in stale:
            self._begin(each.request)

    def _begin(self, request: Request) -> None:
        # A hit is answered here, without a task: between the read and the answer nothing waits.
        if request.refused:
            path = None if request.stale else os.readlink(f"/proc/self/fd/{request.fd}")
            log.error("event.unguarded", engine=self.name, msg_id=request.fd, object_id=path)
            self._answer(request, errno.EIO)
            return
        try:
            missing = [need for need in request.needs if not self._provider.present(*need)]
        except Exception:
            log.exception("request.crashed", engine=self.name, msg_id=request.fd)
            self._answer(request, errno.EIO)
            return
        if missing:
            fills = [(key, want, self._sinks[key]) for key, want in missing]
            key, want = missing[0]
            budget = self._deadlines.admit(key, want, request.pid, self._loop.time())
            self._tasks.create_task(self._serve_miss(request, fills, budget))
        else:
            self.statistics.hits += 1
            self._answer(request, 0)

    async def _serve_miss(
        self, request: Request, fills: list[tuple[ObjectKey, Range, FileSink]], budget: Budget
    ) -> None:
        key, want, sink = fills[0]
        try:
            with self._owed(request, key, want, budget):
                async with asyncio.timeout_at(budget.expires):
                    if request.guessed:
                        await self._fill_all(fills)
                    else:
                        await self._provider.fill(key, want, sink)
        except Exception as exc:  # from answering: whatever a provider raises ends in _owed()
            self._halt(exc)

    async def _fill_all(self, fills: list[tuple[ObjectKey, Range, FileSink]]) -> None:
        async def fill(key: ObjectKey, want: Range, sink: FileSink) -> None:
            try:
                await self._provider.fill(key, want, sink)
            except NobodyReads:
                pass  # so that is not the one

        try:
            async with asyncio.TaskGroup() as group:
                for each in fills:
                    group.create_task(fill(*each))
        except ExceptionGroup as failed:
            raise FillError("not every file that could be meant was filled") from failed

    @contextmanager
    def _owed(self, request: Request, key: ObjectKey, want: Range, budget: Budget) -> Iterator[None]:
        """Answer *request* exactly once, however the body ends, or leave it to a successor."""
        verdict = errno.EIO
        try:
            yield
            verdict = 0
        except FillError as exc:
            verdict = exc.errno or errno.EIO
            self._note(request, key, want).warning("fill.failed", errno=verdict, reason=str(exc))
        except TimeoutError:
            elapsed_ms = round((self._loop.time() - budget.start) * 1000)
            self._note(request, key, want).warning("miss.expired", elapsed_ms=elapsed_ms)
        except Exception:
            self._note(request, key, want).exception("request.crashed")
        finally:
            if not verdict:
                self.statistics.fills += 1
                self._answer(request, 0)
            elif self._serving:
                self._deadlines.denied(key, want, request.pid, budget, self._loop.time())
                self._answer(request, verdict)
            # else it failed because we stop: the journal has it, and the successor fills it

    def _note(self, request: Request, key: ObjectKey, want: Range) -> structlog.typing.FilteringBoundLogger:
        return cast(
            structlog.typing.FilteringBoundLogger,
            log.bind(
                engine=self.name,
                object_id=str(key),
                msg_id=request.fd,
                offset=want.start,
                length=len(want),
            ),
        )

    def _answer(self, request: Request, verdict: int) -> None:
        """Settle *request*; answer all that this releases."""
        released = self._protocol.settle(request, verdict)
        if not released:
            return
        common = released[0].verdict or 0
        response = wire.encode_response(wire.Response(request.fd, common))
        for _ in released:
            try:
                self._group.answer(response)
            except FileNotFoundError as exc:
                if not any(other.stale for other in released):
                    raise AnswerMisuse(f"no event {request.fd} waits for an answer") from exc
            except OSError as exc:
                raise DeviceLost(f"answering event {request.fd}: {exc}") from exc
        # Only now: a closed number is free for the next event, and the journal knows it until all is done.
        for other in released:
            if not other.stale:
                os.close(other.fd)
            self._journal.clear(other.slot)
        if request.fd in self._occupied:
            self._occupied.remove(request.fd)
            os.close(request.fd)
        self.statistics.in_flight -= len(released)
        if common:
            self.statistics.errors += len(released)
        if self._serving:
            self._start_reading()
