"""Makes /dev/cachefiles serve a directory, or says what is in the way."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ondemand.cachefiles import Device
from ondemand.errors import EngineUnavailable
from ondemand.wire import cachefiles as wire

DEVICE_PATH = "/dev/cachefiles"
DEFAULT_TAG = "erofsd"

BUILD_HINT = (
    "use a kernel from 5.19 to 7.1 built with CONFIG_CACHEFILES_ONDEMAND and CONFIG_EROFS_FS_ONDEMAND"
)
RESTORE_HINT = "use a kernel with the fixes of summer 2024: Linux 6.1.95, 6.6.35 or 6.8, or later"

_FILE_SYSTEM = "put the directory on ext4 or xfs"
_ROOT = "run as root in the first user namespace: CAP_SYS_ADMIN is needed"
_SPARSE_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of the file system has to stay free, in percent of its blocks, and of its inodes.

    Attributes:
        run: Above this, nothing is culled any more.
        cull: Below this, the device asks for culling (`Device` is "writable").
        stop: Below this, nothing is created and nothing written: ENOSPC.
    """

    run: int = 7
    cull: int = 5
    stop: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.stop < self.cull < self.run < 100:
            raise ValueError(f"limits need 0 <= stop < cull < run < 100: {self}")

    def commands(self) -> Iterator[wire.Limit]:
        """What sets them: each is accepted only if it agrees with what the others are at that moment."""
        target = {"run": self.run, "cull": self.cull, "stop": self.stop}
        for family in "bf":
            current = {"run": 7, "cull": 5, "stop": 1}  # cachefiles_daemon_open
            while current != target:
                for name in ("stop", "cull", "run"):
                    changed = {**current, name: target[name]}
                    if changed != current and changed["stop"] < changed["cull"] < changed["run"]:
                        current = changed
                        yield wire.Limit(family + name, target[name])


def open_device(
    directory: Path, *, tag: str = DEFAULT_TAG, limits: Limits | None = None, path: str = DEVICE_PATH
) -> int:
    """Bind a cache in *directory*, on demand; returns the device's descriptor, close-on-exec.

    There is one such cache in a system. It ends when the descriptor and all that came through it are closed
    everywhere; mounts that are there by then are broken for good.

    Args:
        directory: On a file system with direct I/O, extended attributes and honest SEEK_HOLE: ext4 or xfs.
        tag: The cache's name in the kernel's messages.
        limits: Of free space; by default the kernel's own.

    Raises:
        EngineUnavailable: With the step that was refused, and what helps.
    """
    _check_directory(directory)
    try:
        device_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise _not_opened(path, exc) from exc
    try:
        device = Device(device_fd)
        commands: list[wire.Command] = [
            wire.Dir(os.fsencode(directory)),
            wire.Tag(tag),
            *(limits or Limits()).commands(),
        ]
        for command in commands:
            try:
                device.command(command)
            except (OSError, ValueError) as exc:
                raise EngineUnavailable(f"{path} refuses {command}: {exc}") from exc
        try:
            device.command(wire.Bind())
        except OSError as exc:
            raise _not_bound(directory, exc) from exc
    except BaseException:
        os.close(device_fd)
        raise
    return device_fd


def holders(path: str = DEVICE_PATH) -> list[str]:
    """Processes that have the device or one of its objects open, as ``name (pid)``, as far as visible."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(_link(fd) in (path, "anon_inode:[cachefiles]") for fd in (process / "fd").iterdir()):
                found.append(f"{(process / 'comm').read_text().strip()} ({process.name})")
        except OSError:
            continue  # it has ended, or is not ours to look at
    return sorted(found)


def _link(fd: Path) -> str:
    try:
        return os.readlink(fd)
    except OSError:
        return ""  # closed meanwhile


def _check_directory(directory: Path) -> None:
    """Holes must be told from data: the kernel never checks, and would serve holes as zeros."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            fd = file.fileno()
            os.truncate(fd, 2 * _SPARSE_SIZE)
            os.pwrite(fd, b"x", _SPARSE_SIZE)
            os.fsync(fd)
            honest = (os.lseek(fd, 0, os.SEEK_HOLE), os.lseek(fd, 0, os.SEEK_DATA)) == (0, _SPARSE_SIZE)
    except OSError as exc:
        raise EngineUnavailable(f"cannot write into {directory}: {exc}") from exc
    if not honest:
        raise EngineUnavailable(f"the file system of {directory} does not tell holes from data", _FILE_SYSTEM)


def _not_opened(path: str, exc: OSError) -> EngineUnavailable:
    if exc.errno == errno.EBUSY:
        who = ", ".join(holders(path)) or "a process that is not visible from here"
        return EngineUnavailable(
            f"{path} is in use by {who}", "end it (systemctl stop cachefilesd), or use another engine"
        )
    hints = {
        errno.ENOENT: f"modprobe cachefiles; if there is no such module: {BUILD_HINT}",
        errno.ENODEV: f"modprobe cachefiles; if there is no such module: {BUILD_HINT}",
        errno.ENXIO: f"modprobe cachefiles; if there is no such module: {BUILD_HINT}",
        errno.EPERM: _ROOT,
        errno.EACCES: _ROOT,
    }
    return EngineUnavailable(f"opening {path}: {exc.strerror}", hints.get(exc.errno or 0, ""))


def _not_bound(directory: Path, exc: OSError) -> EngineUnavailable:
    hints = {
        errno.EINVAL: f"this kernel has cachefiles, but not on demand: {BUILD_HINT}",
        errno.EOPNOTSUPP: f"this file system is unfit for a cache: {_FILE_SYSTEM}",
        errno.EROFS: f"this file system is read-only: {_FILE_SYSTEM}",
        errno.ERANGE: f"this file system's blocks are larger than a page: {_FILE_SYSTEM}",
        errno.ENOSPC: "make room on this file system",
        errno.ENOBUFS: "make room on this file system",
        errno.EEXIST: "another cache has this tag",
        errno.EBUSY: "another cache is bound to this directory, or was until a moment ago",
    }
    return EngineUnavailable(f"binding a cache in {directory}: {exc.strerror}", hints.get(exc.errno or 0, ""))
