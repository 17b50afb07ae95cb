"""What a service manager is told and asked to keep: the notification protocol of systemd, on plain sockets.

Everything is a datagram to ``$NOTIFY_SOCKET``: lines of ``KEY=VALUE``, some with a descriptor (SCM_RIGHTS).
The manager takes them in order, but whenever it likes, and answers none. Two of its habits make up for that:

- A message ``BARRIER=1`` brings the write end of a pipe, which the manager closes once it has processed what
  came before. Whoever holds the read end sees the end of file (`ServiceManager.settle`).
- A descriptor that it does not store, because the store is full or the unit has none, it closes. So one end
  of another pipe, sent to the store right behind what matters, tells whether there was room for both.

At the next start the stored descriptors come back as numbers from 3 on, with their names in
``$LISTEN_FDNAMES``. That is one word of at most 128 KiB for execve(2), so names are short: see `short_name`.

Source: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3); systemd 252, src/core/service.c,
service_add_fd_store() and service_notify_message(), src/core/manager.c, manager_process_barrier_fd().
"""

from __future__ import annotations

import base64
import hashlib
import os
import select
import socket
from array import array
from collections.abc import Mapping, MutableMapping

import structlog

from erofsd.errors import ErofsdError

FIRST_FD = 3  # SD_LISTEN_FDS_START
ANSWER_LIMIT_S = 10.0
"""Longest wait for the manager: it reloads thousands of units in less."""

_SENTINEL = "sentinel"

log = structlog.get_logger("erofsd.systemd")


class ManagerSilent(ErofsdError):
    """The service manager does not process what it is sent, or cannot be reached."""


def short_name(name: str) -> str:
    """Stands for *name* in the store: 11 letters and digits, 48 bits of a hash."""
    digest = hashlib.blake2b(name.encode(), digest_size=6).digest()
    return "b" + base64.b32encode(digest).decode().rstrip("=").lower()


def take_stored(environment: MutableMapping[str, str]) -> list[tuple[str, int]]:
    """Names and descriptors that the manager had stored for this service; they are the caller's from now on.

    The variables are removed: they are about this process and must not reach another.
    """
    count, pid, names = (environment.pop(f"LISTEN_{key}", "") for key in ("FDS", "PID", "FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    fds = range(FIRST_FD, FIRST_FD + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    known = names.split(":")
    if len(known) != len(fds):
        known = ["unknown"] * len(fds)  # as sd_listen_fds_with_names(3) has it
    return list(zip(known, fds, strict=True))


class ServiceManager:
    """The way to the manager that started this service; without one, every call does nothing.

    It survives fork: any process of the service may use it (``NotifyAccess=all``).

    Attributes:
        watchdog_s: The manager wants a sign of life that often, and restarts the service without; 0: never.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = 0.0
        if address:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._sock.settimeout(ANSWER_LIMIT_S)
            usec = environment.get("WATCHDOG_USEC", "")
            if usec.isdecimal() and environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
                self.watchdog_s = int(usec) / 1e6

    @property
    def present(self) -> bool:
        """True if there is one."""
        return bool(self._address)

    def tell(self, **fields: object) -> None:
        """Send ``KEY=VALUE`` for each of *fields*: READY, STATUS, STOPPING, MAINPID, WATCHDOG.

        A manager that cannot be reached must not be what stops the service: that is logged.
        """
        try:
            self._send(fields)
        except ManagerSilent as exc:
            log.warning("manager.unreachable", error=str(exc), fields=list(fields))

    def store(self, name: str, fd: int) -> bool:
        """Have the manager keep a duplicate of *fd* under *name*; returns True when it does, False if not.

        It keeps no two of one open file: a duplicate of what is stored counts as stored.

        Args:
            name: ASCII without colons, not in use.

        Raises:
            ManagerSilent: It is not known whether it does.
        """
        if not self.present:
            return False
        alive, sentinel = os.pipe()
        try:
            try:
                # Not polled: a file has no hang-up, and a device's is not the manager's business.
                self._send({"FDSTORE": 1, "FDNAME": name, "FDPOLL": 0}, fd)
                self._send({"FDSTORE": 1, "FDNAME": _SENTINEL, "FDPOLL": 0}, sentinel)
            finally:
                os.close(sentinel)
            self.settle()
            stored = not _has_ended(alive, 0)
            self._send({"FDSTOREREMOVE": 1, "FDNAME": _SENTINEL})
        finally:
            os.close(alive)
        return stored

    def drop(self, name: str) -> None:
        """Have the manager close what it keeps under *name*; does not wait for it."""
        self.tell(FDSTOREREMOVE=1, FDNAME=name)

    def settle(self) -> None:
        """Return when everything sent so far is processed.

        Raises:
            ManagerSilent: It takes too long.
        """
        if not self.present:
            return
        processed, barrier = os.pipe()
        try:
            try:
                self._send({"BARRIER": 1}, barrier)
            finally:
                os.close(barrier)
            if not _has_ended(processed, ANSWER_LIMIT_S):
                raise ManagerSilent(f"the service manager has been silent for {ANSWER_LIMIT_S:g} s")
        finally:
            os.close(processed)

    def _send(self, fields: Mapping[str, object], fd: int | None = None) -> None:
        if not self.present:
            return
        message = "\n".join(f"{key}={value}" for key, value in fields.items()).encode()
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
        try:
            # By address each time: the manager may have been executed anew, with another socket of that name.
            self._sock.sendmsg([message], rights, 0, self._address)
        except OSError as exc:
            raise ManagerSilent(f"the service manager does not listen on {self._address}: {exc}") from exc


def _has_ended(read_end: int, timeout_s: float) -> bool:
    """True once nobody has the write end of the pipe any more."""
    poll = select.poll()
    poll.register(read_end, 0)  # POLLHUP is always reported
    return bool(poll.poll(timeout_s * 1000))
