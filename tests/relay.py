"""A wire to a real server that counts what goes over it, and can be cut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PIECE = 64 << 10


class Relay:
    """Passes TCP connections on to a port of this machine.

    Attributes:
        port: Where it listens.
        received: Bytes that came from clients, all connections together, and were passed on.
        cut_at: Once *received* is so many, all connections are reset, and new ones too; None: never.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.received = 0
        self.cut_at: int | None = None
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def host(self) -> str:
        """``127.0.0.1:port``, as in references."""
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        """End everything."""
        self._listener.close()
        self._reset_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            if self.cut_at is not None and self.received >= self.cut_at:
                _reset(client)
                continue
            server = socket.create_connection(("127.0.0.1", self.target_port))
            with self._lock:
                self._open |= {client, server}
            for source, sink, up in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._copy, args=(source, sink, up), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        try:
            while piece := source.recv(_PIECE):
                if up:
                    piece = self._count(piece)
                sink.sendall(piece)
                if up and self.cut_at is not None and self.received >= self.cut_at:
                    self._reset_all()
                    return
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(source, sink)

    def _count(self, piece: bytes) -> bytes:
        with self._lock:
            if self.cut_at is not None:
                piece = piece[: max(0, self.cut_at - self.received)]
            self.received += len(piece)
        return piece

    def _reset_all(self) -> None:
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            _reset(end)

    def _drop(self, *ends: socket.socket) -> None:
        with self._lock:
            self._open -= set(ends)
        for end in ends:
            _reset(end)


def _reset(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
    except OSError:
        pass
    end.close()


@contextmanager
def relay(target_port: int) -> Iterator[Relay]:
    """A Relay to *target_port*, closed at the end."""
    made = Relay(target_port)
    try:
        yield made
    finally:
        made.close()
