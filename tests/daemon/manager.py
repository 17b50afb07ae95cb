"""A service manager as far as a service can tell: takes notifications, keeps descriptors, gives them back.

Behaves as systemd 252 does where that matters: messages are processed in order and later than they are sent;
a descriptor beyond the store's limit is closed in silence; of two descriptors of one open file the second is
closed (kcmp); FDSTOREREMOVE closes all of a name. `vm-tests/scenarios` hold the real one to the same claims.
"""

from __future__ import annotations

import array
import ctypes
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

SYS_KCMP = {"x86_64": 312, "aarch64": 272}
KCMP_FILE = 0
LIBC = ctypes.CDLL(None, use_errno=True)

#: Puts the descriptors where a service looks for them and becomes it: LISTEN_PID must be its own.
LAUNCHER = """
import fcntl, os, sys
count, names, *command = sys.argv[1:]
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 500) for fd in os.environ.pop("FDS").split()]
os.closerange(3, 500)
for k, fd in enumerate(high):
    os.dup2(fd, 3 + k)
if high:
    os.environ.update(LISTEN_FDS=count, LISTEN_FDNAMES=names, LISTEN_PID=str(os.getpid()))
os.execv(command[0], command)
"""


def same_open_file(a: int, b: int) -> bool:
    """True for duplicates of one descriptor."""
    me = os.getpid()
    return LIBC.syscall(SYS_KCMP[os.uname().machine], me, me, KCMP_FILE, a, b) == 0


class Manager:
    """One service's manager.

    Attributes:
        messages: All that were not about the store, in order.
        store_max: FileDescriptorStoreMax=.
        watchdog_s: WatchdogSec=.
        going: Clear it, and nothing is processed any more.
    """

    def __init__(self, directory: Path, *, store_max: int = 4096, watchdog_s: float = 0) -> None:
        self.store_max = store_max
        self.watchdog_s = watchdog_s
        self.messages: list[dict[str, str]] = []
        self.going = threading.Event()
        self.going.set()
        self._stored: list[tuple[str, int]] = []
        self._lock = threading.Lock()
        self._path = directory / "notify"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(self._path))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def names(self) -> list[str]:
        """What is in the store."""
        with self._lock:
            return sorted(name for name, _ in self._stored)

    def told(self, key: str) -> list[str]:
        """Values of *key* in all messages so far."""
        return [message[key] for message in list(self.messages) if key in message]

    def start(self, command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start the service, with what it had stored."""
        with self._lock:
            # systemd prepends to its list, so the order is not that in which they came.
            stored = list(reversed(self._stored))
            environment = {
                **os.environ,
                "NOTIFY_SOCKET": str(self._path),
                "FDS": " ".join(str(fd) for _, fd in stored),
            }
            if self.watchdog_s:
                environment["WATCHDOG_USEC"] = str(int(self.watchdog_s * 1e6))
            names = ":".join(name for name, _ in stored)
            return subprocess.Popen(
                [sys.executable, "-c", LAUNCHER, str(len(stored)), names, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[fd for _, fd in stored],
            )

    def forget_all(self) -> None:
        """The service has been stopped."""
        with self._lock:
            for _, fd in self._stored:
                os.close(fd)
            self._stored.clear()

    def close(self) -> None:
        """The end of it."""
        self.going.set()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", str(self._path))
        self._thread.join()
        self._sock.close()
        self.forget_all()

    def _run(self) -> None:
        while True:
            data, ancillary, _, _ = self._sock.recvmsg(4096, socket.CMSG_SPACE(4 * 4))
            self.going.wait()
            fds = array.array("i")
            for _, _, rights in ancillary:
                fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
            if not data:
                return
            message = dict(line.split("=", 1) for line in data.decode().splitlines())
            with self._lock:
                self._process(message, list(fds))

    def _process(self, message: dict[str, str], fds: list[int]) -> None:
        name = message.get("FDNAME", "stored")
        if "FDSTORE" in message:
            assert message["FDPOLL"] == "0"
            for fd in list(fds):
                known = any(same_open_file(fd, other) for _, other in self._stored)
                if not known and len(self._stored) < self.store_max:
                    self._stored.append((name, fd))
                    fds.remove(fd)
        elif "FDSTOREREMOVE" in message:
            for entry in [entry for entry in self._stored if entry[0] == name]:
                self._stored.remove(entry)
                os.close(entry[1])
        elif "BARRIER" not in message:
            self.messages.append(message)
        for fd in fds:
            os.close(fd)
