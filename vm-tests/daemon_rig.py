"""What scenarios of the whole daemon share: it, its API, images, and what to count for leaks.

The daemon is the one of the checkout, started as its own tests start it, on the guest's ext4.
"""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
HOME = Path("/var/lib/erofsd")
os.environ["EROFSD_TEST_DIR"] = str(HOME)
sys.path.insert(0, str(ROOT))

from erofsd.client import Client  # noqa: E402
from tests import rafs  # noqa: E402
from tests.daemon.conftest import Daemon, wait_for  # noqa: E402

__all__ = [
    "HOME",
    "ROOT",
    "Daemon",
    "cache_files",
    "call",
    "daemon_counts",
    "drop_caches",
    "files_of",
    "guest",
    "mount_by_hand",
    "rafs",
    "resident_kib",
    "wait_for",
]

T = TypeVar("T")

VOLUME = "Ierofs,erofsd"
_WHO = ("keeper", "worker")


def call(daemon: Daemon, work: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
    """One call of the daemon's API: a program that starts takes a second here."""

    async def run() -> T:
        async with Client(daemon.socket) as client:
            return await work(client)

    return asyncio.run(run())


def drop_caches() -> None:
    """Forget every clean page, and every inode that nobody uses."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def cache_files(state_dir: Path) -> dict[str, Path]:
    """The kernel's named files, by cookie key."""
    return {path.name[1:]: path for path in (state_dir / "cachefiles/cache" / VOLUME).glob("@*/D*")}


def files_of(state_dir: Path) -> Counter[str]:
    """How many files are in each directory of the state directory; those of a volume count as one."""
    found: Counter[str] = Counter()
    for directory, _, names in os.walk(state_dir):
        kind = "cache" if VOLUME in directory else str(Path(directory).relative_to(state_dir))
        found[kind] += len(names)
    return found


def rows_of(state_dir: Path) -> int:
    """Rows in the mount table."""
    database = sqlite3.connect(f"file:{state_dir}/mounts.db?mode=ro", uri=True)
    try:
        return int(database.execute("SELECT count(*) FROM mounts").fetchone()[0])
    finally:
        database.close()


def daemon_counts(daemon: Daemon) -> dict[str, int]:
    """What keeper and worker have open, and what is in the state directory."""
    counts = {f"{who} descriptors": len(os.listdir(f"/proc/{daemon.pid(who)}/fd")) for who in _WHO}
    counts["worker threads"] = len(os.listdir(f"/proc/{daemon.pid('worker')}/task"))
    counts["worker tasks"] = int(daemon.metric("erofsd_tasks"))
    counts["rows"] = rows_of(daemon.state_dir)
    return counts | {f"files in {kind}": count for kind, count in files_of(daemon.state_dir).items()}


def resident_kib(pid: int) -> int:
    """Memory of a process that is nobody else's."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"^Private_\w+: +(\d+)", text, re.MULTILINE))


def guest() -> dict[str, int]:
    """What the kernel has: mounts, superblocks, cookies, volumes, open files, objects in slabs."""
    counts = {
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "superblocks": sum(1 for entry in Path("/sys/fs/erofs").iterdir() if entry.name != "features"),
        "open files": int(Path("/proc/sys/fs/file-nr").read_text().split()[0]),
    }
    stats = Path("/proc/fs/fscache/stats")
    if stats.exists() and (found := re.search(r"Cookies: n=(\d+) v=(\d+)", stats.read_text())):
        counts |= {"cookies": int(found[1]), "volumes": int(found[2])}
    for name in ("erofs_inode", "fscache_cookie_jar", "cachefiles_object_jar"):
        objects = Path("/sys/kernel/slab", name, "objects")
        if objects.exists():
            counts[name] = int(objects.read_text().split()[0])
    return counts


def mount_by_hand(command: str, directory: Path) -> None:
    """Run what ``mount --prepare`` has printed, as typed."""
    directory.mkdir(exist_ok=True)
    words = command.replace("DIR", str(directory)).split()
    subprocess.run(words, stdin=subprocess.DEVNULL, check=True, timeout=30)
