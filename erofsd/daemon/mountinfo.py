"""What is mounted here, and which EROFS superblocks exist anywhere."""

from __future__ import annotations

import re
import select
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SUPERBLOCKS = Path("/sys/fs/erofs")
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of mountinfo.

    Attributes:
        device: ``major:minor`` of the superblock.
        fsid: Of EROFS over fscache, else empty.
    """

    directory: str
    device: str
    fstype: str
    source: str
    fsid: str = ""


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)  # blank, tab, newline, backslash


def mount_points() -> list[MountPoint]:
    """Everything mounted in this process' mount namespace, lower mounts of a stack first.

    Source: Documentation/filesystems/proc.rst, /proc/<pid>/mountinfo.
    """
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.rstrip("\n").partition(" - ")
            fields = before.split(" ")
            fstype, source, options = after.split(" ", 2)
            fsid = next((o[5:] for o in options.split(",") if o.startswith("fsid=")), "")
            found.append(MountPoint(_unescape(fields[4]), fields[2], fstype, _unescape(source), fsid))
    return found


def superblocks() -> set[str]:
    """Names of all live EROFS superblocks, of every mount namespace."""
    try:
        return {entry.name for entry in SUPERBLOCKS.iterdir() if entry.name != "features"}
    except FileNotFoundError:
        return set()


class _Loop(Protocol):
    def add_reader(self, fd: int, callback: Callable[[], None]) -> object: ...

    def remove_reader(self, fd: int) -> bool: ...


class MountWatch:
    """Calls back after every change of this namespace's mounts.

    mountinfo reports a change as POLLERR and POLLPRI, which event loops do not offer: an epoll descriptor of
    its own, itself readable when it has an event, stands between. Asking whether there is one consumes it,
    and the event loop has asked: a wake-up is all there is to see.
    """

    def __init__(self, loop: _Loop, on_change: Callable[[], None]) -> None:
        self._loop = loop
        self._on_change = on_change
        self._file = open("/proc/self/mountinfo", "rb")  # noqa: SIM115  # closed in close()
        self._epoll = select.epoll()
        self._epoll.register(self._file.fileno(), select.EPOLLERR | select.EPOLLPRI | select.EPOLLET)
        loop.add_reader(self._epoll.fileno(), self._on_readable)

    def _on_readable(self) -> None:
        self._epoll.poll(0)
        self._on_change()

    def close(self) -> None:
        """Stop watching."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._file.close()
