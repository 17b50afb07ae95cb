"""The socket between keeper and worker.

One datagram-preserving socketpair carries small JSON messages, some with a descriptor (SCM_RIGHTS). The
worker asks the keeper to hold a blob's descriptor *before* it marks the blob, and to let go of it *after* the
mark is gone, so that at every instant in which a mark can stop a reader, somebody who outlives the worker has
a silent way to write that blob.

| from   | message            | descriptor | answer                            |
|--------|--------------------|------------|-----------------------------------|
| worker | ``hold NAME``      | the blob's | ``held NAME`` or ``refused NAME`` |
| worker | ``release NAME``   |            | ``released NAME``                 |
| worker | ``ready``          |            |                                   |
| worker | ``finished``       |            |                                   |
| worker | ``failed REPLY``   |            |                                   |
| keeper | ``stop``           |            | the worker's exit                 |
| keeper | ``ping``           |            | ``pong``                          |
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from erofsd.errors import ErofsdError

MESSAGE_MAX_SIZE = 32 << 10
LOST_S = 1.0


@dataclass(frozen=True, slots=True)
class Message:
    """One message: a verb, its subject, and a descriptor that is the receiver's to close."""

    verb: str
    name: str = ""
    fd: int | None = None


class LinkLost(Exception):
    """The other end is gone."""


def pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair: the keeper's end and the worker's."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, verb: str, name: str = "", *, fd: int | None = None) -> None:
    """Send one message.

    Raises:
        LinkLost: The other end is gone.
    """
    payload = json.dumps([verb, name]).encode()
    try:
        if fd is None:
            sock.sendall(payload)
        else:
            socket.send_fds(sock, [payload], [fd])
    except (BrokenPipeError, ConnectionResetError) as exc:
        raise LinkLost from exc


def receive(sock: socket.socket) -> Message:
    """Receive one message.

    Raises:
        LinkLost: The other end is gone.
        BlockingIOError: Nothing there, and the socket does not wait.
    """
    try:
        payload, fds, _flags, _address = socket.recv_fds(sock, MESSAGE_MAX_SIZE, 1)
    except ConnectionResetError as exc:
        raise LinkLost from exc
    if not payload:
        raise LinkLost
    for fd in fds:
        os.set_inheritable(fd, False)  # recv_fds() drops the flag that would ask the kernel for it
    verb, name = json.loads(payload)
    return Message(verb, name, fds[0] if fds else None)


class WorkerLink:
    """The worker's end, on its event loop.

    Args:
        on_stop: Called when the keeper asks for an orderly end.
        on_lost: Called once when the keeper is gone.
    """

    def __init__(
        self, sock: socket.socket, *, on_stop: Callable[[], None], on_lost: Callable[[], None]
    ) -> None:
        self._sock = sock
        self._sock.setblocking(False)
        self._on_stop = on_stop
        self._on_lost = on_lost
        self._acknowledgements: dict[tuple[str, str], asyncio.Future[None]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._on_readable)

    async def hold(self, name: str, fd: int) -> None:
        """Have the keeper hold a duplicate of *fd* under *name*; returns when it does.

        Raises:
            ErofsdError: It cannot, or the service manager cannot.
        """
        await self._exchange("hold", "held", name, fd)

    async def release(self, name: str) -> None:
        """Have the keeper close what it holds under *name*; returns when it has."""
        await self._exchange("release", "released", name, None)

    def ready(self) -> None:
        """Tell the keeper that requests can be answered: it then shows the API socket."""
        send(self._sock, "ready")

    def finished(self) -> None:
        """Tell the keeper that this worker ends because there is nothing left to do."""
        send(self._sock, "finished")

    def failed(self, reply: str) -> None:
        """Tell the keeper that the one mount it was started for cannot be; *reply* is an ErrorReply."""
        send(self._sock, "failed", reply)

    async def _exchange(self, verb: str, answer: str, name: str, fd: int | None) -> None:
        while (pending := self._acknowledgements.get((answer, name))) is not None:
            await asyncio.wait([pending])
        future: asyncio.Future[None] = self._loop.create_future()
        self._acknowledgements[answer, name] = future
        try:
            send(self._sock, verb, name, fd=fd)
            await future
        except LinkLost as exc:
            await asyncio.sleep(LOST_S)  # the end of the keeper is about to be noticed
            raise ErofsdError(f"{name}: the keeper is gone, and none has taken its place") from exc
        finally:
            del self._acknowledgements[answer, name]

    def _on_readable(self) -> None:
        try:
            message = receive(self._sock)
        except BlockingIOError:
            return
        except LinkLost:
            self._loop.remove_reader(self._sock.fileno())
            self._on_lost()
            return
        if message.verb == "stop":
            self._on_stop()
        elif message.verb == "ping":
            with contextlib.suppress(LinkLost):
                send(self._sock, "pong")
        elif message.verb == "refused":
            self._refuse(message.name)
        elif (future := self._acknowledgements.get((message.verb, message.name))) and not future.done():
            future.set_result(None)

    def _refuse(self, name: str) -> None:
        if (future := self._acknowledgements.get(("held", name))) and not future.done():
            future.set_exception(
                ErofsdError(
                    f"{name}: the service manager does not hold its descriptor",
                    hint="raise FileDescriptorStoreMax= in the unit of erofsd, or see the daemon's log",
                )
            )
