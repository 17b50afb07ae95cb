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

Nobody else may have these descriptors, but for the service manager (`inheritance`): they are close-on-exec,
and neither process forks without exec but for the keeper's worker.

Under systemd the manager's store is the third holder. The keeper has a descriptor stored before it says that
it holds it, and goes on when the manager has confirmed that: a mount waits for it, a miss never does.
SIGUSR1 means: leave everything to the successor. That is the next start of the service, which finds it in the
store; without a manager the keeper executes itself anew.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

import msgspec
import structlog

from erofsd.api import ErrorReply, MountRequest
from erofsd.config import Config
from erofsd.daemon import link
from erofsd.daemon.inheritance import (
    ENDS,
    ORDERS,
    STRAYS,
    Inheritance,
    forget_stored,
    hidden,
    note_served,
    obtain,
)
from erofsd.daemon.pulse import Due, Pulse
from erofsd.daemon.systemd import ManagerSilent, ServiceManager, short_name
from erofsd.errors import ErofsdError
from ondemand.engines import fanotify

CRASHED = 70  # exit code of a worker that did not mean to end; EX_SOFTWARE of sysexits.h
FAST_EXIT_S = 1.0  # a worker that ends by itself sooner than this is failing, not being killed
BACKOFF_MAX_S = 5.0
PATIENCE_MAX_S = 30.0
"""A worker that is silent for so long is hung; under a watchdog, half its interval if that is less."""

FIRST_FAILURES_MAX = 4  # before anything is guarded

log = structlog.get_logger("erofsd.keeper")


def _ended_in_order(status: int) -> bool:
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) != CRASHED


class Failed(ErofsdError):
    """The worker could not do the one thing it was started for."""

    def __init__(self, reply: ErrorReply) -> None:
        super().__init__(reply.error, hint=reply.hint)
        self.exit_code = reply.exit_code


