"""The asyncio shell around /dev/cachefiles in on-demand mode: read, hand over, write what comes back.

The device belongs to a process that outlives this one (a *keeper*); when its last descriptor closes, every
mount is broken for good. The keeper holds no descriptor of an object: an OPEN that is offered again while one
is open fails. What a worker does, in this order:

    device_fd = open_device(directory)     # in the keeper, once
    engine = CachefilesEngine(device_fd, deadline_s=60)
    engine.restore()                       # unless it is the first worker on that device
    serve(provider)                        # OPEN, READ and CLOSE

Nothing in this process mounts, or reads a file of a mount: see `ondemand.fscache`.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, assert_never, cast

import structlog

from ondemand.binding import RESTORE_HINT, Limits, open_device
from ondemand.cachefiles import CacheFileSink, Device
from ondemand.deadlines import Budget, Deadlines
from ondemand.engines.base import EngineStatistics
from ondemand.errors import DeviceLost, EngineUnavailable, FillError, MalformedMessage
from ondemand.protocol.cachefiles import (
    BLOCK_SIZE,
    CachefilesProtocol,
    Object,
    Owed,
    Request,
    SizeChanged,
    State,
)
from ondemand.provider import ObjectKey, Provider
from ondemand.ranges import Range
from ondemand.wire import cachefiles as wire

__all__ = ["BLOCK_SIZE", "CacheFileSink", "CachefilesEngine", "Device", "Limits", "open_device"]

log = structlog.get_logger("ondemand.cachefiles")

BATCH_MAX = 16
"""Most messages read at once; then the loop has its turn."""

IN_FLIGHT_MAX = 4096
"""Most requests in flight. Further ones stay in the kernel's queue, which has no bound."""

BREAK_S = 0.1
"""How long nothing is read after a request that could not be delivered."""

LOOKS_MAX = 2
"""So often a range is filled, before it is given up that the kernel finds it."""

_NOT_DELIVERED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EEXIST, errno.EBUSY})
_ZEROS = memoryview(mmap.mmap(-1, 1 << 17, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)).toreadonly()


