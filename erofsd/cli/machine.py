"""What this machine can do: the facts behind ``doctor`` and ``quickstart``."""

from __future__ import annotations

import errno
import gzip
import os
import re
from pathlib import Path

from erofsd.errors import ErofsdError, NotPossibleHere
from ondemand import engines
from ondemand.engines import Probe

#: File systems that give pre-content events and survive power loss.
STATE_FILE_SYSTEMS = ("ext4", "xfs", "btrfs")

CAP_SYS_ADMIN = 21  # include/uapi/linux/capability.h


def probe_engines(directory: Path) -> list[Probe]:
    """What became of trying each engine, the preferred ones first.

    Args:
        directory: On the file system that blobs would lie on; scratch files come and go in it.
    """
    return [engines.probe(name, str(directory)) for name in engines.KNOWN]


def existing(path: Path) -> Path:
    """*path*, or the nearest directory above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def file_system(path: Path) -> str:
    """The type of the file system that holds *path*, or would hold it: ``ext4``.

    Source: Documentation/filesystems/proc.rst, /proc/<pid>/mountinfo.
    """
    real = os.path.realpath(existing(path))
    found, longest = "unknown", -1
    # By mount point, not by device number: btrfs shows another one in stat(2) than in mountinfo.
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), before.split()[4])
            inside = point == "/" or real == point or real.startswith(point + "/")
            if inside and len(point) >= longest:  # of a stack, the last one is what is seen
                found, longest = after.split()[0], len(point)
    return found


def prepare_directories(state_dir: Path, socket: Path) -> None:
    """See that a daemon can keep its state and its socket where it is told to.

    Raises:
        ErofsdError: A directory cannot be made.
        NotPossibleHere: The state directory's file system gives no events, or loses data with the power.
    """
    for path in (state_dir, socket.parent):
        try:
            path.mkdir(mode=0o700 if path == state_dir else 0o755, parents=True, exist_ok=True)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as exc:
            hint = "erofsd serve needs root" if isinstance(exc, PermissionError) else ""
            raise ErofsdError(f"{path}: cannot be used: {exc.strerror}", hint=hint) from exc
    kind = file_system(state_dir)
    if kind not in STATE_FILE_SYSTEMS:
        raise NotPossibleHere(
            f"state directory {state_dir}: is on {kind}",
            hint=f"put it on one of {', '.join(STATE_FILE_SYSTEMS)}, with --state-dir or state_dir",
        )


def is_privileged() -> bool:
    """True with CAP_SYS_ADMIN, which mounting and fanotify need (in the initial user namespace)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_SYS_ADMIN & 1)
    return False


def knows_file_system(name: str) -> bool:
    """True if the running kernel has the file system *name* loaded or built in."""
    lines = Path("/proc/filesystems").read_text().splitlines()
    return any(line.split()[-1] == name for line in lines if line.strip())


def has_module(name: str) -> bool:
    """True if the kernel module *name* is installed for the running kernel."""
    directory = Path("/lib/modules", os.uname().release)
    pattern = re.compile(rf"/{re.escape(name)}\.ko")
    for index in ("modules.dep", "modules.builtin"):
        try:
            if pattern.search((directory / index).read_text()):
                return True
        except OSError:
            continue
    return False


def kernel_options() -> dict[str, str]:
    """The configuration of the running kernel, as far as it can be read: ``CONFIG_X`` to ``y``, ``m``, ….

    Empty where the kernel does not tell: an option that is absent then says nothing.
    """
    text = ""
    try:
        text = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    except OSError:
        try:
            text = Path(f"/boot/config-{os.uname().release}").read_text()
        except OSError:
            return {}
    return dict(re.findall(r"^(CONFIG_\w+)=(.*)$", text, re.MULTILINE))