class Keeper:
    """Forks the worker, holds descriptors for it, and forks it again when it dies."""

    def __init__(
        self,
        config: Config,
        inheritance: Inheritance,
        manager: ServiceManager,
        only: MountRequest | None = None,
    ) -> None:
        self._config = config
        self._inheritance = inheritance
        self._manager = manager
        self._only = only
        self._failure: ErrorReply | None = None
        self._socket_path = Path(config.socket)
        self._worker_pid = 0
        self._link: socket.socket | None = None
        self._stopping = False
        self._handing_over = False
        self._ready = False
        self._failures = 0
        self._patience_s = min(PATIENCE_MAX_S, (manager.watchdog_s or 2 * PATIENCE_MAX_S) / 2)
        self._pulse = Pulse(self._patience_s, time.monotonic())

    def run(self) -> int:
        """Serve until told to stop; returns the exit code."""
        wakeup_read, wakeup_write = socket.socketpair()
        for end in (wakeup_read, wakeup_write):
            end.setblocking(False)
        signal.set_wakeup_fd(wakeup_write.fileno())
        for number in ORDERS | STRAYS | {signal.SIGCHLD}:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ORDERS)
        self._write_pid("keeper.pid", os.getpid())
        gc.collect()
        gc.freeze()  # shared with every worker: reference counts aside, a fork copies none of it
        while True:
            started = time.monotonic()
            try:
                self._fork_worker([wakeup_read, wakeup_write])
            except OSError as exc:
                log.critical("worker.unstarted", error=str(exc))  # no memory, or too many processes
                time.sleep(BACKOFF_MAX_S)
                continue
            status = self._attend(wakeup_read)
            if self._failure is not None or (self._stopping and _ended_in_order(status)):
                # Only an orderly end takes the files away: after any other, the worker goes on with them.
                self._clean_up()
                if self._failure is not None:
                    raise Failed(self._failure)
                return os.WEXITSTATUS(status)
            if self._handing_over and self._hand_over():
                return 0
            self._manager.tell(STATUS="worker lost, starting another")
            log.warning("worker.lost", pid=self._worker_pid, status=os.waitstatus_to_exitcode(status))
            self._back_off(status, time.monotonic() - started)
            if self._failures >= FIRST_FAILURES_MAX and not self._guards_anything:
                self._clean_up()
                raise ErofsdError("the worker cannot start", hint="the log says why")

    @property
    def _guards_anything(self) -> bool:
        return self._inheritance.served or bool(self._inheritance.blobs)

    def _fork_worker(self, mine: list[socket.socket]) -> None:
        keeper_end, worker_end = link.pair()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            try:
                for end in (keeper_end, *mine):
                    end.close()
                self._be_worker(worker_end)
            finally:
                os._exit(CRASHED)  # whatever happens, never go on as a second keeper
        worker_end.close()
        self._link = keeper_end
        self._worker_pid = pid
        self._pulse = Pulse(self._patience_s, time.monotonic())
        self._write_pid("worker.pid", pid)
        if self._stopping:
            self._send("stop")

    def _be_worker(self, end: socket.socket) -> NoReturn:
        signal.set_wakeup_fd(-1)
        # A terminal's ^C reaches both processes: the keeper decides, the worker is told.
        for number in ORDERS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        from erofsd.daemon.app import run_worker

        run_worker(self._config, self._inheritance, end, self._only, failures=self._failures)

    def _attend(self, wakeup: socket.socket) -> int:
        """Answer the worker until it ends; returns its wait status."""
        assert self._link is not None
        poll = select.poll()
        poll.register(wakeup, select.POLLIN)
        poll.register(self._link, select.POLLIN)
        listening = True
        while True:
            for fd, _events in poll.poll(self._pulse.wait_s(time.monotonic()) * 1000):
                if fd == wakeup.fileno():
                    self._on_signals(wakeup.recv(64))
                elif listening:
                    try:
                        self._on_message(link.receive(self._link))
                    except link.LinkLost:
                        poll.unregister(self._link)
                        listening = False
                    except Exception:
                        # To end now would be the worst answer: with the worker dead too, readers get zeros.
                        log.exception("keeper.confused", worker=self._worker_pid)
            pid, status = os.waitpid(self._worker_pid, os.WNOHANG)
            if pid:
                if listening:
                    self._drain()
                self._link.close()
                return status
            self._feel_pulse()

    def _feel_pulse(self) -> None:
        match self._pulse.look(time.monotonic()):
            case Due.ASK:
                self._send("ping")
            case Due.ABORT:
                log.error("worker.hung", pid=self._worker_pid, silent_s=self._patience_s)
                os.kill(self._worker_pid, signal.SIGABRT)  # faulthandler writes where
            case Due.KILL:
                os.kill(self._worker_pid, signal.SIGKILL)
            case Due.NOTHING:
                pass

    def _hand_over(self) -> bool:
        """Leave all to the successor: True if it is the next start of the service, False if there is none."""
        log.info("keeper.handed_over", pid=os.getpid(), blobs=len(self._inheritance.blobs))
        if self._inheritance.stored:
            return True
        try:
            self._inheritance.execute_keeper()
        except OSError as exc:
            log.error("keeper.unchanged", error=str(exc), consequence="this version goes on")
            self._handing_over = False
            return False

    def _drain(self) -> None:
        """Take what the dead worker had sent: a descriptor it asked us to hold may guard a marked blob."""
        assert self._link is not None
        self._link.setblocking(False)
        with contextlib.suppress(link.LinkLost, BlockingIOError):
            while True:
                self._on_message(link.receive(self._link))

    def _on_signals(self, numbers: bytes) -> None:
        if self._stopping:
            return
        hand_over = signal.SIGUSR1 in numbers
        # A manager without a store waits for our end, and then nobody would hold anything.
        no_successor = hand_over and self._manager.present and not self._inheritance.stored
        if ENDS & set(numbers) or no_successor:
            self._stopping = True
            self._handing_over = False  # the next worker unmounts
            self._manager.tell(STOPPING=1, STATUS="unmounting")
            self._send("stop")
        elif hand_over and not self._handing_over:
            self._handing_over = True
            self._manager.tell(STATUS="handing over")
            os.kill(self._worker_pid, signal.SIGKILL)  # the one way to end that is tried all the time

    def _on_message(self, message: link.Message) -> None:
        match message.verb:
            case "hold":
                # Without a descriptor: there is no number left for it here.
                held = message.fd is not None and self._hold(message.name, message.fd)
                self._send("held" if held else "refused", message.name)
            case "release":
                self._release(message.name)
                self._send("released", message.name)
            case "pong":
                self._pulse.answered()
                if self._manager.watchdog_s:
                    self._manager.tell(WATCHDOG=1)
            case "ready":
                self._on_ready()
            case "finished":
                self._stopping = True
            case "failed":
                self._failure = msgspec.json.decode(message.name, type=ErrorReply)

    def _hold(self, name: str, fd: int) -> bool:
        """Hold *fd*, and have it stored; False, and it is closed, if that cannot be."""
        blobs = self._inheritance.blobs
        if (held := blobs.get(name)) is not None and os.path.sameopenfile(held, fd):
            os.close(fd)  # both are older than the mark; and two of one file are one for some managers
            return True
        self._release(name)
        if self._inheritance.stored:
            try:
                stored = self._manager.store(short_name(name), fd)
            except ManagerSilent as exc:
                log.error("manager.silent", error=str(exc), blob_id=name)
                stored = False
            if not stored:
                self._manager.drop(short_name(name))
                os.close(fd)
                log.error("blob.unguarded", blob_id=name, stored=len(blobs))
                return False
        blobs[name] = fd
        return True

    def _release(self, name: str) -> None:
        if (held := self._inheritance.blobs.pop(name, None)) is not None:
            os.close(held)
            if self._inheritance.stored:
                self._manager.drop(short_name(name))

    def _on_ready(self) -> None:
        self._failures = 0
        if hidden(self._socket_path).exists():
            os.rename(hidden(self._socket_path), self._socket_path)
            log.info("keeper.ready", socket=str(self._socket_path), worker=self._worker_pid)
        if not self._ready:
            self._ready = True
            note_served(self._inheritance, self._manager)
        self._manager.tell(READY=1, STATUS=f"serving, worker {self._worker_pid}")

    def _send(self, verb: str, name: str = "") -> None:
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
        try:
            temporary.write_text(f"{pid}\n")
            temporary.rename(path)
        except OSError as exc:  # a full or vanished /run must not end us
            log.error("pid.unwritten", path=str(path), pid=pid, error=str(exc))

    def _clean_up(self) -> None:
        for path in (
            self._socket_path,
            hidden(self._socket_path),
            self._socket_path.with_name("keeper.pid"),
            self._socket_path.with_name("worker.pid"),
        ):
            path.unlink(missing_ok=True)
        forget_stored(self._inheritance, self._manager)


def main(config: Config, only: MountRequest | None = None) -> int:
    """Run ``erofsd serve`` until it is told to stop; returns the exit code.

    Args:
        only: Serve this one mount, and end when it is unmounted.

    Raises:
        ErofsdError: It cannot start, or *only* cannot be mounted.
    """
    import erofsd.daemon.app  # noqa: F401  # imported before the fork, so that every worker has it for free

    faulthandler.enable()
    fanotify.raise_descriptor_limit()
    manager = ServiceManager(os.environ)
    return Keeper(config, obtain(config, manager), manager, only).run()


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