class CachefilesEngine:
    """Serves the requests of one device.

    Args:
        device: From `open_device`, or anything that behaves as one.
        deadline_s: A reader gets right bytes or EIO that soon.
        open_deadline_s: A mount that the provider neither accepts nor refuses fails that soon; by default the
            same. It cannot be killed until then.

    Attributes:
        device: What it serves.
        make_room: Called, from any thread, when a write finds the file system fuller than the cache's limits
            allow; returns False if that was in vain.
    """

    name = "cachefiles"

    def __init__(
        self, device: int | Device, *, deadline_s: float, open_deadline_s: float | None = None
    ) -> None:
        self.statistics = EngineStatistics()
        self.device = self._device = Device(device) if isinstance(device, int) else device
        self.make_room: Callable[[], bool] = lambda: False
        self._protocol = CachefilesProtocol()
        self._deadlines = Deadlines(deadline_s)
        self._open_deadline_s = deadline_s if open_deadline_s is None else open_deadline_s
        self._sinks: dict[Object, CacheFileSink] = {}
        self._tasks_of: dict[Owed, asyncio.Task[None]] = {}
        self._provider: Provider | None = None
        self._loop: asyncio.AbstractEventLoop
        self._tasks: asyncio.TaskGroup
        self._halted: asyncio.Future[None]
        self._serving = self._reading = False

    def restore(self) -> None:
        """Have the kernel offer again what a dead worker has read and not answered. Before `serve`.

        Raises:
            EngineUnavailable: This kernel cannot, or the cache is dead.
        """
        try:
            self._device.command(wire.Restore())
        except OSError as exc:
            hint = RESTORE_HINT if exc.errno == errno.EOPNOTSUPP else ""
            raise EngineUnavailable(f"restore: {exc}", hint) from exc

    def forget(self, key: ObjectKey) -> None:
        """The file of *key* was deleted: its next opening may have another size."""
        self._protocol.forget(key)

    # -- serving ----------------------------------------------------------------------------------------

    async def serve(self, provider: Provider) -> None:
        """See `ondemand.engines.base.Engine.serve`. Once in the life of an engine."""
        self._provider = provider
        self._loop = asyncio.get_running_loop()
        self._halted = self._loop.create_future()
        self._serving = True
        try:
            async with asyncio.TaskGroup() as self._tasks:
                try:
                    self._start_reading()
                    await self._halted
                finally:
                    # Before the group cancels its tasks: they leave their requests to the successor.
                    self._stop_reading()
                    self._serving = False
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None  # of `_halted`; tasks do not fail

    async def aclose(self, *, deny: bool) -> None:
        """See `ondemand.engines.base.Engine.aclose`. Denies what is still queued, too.

        A mount that is there stays usable for as long as somebody has the device. Its readers, denied, may
        ask again: repeat this, or close the device. With *deny*, objects stay open until `close`.
        """
        if not deny:
            self.close()
            return
        for owed in self._protocol.owed():
            self._deny(owed)
        while message := self._read():
            denied = self._admit(message)
            if denied is not None:
                self._deny(denied)

    def close(self) -> None:
        """Close the descriptors of all objects; what is unanswered is a successor's, with its `restore`."""
        for sink in self._sinks.values():
            sink.close()
        self._sinks.clear()

    def _start_reading(self) -> None:
        if not self._reading and not self._halted.done():
            self._reading = True
            # For reading only: "writable" means that space is short.
            self._loop.add_reader(self._device.fileno(), self._on_readable)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._device.fileno())

    def _halt(self, exc: Exception) -> None:
        """End `serve`: a lost device, or a bug. What is unanswered is a successor's."""
        if not self._halted.done():
            self._halted.set_exception(exc)
        self._stop_reading()

    def _on_readable(self) -> None:
        try:
            for _ in range(BATCH_MAX):
                if self._protocol.owed_count >= IN_FLIGHT_MAX:
                    self._stop_reading()  # let further requests queue in the kernel
                    return
                message = self._read()
                if message is None:
                    return
                self._begin(message)
        except Exception as exc:  # the loop would log it and go on
            self._halt(exc)

    def _read(self) -> wire.Message | None:
        try:
            buf = self._device.read()
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as exc:
            self._read_failed(exc)
            return None
        if not buf:  # an empty queue reads as 0 bytes here, not EAGAIN and not EOF
            return None
        self.statistics.events += 1
        return wire.parse(buf)

    def _read_failed(self, exc: OSError) -> None:
        if exc.errno == errno.EMSGSIZE:
            raise MalformedMessage(f"a message has more than {wire.MSG_MAX_SIZE} bytes") from exc
        if exc.errno not in _NOT_DELIVERED:
            raise DeviceLost(f"reading requests: {exc}") from exc
        # No descriptor could be made for an OPEN: the kernel has failed it, and the mount with it. If it was
        # for a READ that waits, it comes again at once, until there is a descriptor: take a break.
        self.statistics.errors += 1
        log.error("open.failed", engine=self.name, errno=exc.errno)
        if self._serving:
            self._stop_reading()
            self._loop.call_later(BREAK_S, self._go_on)

    def _go_on(self) -> None:
        if self._serving:
            self._start_reading()

    # -- requests ---------------------------------------------------------------------------------------

    def _admit(self, message: wire.Message) -> Owed | None:
        """Note *message*; returns what is owed now."""
        owed: Owed | None = None
        match message:
            case wire.Open():
                owed = self._admit_open(message)
            case wire.Read():
                owed = self._protocol.admit_read(message)
                self.statistics.stale += owed.stale
            case wire.Close():
                ended = self._protocol.admit_close(message)
                if ended is not None:
                    self._let_go(ended)
            case _:
                assert_never(message)
        self.statistics.in_flight = self._protocol.owed_count
        return owed

    def _admit_open(self, message: wire.Open) -> Object:
        sink = CacheFileSink(self._device, message.fd, lambda: self.make_room())
        try:
            os.set_inheritable(message.fd, False)  # the kernel does not
            opening, ended = self._protocol.admit_open(message)
        except BaseException:
            sink.close()
            raise
        if ended is not None:
            self._let_go(ended)
        self._sinks[opening] = sink
        return opening

    def _begin(self, message: wire.Message) -> None:
        match self._admit(message):
            case Object() as opening:
                self._begin_open(opening)
            case Request() as request:
                self._begin_read(request)

    def _start(self, owed: Owed, work: Coroutine[Any, Any, None]) -> None:
        task = self._tasks_of[owed] = self._tasks.create_task(work)
        task.add_done_callback(lambda _: self._tasks_of.pop(owed, None))

    def _deny(self, owed: Owed) -> None:
        match owed:
            case Object():
                self._answer_open(owed, -errno.EIO)
            case Request():
                self._answer(owed, errno.EIO)

    def _let_go(self, ended: Object) -> None:
        """The kernel has ended an object: nobody waits for its requests any more."""
        waiting: tuple[Owed, ...] = (ended, *ended.reads)
        for owed in waiting:
            if task := self._tasks_of.get(owed):
                task.cancel()
        self._sinks.pop(ended).close()
        self._note(ended).debug("object.closed")
        if self._provider is not None:
            try:
                self._provider.closed(ended.key)
            except Exception:
                self._note(ended).exception("request.crashed")

    # -- OPEN -------------------------------------------------------------------------------------------

    def _begin_open(self, opening: Object) -> None:
        if not opening.is_servable:
            self._note(opening).error("open.refused", reason="its name is too long for a file of its own")
            self._answer_open(opening, -errno.ENAMETOOLONG)
        else:
            self._start(opening, self._serve_open(opening))

    async def _serve_open(self, opening: Object) -> None:
        try:
            with self._owed_open(opening) as answer:
                async with asyncio.timeout(self._open_deadline_s):
                    answer.append(await self._open(opening))
        except Exception as exc:  # from answering: whatever a provider raises ends in _owed_open()
            self._halt(exc)

    async def _open(self, opening: Object) -> int:
        assert self._provider is not None
        sink = self._sinks[opening]
        size = await self._provider.open(opening.key, sink)
        try:
            self._protocol.check_size(opening, size)
            file_size = sink.file_size()
            if file_size is not None and size > file_size:  # opened by a worker before us, with less
                raise SizeChanged(f"{opening.key} has {size} bytes now, its file {file_size}", errno.ESTALE)
        except FillError:
            self._provider.closed(opening.key)
            raise
        return size

    @contextmanager
    def _owed_open(self, opening: Object) -> Iterator[list[int]]:
        """Answer the OPEN exactly once, however the body ends, or leave it to a successor.

        With the size that the body has put into the list, else with an errno.
        """
        answer: list[int] = []
        verdict = errno.EIO
        try:
            yield answer
        except FillError as exc:
            verdict = exc.errno or errno.EIO
            self._note(opening).error("open.refused", errno=verdict, reason=str(exc))
        except TimeoutError:
            verdict = errno.ETIMEDOUT
            self._note(opening).error("open.refused", errno=verdict, reason="the deadline has passed")
        except Exception:
            self._note(opening).exception("request.crashed")
        finally:
            # Closed meanwhile: nothing is owed. Stopped: the kernel offers it to the successor.
            if opening.state is State.OPENING and (answer or self._serving):
                self._answer_open(opening, answer[0] if answer else -verdict)

    def _answer_open(self, opening: Object, answer: int) -> None:
        """Write the answer.

        Args:
            answer: A size, or a negative errno.
        """
        sink = self._sinks[opening]
        if answer >= 0:
            self._protocol.opened(opening, answer)
        elif (file_size := sink.file_size()) is not None:
            # A READ may be what opens it, and could not be answered: see the protocol's fourth rule.
            answer = self._protocol.adopted(opening, file_size)
            self._note(opening).error("object.lost")
        else:
            self._protocol.refused(opening)
            self.statistics.errors += 1
        sink.answered()
        try:
            self._device.command(wire.Copen(opening.msg_id, answer))
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise DeviceLost(f"answering OPEN {opening.msg_id}: {exc}") from exc
            self._note(opening).warning("open.withdrawn", msg_id=opening.msg_id)
        if answer < 0:
            del self._sinks[opening]
            sink.close()
        else:
            self._note(opening).debug("object.opened", length=answer)
        self._answered()

    # -- READ -------------------------------------------------------------------------------------------

    def _begin_read(self, request: Request) -> None:
        # A hit is answered here, without a task. It is rare: another fill was faster than the request.
        reading = request.object
        assert self._provider is not None
        try:
            hit = (
                reading.state is not State.LOST
                and self._provider.present(reading.key, request.want)
                and self._sinks[reading].holds(request.want)
            )
        except Exception:
            self._note(reading, request).exception("request.crashed")
            self._answer(request, errno.EIO)
            return
        if hit:
            self.statistics.hits += 1
            self._answer(request, 0)
        else:
            budget = self._deadlines.admit(reading.key, request.want, 0, self._loop.time())
            self._start(request, self._serve_read(request, budget))

    async def _serve_read(self, request: Request, budget: Budget) -> None:
        try:
            with self._owed(request, budget):
                async with asyncio.timeout_at(budget.expires):
                    await self._fill(request)
        except Exception as exc:  # from answering: whatever a provider raises ends in _owed()
            self._halt(exc)

    async def _fill(self, request: Request) -> None:
        """Have *request* filled, until the kernel finds it.

        What the provider believes and what is in the file may differ: it was culled, or thrown away because
        the size had changed. Opening it again makes the provider look.
        """
        reading, want = request.object, request.want
        sink = self._sinks[reading]
        assert self._provider is not None
        if reading.state is State.LOST:
            self._protocol.regained(reading, await self._open(reading))
        for _ in range(LOOKS_MAX):
            await self._provider.fill(reading.key, want, sink)
            end = Range(0, reading.size).aligned(BLOCK_SIZE).stop
            past_end = Range(max(want.start, end), max(want.stop, end))
            if not sink.holds(past_end):
                await asyncio.to_thread(_write_zeros, sink, past_end)
            if sink.holds(want):
                return
            self._note(reading, request).warning("fill.lost")
            await self._open(reading)
        raise FillError(f"{want} of {reading.key} was filled, and is not there")

    @contextmanager
    def _owed(self, request: Request, budget: Budget) -> Iterator[None]:
        """Answer *request* exactly once, however the body ends, or leave it to a successor."""
        reading, verdict = request.object, errno.EIO
        try:
            yield
            verdict = 0
        except (FillError, OSError) as exc:
            if isinstance(exc, TimeoutError):
                elapsed_ms = round((self._loop.time() - budget.start) * 1000)
                self._note(reading, request).warning("miss.expired", elapsed_ms=elapsed_ms)
            else:
                verdict = exc.errno or errno.EIO
                self._note(reading, request).warning("fill.failed", errno=verdict, reason=str(exc))
        except Exception:
            self._note(reading, request).exception("request.crashed")
        finally:
            if not verdict:
                self.statistics.fills += 1
                self._answer(request, 0)
            elif self._serving and reading.state is not State.CLOSING:
                now = self._loop.time()
                self._deadlines.denied(reading.key, request.want, 0, budget, now)
                self._answer(request, verdict)
            # else the kernel has ended it; or we stop, and it offers it to the successor

    def _answer(self, request: Request, verdict: int) -> None:
        """Let the reader look. What it does not find then, because of *verdict*, is EIO."""
        if not self._protocol.settle(request):
            return
        if verdict:
            self.statistics.errors += 1
        try:
            self._sinks[request.object].complete(request.msg_id)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise DeviceLost(f"answering READ {request.msg_id}: {exc}") from exc
            self._note(request.object, request).debug("answer.late")  # its reader was killed
        self._answered()

    def _answered(self) -> None:
        self.statistics.in_flight = self._protocol.owed_count
        self._go_on()

    def _note(self, about: Object, request: Request | None = None) -> structlog.typing.FilteringBoundLogger:
        bound = log.bind(engine=self.name, object_id=str(about.key))
        if request is not None:
            bound = bound.bind(msg_id=request.msg_id, offset=request.want.start, length=len(request.want))
        return cast(structlog.typing.FilteringBoundLogger, bound)


def _write_zeros(sink: CacheFileSink, hole: Range) -> None:
    for start in range(hole.start, hole.stop, len(_ZEROS)):
        sink.write(start, _ZEROS[: hole.stop - start])
