"""Where a run's files and a guest's memory go on this host."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import RunnerError

# The guest mounts its own file systems over these, so nothing below them on the host is visible in it.
HIDDEN_IN_GUEST = ("/dev", "/proc", "/run", "/sys", "/var/lib/erofsd")
# A kernel command line, ubd= and QEMU's options split at blanks, commas and colons.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9._/+@~-]+")


def is_hidden(path: Path) -> bool:
    """Whether the guest sees something else at *path* than the host does."""
    return any(path.is_relative_to(hidden) for hidden in HIDDEN_IN_GUEST)


def is_plain(path: Path) -> bool:
    """Whether *path* survives on a kernel command line and in QEMU's options."""
    return _PLAIN_PATH.fullmatch(str(path)) is not None


def job_home() -> Path:
    """Directory for a run's disk and channels: of $TMPDIR, /var/tmp, /tmp the first that the guest sees."""
    for path in _candidates("TMPDIR", "/var/tmp", "/tmp"):
        if is_plain(path) and not is_hidden(path) and os.access(path, os.W_OK | os.X_OK):
            return path
    raise RunnerError("neither $TMPDIR nor /var/tmp nor /tmp is a writable directory with a plain path")


def memory_home(size: int) -> Path:
    """Directory for UML's memory file of *size* bytes: it must allow mmap with PROT_EXEC and have the room.

    A tmpfs comes first: elsewhere the host writes the guest's memory to its disk. The file is sparse and
    has no name.

    Raises:
        RunnerError: No directory has the room; says how much is needed.
    """
    fits = [path for path in _candidates("TMPDIR", "/dev/shm", "/tmp", "/var/tmp") if _fits(path, size)]
    if not fits:
        raise RunnerError(f"no place for {size >> 20} MiB of guest memory: set TMPDIR, or give --memory less")
    return min(fits, key=lambda path: _file_system(path) != "tmpfs")


def _candidates(variable: str, *paths: str) -> list[Path]:
    named = [os.environ[variable]] if os.environ.get(variable) else []
    return [Path(path).resolve() for path in (*named, *paths) if Path(path).is_dir()]


def _fits(path: Path, size: int) -> bool:
    state = os.statvfs(path)
    usable = os.access(path, os.W_OK | os.X_OK) and not state.f_flag & os.ST_NOEXEC
    return usable and state.f_bavail * state.f_frsize >= size


def _file_system(path: Path) -> str:
    """Type of the file system that *path* is on, from the longest mount point above it."""
    best, kind = "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount_point, file_system, *_ = line.split(" ")
        if path.is_relative_to(mount_point) and len(mount_point) >= len(best):
            best, kind = mount_point, file_system
    return kind
