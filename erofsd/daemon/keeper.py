"""The keeper: holds what must outlive the worker, does nothing else.

fanotify fails open: when the last descriptor of a pre-content group is closed, every waiting reader is let go
with zeros, and so is every later one. So the descriptors belong to two processes, and whichever of them is
killed, the other starts its replacement:

- The **keeper** is the process started as ``erofsd serve``. It holds the group, the journal of unanswered
  events, a descriptor of each incomplete blob (opened before its mark), the API's listening socket and the
  lock on the state directory. It never reads the group and never touches a blob. It has one thread and no
  event loop, and imports all that the worker needs, because:
- The **worker** is its only child, made by fork without exec: it inherits all of the above at once and serves
  within milliseconds, which is what a node needs whose worker was just killed under eight readers.
- If the *keeper* dies, the worker sees its socket end and executes itself anew as keeper (``Inheritance``),
  with the same descriptors. To the new keeper that is a worker's death like any other: events which were
  read but not answered are in the journal.

Nobody else may have these descriptors: they are close-on-exec, and neither process forks without exec but for
the keeper's worker.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import hashlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import msgspec
import structlog

from erofsd.api import ErrorReply, MountRequest
from erofsd.config import Config
from erofsd.daemon import link
from erofsd.errors import ErofsdError
from ondemand.engines import fanotify, probe
from ondemand.errors import EngineUnavailable
from ondemand.journal import Journal

INHERITANCE_ENVIRONMENT = "EROFSD_INHERITANCE"  # number of a memfd that holds an Inheritance as JSON
FAST_EXIT_S = 1.0  # a worker that ends by itself sooner than this is failing, not being killed
BACKOFF_MAX_S = 5.0

log = structlog.get_logger("erofsd.keeper")


@dataclass(slots=True)
class Inheritance:
    """Descriptors that outlive any one process; the numbers are the owner's own.

    Attributes:
        engines: Name of each engine that works here to the descriptor that its requests come from:
            fanotify's group, the cachefiles device.
        why_not: Name of each other engine to reason and remedy.
        journal: memfd of the journal.
        listener: The API's listening Unix socket.
        lock: The lock on the state directory.
        blobs: Name of a stored blob to a descriptor of it, opened before its mark.
        served: True once a worker has served with these: what is mounted was guarded ever since.
    """

    engines: dict[str, int]
    why_not: dict[str, Sequence[str]]
    journal: int
    listener: int
    lock: int
    blobs: dict[str, int] = field(default_factory=dict)
    served: bool = False

    def descriptors(self) -> list[int]:
        """All of them."""
        return [self.journal, self.listener, self.lock, *self.engines.values(), *self.blobs.values()]

    def execute_keeper(self) -> NoReturn:
        """Become the keeper: execute this program anew with these descriptors.

        Raises:
            OSError: The program is not there any more.
        """
        memory = os.memfd_create("erofsd-inheritance", 0)
        fields = {name: getattr(self, name) for name in self.__slots__}
        os.write(memory, json.dumps(fields).encode())
        for fd in self.descriptors():
            os.set_inheritable(fd, True)
        os.execve(
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            {**os.environ, INHERITANCE_ENVIRONMENT: str(memory)},
        )

    @classmethod
    def adopt(cls) -> Inheritance | None:
        """What a predecessor left to this process, if it did."""
        number = os.environ.pop(INHERITANCE_ENVIRONMENT, None)
        if number is None:
            return None
        with open(int(number), "rb") as memory:
            memory.seek(0)
            fields = json.load(memory)
        # The program may have been replaced in between: what only one of the two versions knows is left out.
        inheritance = cls(**{name: fields[name] for name in cls.__slots__ if name in fields})
        for fd in inheritance.descriptors():
            os.set_inheritable(fd, False)
        return inheritance


def create(config: Config) -> Inheritance:
    """Make the descriptors of a first keeper.

    Raises:
        ErofsdError: Another daemon serves this state directory or socket.
    """
    state_dir = Path(config.state_dir)
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(lock)
        raise ErofsdError(
            f"another erofsd serves the state directory {state_dir}",
            hint="use `erofsd ls` to see it, or give this one its own --state-dir and --socket",
        ) from exc
    listener = _listen(Path(config.socket))
    journal = os.memfd_create("erofsd-journal", os.MFD_CLOEXEC)
    Journal.create(journal)
    inheritance = Inheritance({}, {}, journal, listener.detach(), lock)
    for name, start in STARTERS.items():
        try:
            inheritance.engines[name] = start(state_dir)
        except EngineUnavailable as exc:
            inheritance.why_not[name] = (exc.reason, exc.hint)
    return inheritance


def _start_fanotify(state_dir: Path) -> int:
    found = probe("fanotify", str(state_dir))
    if not found.works:
        raise EngineUnavailable(found.reason, found.hint)
    return fanotify.open_group()


STARTERS: dict[str, Callable[[Path], int]] = {"fanotify": _start_fanotify}
"""What makes the descriptor of each engine, in the order in which ``auto`` prefers them."""


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.starting")


def _listen(path: Path) -> socket.socket:
    """A listening socket beside *path*, moved there once the worker can answer."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK):
                raise ErofsdError(f"socket {path}: {exc.strerror}") from exc
        else:
            raise ErofsdError(f"another erofsd answers on {path}", hint="give this one its own --socket")
    listener = socket.socket(socket.AF_UNIX)
    hidden = _hidden(path)
    hidden.unlink(missing_ok=True)
    old_mask = os.umask(0o177)
    try:
        listener.bind(str(hidden))
    except OSError as exc:
        raise ErofsdError(
            f"socket {path}: {exc.strerror}", hint="a Unix socket's path has at most 107 bytes"
        ) from exc
    finally:
        os.umask(old_mask)
    listener.listen(1024)
    return listener


