"""Built kernels on disk: found by source version and configuration, published whole or not at all.

Layout below :func:`directory`::

    kernels/NAME/VERSION+FINGERPRINT/    one built kernel: manifest.json and the files it names
    build/NAME/                          sources and objects while a build runs, removed after it
    logs/build-NAME.log                  what the last build said
    ccache/                              compiler results, so that a changed configuration rebuilds in seconds
    locks/                               one build a kernel at a time; one UML guest a CPU

An entry is renamed into place when complete, so a half-built kernel is never booted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Entries of one kernel that a new one leaves in the cache, itself included; 5 to 150 MB each.
_KEPT = 3


def directory() -> Path:
    """Where built kernels live: ``$EROFSD_VM_CACHE``, else below the XDG cache, else /var/cache for root."""
    if explicit := os.environ.get("EROFSD_VM_CACHE"):
        return Path(explicit).absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).absolute() / "erofsd-vm"
    if os.geteuid() == 0:
        return Path("/var/cache/erofsd-vm")
    return Path.home() / ".cache" / "erofsd-vm"


@dataclass(frozen=True, slots=True)
class Built:
    """A kernel ready to boot."""

    path: Path
    source_version: str  # of the Debian package that the kernel was built or taken from
    release: str  # what uname -r says in the guest
    files: dict[str, str]  # role ("kernel", "initrd", "modules") -> name below path

    def file(self, role: str) -> Path | None:
        """The entry's file for *role*, None when this kernel needs none."""
        name = self.files.get(role)
        return self.path / name if name else None


def fingerprint(*parts: bytes) -> str:
    """Twelve hex digits naming everything about a build except the version of its source."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:12]


def find(name: str, source_version: str | None, config: str) -> Built | None:
    """The built kernel of that version and configuration; the newest of any version when that is None."""
    home = directory() / "kernels" / name
    pattern = f"{source_version or '*'}+{config}"
    entries = [path for path in home.glob(_glob_safe(pattern)) if (path / "manifest.json").is_file()]
    if not entries:
        return None
    newest = max(entries, key=lambda path: (path / "manifest.json").stat().st_mtime_ns)
    manifest = json.loads((newest / "manifest.json").read_text())
    return Built(newest, manifest["source_version"], manifest["release"], manifest["files"])


def _glob_safe(pattern: str) -> str:
    return pattern.replace("[", "[[]")


def publish(
    name: str, made: Path, config: str, source_version: str, release: str, files: dict[str, str]
) -> Built:
    """Move the finished directory *made* to its place in the cache and return it as an entry.

    Of older versions and configurations a few stay: other checkouts use the same cache.
    """
    home = directory() / "kernels" / name
    home.mkdir(parents=True, exist_ok=True)
    manifest = {"source_version": source_version, "release": release, "files": files}
    (made / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    target = home / f"{source_version}+{config}"
    if target.exists():  # only with --rebuild; a running guest keeps its open files
        shutil.rmtree(target)
    made.rename(target)
    by_age = sorted(home.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in by_age[_KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
    return Built(target, source_version, release, files)


@contextlib.contextmanager
def scratch(name: str) -> Iterator[Path]:
    """An empty build directory on the cache's file system, removed afterwards, also after a failure."""
    path = directory() / "build" / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold the build lock of *name*; waits for whoever has it, and says so."""
    with _lock_file(name) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{name}: somebody else is building it, waiting", file=sys.stderr, flush=True)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def claim_one_of(names: list[str]) -> Iterator[str | None]:
    """Hold the first of *names* that nobody else holds; freed on leaving.

    None when all are taken, or when the cache belongs to somebody who lets us only read it.
    """
    with contextlib.ExitStack() as stack:
        claimed = None
        for name in names:
            try:
                fd = stack.enter_context(_lock_file(name))
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                continue
            claimed = name
            break
        yield claimed


@contextlib.contextmanager
def _lock_file(name: str) -> Iterator[int]:
    path = directory() / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