class Failed(ErofsdError):
    """The worker could not do the one thing it was started for."""

    def __init__(self, reply: ErrorReply) -> None:
        super().__init__(reply.error, hint=reply.hint)
        self.exit_code = reply.exit_code


class Keeper:
    """Forks the worker, holds descriptors for it, and forks it again when it dies."""

    def __init__(self, config: Config, inheritance: Inheritance, only: MountRequest | None = None) -> None:
        self._config = config
        self._inheritance = inheritance
        self._only = only
        self._failure: ErrorReply | None = None
        self._socket_path = Path(config.socket)
        self._worker_pid = 0
        self._link: socket.socket | None = None
        self._stopping = False
        self._failures = 0

    def run(self) -> int:
        """Serve until told to stop; returns the exit code."""
        wakeup_read, wakeup_write = socket.socketpair()
        for end in (wakeup_read, wakeup_write):
            end.setblocking(False)
        signal.set_wakeup_fd(wakeup_write.fileno())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self._write_pid("keeper.pid", os.getpid())
        gc.collect()
        gc.freeze()  # shared with every worker: reference counts aside, a fork copies none of it
        while True:
            started = time.monotonic()
            self._fork_worker([wakeup_read, wakeup_write])
            status = self._attend(wakeup_read)
            if self._failure is not None or (self._stopping and os.WIFEXITED(status)):
                # Only an orderly end takes the files away: after any other, the worker goes on with them.
                self._clean_up()
                if self._failure is not None:
                    raise Failed(self._failure)
                return os.WEXITSTATUS(status)
            log.warning("worker.lost", pid=self._worker_pid, status=os.waitstatus_to_exitcode(status))
            self._back_off(status, time.monotonic() - started)

    def _fork_worker(self, mine: list[socket.socket]) -> None:
        keeper_end, worker_end = link.pair()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            keeper_end.close()
            signal.set_wakeup_fd(-1)
            for end in mine:
                end.close()
            # A terminal's ^C reaches both processes: the keeper decides, the worker is told.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            from erofsd.daemon.app import run_worker

            run_worker(self._config, self._inheritance, worker_end, self._only)
        worker_end.close()
        self._link = keeper_end
        self._worker_pid = pid
        self._write_pid("worker.pid", pid)
        if self._stopping:
            self._ask_to_stop()

    def _attend(self, wakeup: socket.socket) -> int:
        """Answer the worker until it ends; returns its wait status."""
        assert self._link is not None
        poll = select.poll()
        poll.register(wakeup, select.POLLIN)
        poll.register(self._link, select.POLLIN)
        listening = True
        while True:
            for fd, _events in poll.poll():
                if fd == wakeup.fileno():
                    self._on_signals(wakeup.recv(64))
                elif listening:
                    try:
                        self._on_message(link.receive(self._link))
                    except link.LinkLost:
                        poll.unregister(self._link)
                        listening = False
            pid, status = os.waitpid(self._worker_pid, os.WNOHANG)
            if pid:
                if listening:
                    self._drain()
                self._link.close()
                return status

    def _drain(self) -> None:
        """Take what the dead worker had sent: a descriptor it asked us to hold may guard a marked blob."""
        assert self._link is not None
        self._link.setblocking(False)
        with contextlib.suppress(link.LinkLost, BlockingIOError):
            while True:
                self._on_message(link.receive(self._link))

    def _on_signals(self, numbers: bytes) -> None:
        if {signal.SIGTERM, signal.SIGINT} & set(numbers) and not self._stopping:
            self._stopping = True
            self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        assert self._link is not None
        with contextlib.suppress(link.LinkLost):
            link.send(self._link, "stop")

    def _on_message(self, message: link.Message) -> None:
        assert self._link is not None
        blobs = self._inheritance.blobs
        if message.verb == "hold":
            assert message.fd is not None
            if (old := blobs.pop(message.name, None)) is not None:
                os.close(old)
            blobs[message.name] = message.fd
            self._answer("held", message.name)
        elif message.verb == "release":
            if (old := blobs.pop(message.name, None)) is not None:
                os.close(old)
            self._answer("released", message.name)
        elif message.verb == "ready":
            self._failures = 0
            if _hidden(self._socket_path).exists():
                os.rename(_hidden(self._socket_path), self._socket_path)
                log.info("keeper.ready", socket=str(self._socket_path), worker=self._worker_pid)
            self._inheritance.served = True
        elif message.verb == "finished":
            self._stopping = True
        elif message.verb == "failed":
            self._failure = msgspec.json.decode(message.name, type=ErrorReply)

    def _answer(self, verb: str, name: str) -> None:
        assert self._link is not None
        with contextlib.suppress(link.LinkLost):
            link.send(self._link, verb, name)

    def _back_off(self, status: int, lived_s: float) -> None:
        """A killed worker is replaced at once; one that fails by itself again and again, ever slower."""
        if os.WIFSIGNALED(status) or lived_s > FAST_EXIT_S:
            return
        self._failures += 1
        time.sleep(min(BACKOFF_MAX_S, 0.05 * 2 ** min(self._failures, 10)))

    def _write_pid(self, name: str, pid: int) -> None:
        path = self._socket_path.with_name(name)
        temporary = path.with_name(f".{name}.{os.getpid()}")
        temporary.write_text(f"{pid}\n")
        temporary.rename(path)

    def _clean_up(self) -> None:
        for path in (
            self._socket_path,
            _hidden(self._socket_path),
            self._socket_path.with_name("keeper.pid"),
            self._socket_path.with_name("worker.pid"),
        ):
            path.unlink(missing_ok=True)


def main(config: Config, only: MountRequest | None = None) -> int:
    """Run ``erofsd serve`` until it is told to stop; returns the exit code.

    Args:
        only: Serve this one mount, and end when it is unmounted.

    Raises:
        ErofsdError: It cannot start, or *only* cannot be mounted.
    """
    import erofsd.daemon.app  # noqa: F401  # imported before the fork, so that every worker has it for free

    fanotify.raise_descriptor_limit()
    inheritance = Inheritance.adopt()
    if inheritance is not None:
        log.warning("keeper.replaced", pid=os.getpid(), blobs=len(inheritance.blobs))
    return Keeper(config, inheritance or create(config), only).run()


def standalone(config: Config, request: MountRequest) -> int:
    """Serve one mount in the foreground until it is unmounted; returns the exit code.

    It has a state directory and a socket of its own below the configured one, so any number of these can run
    beside each other and beside a daemon.

    Raises:
        ErofsdError: It cannot be mounted.
    """
    name = hashlib.sha256(request.dir.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    own = Path(config.state_dir) / "standalone" / name
    return main(msgspec.structs.replace(config, state_dir=own, socket=own / "api.sock"), request)
