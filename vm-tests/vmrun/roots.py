"""Roots that a guest may have instead of this machine's own: a small Debian 12 that boots its own systemd.

Kept in the cache as ``roots/NAME/FINGERPRINT/``, a plain directory tree that every guest has under an overlay
of its own. What the checkout adds to it (units, the program) is laid over it by `overlay`, for each run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import cache, packages
from .errors import NotBuilt, RunnerError

HOST = "host"
NAMES = (HOST, "systemd")
CHECKOUT = Path(__file__).resolve().parents[2]

_SUITE = "bookworm"
_PACKAGES = ("systemd-sysv", "python3", "kmod", "iproute2", "psmisc", "erofs-utils", "ca-certificates")
# Nobody logs in, and nothing shall run by the clock; the rest is as Debian ships it.
_MASKED = ("getty.target", "timers.target", "systemd-networkd.service", "systemd-resolved.service")
_REVISION = b"1"  # raise when the steps below change what comes out

# Standard output and error are those of vm-tests/run: guest-init sends them there.
_COMMAND_UNIT = """\
[Unit]
Description=The command of vm-tests/run
After=multi-user.target

[Service]
Type=oneshot
ExecStart=/bin/sh {init} command
LimitNOFILE=1024:1048576
OOMScoreAdjust=-1000
KillMode=process
"""


def _path() -> Path:
    words = " ".join((_SUITE, *_PACKAGES, *_MASKED)).encode()
    return cache.directory() / "roots" / "systemd" / cache.fingerprint(_REVISION, words)


def find() -> Path | None:
    """The root with systemd, as built earlier; None when there is none."""
    return _path() if (_path() / "etc/machine-id").is_file() else None


def obtain(*, may_build: bool) -> Path:
    """The root with systemd from the cache, made first when it is missing and *may_build*: a minute.

    Raises:
        NotBuilt: It is missing and must not be built.
        RunnerError: debootstrap failed.
    """
    if built := find():
        return built
    if not may_build:
        raise NotBuilt("the root with systemd is not built; `vm-tests/run --build-root` builds it")
    with cache.lock("root-systemd"):
        return find() or _build()


def _build() -> Path:
    if os.geteuid() != 0:
        raise RunnerError("debootstrap needs root")
    packages.ensure(["debootstrap"])
    print("building a root with systemd by debootstrap", file=sys.stderr, flush=True)
    with cache.scratch("root-systemd") as work:
        root = work / "root"
        include = f"--include={','.join(_PACKAGES)}"
        command = ["debootstrap", "--variant=minbase", include, _SUITE, str(root), packages.debian_mirror()]
        reply = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if reply.returncode != 0:
            raise RunnerError(f"debootstrap: {reply.stdout[-2000:]}{reply.stderr[-1000:]}")
        for unneeded in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
            shutil.rmtree(root / unneeded, ignore_errors=True)
        units = root / "etc/systemd/system"
        for unit in _MASKED:
            (units / unit).unlink(missing_ok=True)
            (units / unit).symlink_to("/dev/null")
        (units / "default.target").symlink_to("/lib/systemd/system/multi-user.target")
        (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        # Last: with it the root is complete. Without it systemd would take each boot for the very first.
        (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
        _path().parent.mkdir(parents=True, exist_ok=True)
        for older in _path().parent.iterdir():
            shutil.rmtree(older, ignore_errors=True)
        root.rename(_path())
    return _path()


def overlay(directory: Path, init: Path) -> None:
    """Lay out in *directory* what the checkout adds: its units, enabled; its program, the command's unit."""
    units = directory / "etc/systemd/system"
    wanted = units / "multi-user.target.wants"
    wanted.mkdir(parents=True)
    for unit in sorted((CHECKOUT / "packaging/systemd").glob("*.service")):
        shutil.copy(unit, units)
        (wanted / unit.name).symlink_to(f"../{unit.name}")
    (units / "vm-command.service").write_text(_COMMAND_UNIT.format(init=init))
    (wanted / "vm-command.service").symlink_to("../vm-command.service")
    program = directory / "usr/bin/erofsd"
    program.parent.mkdir(parents=True)
    program.symlink_to(CHECKOUT / ".venv/bin/erofsd")


def visible(cwd: Path) -> list[Path]:
    """Directories of the host that a guest with another root must see as well."""
    paths = [CHECKOUT, cwd]
    testdata = CHECKOUT.parent / "shared"
    if testdata.is_dir():
        paths.append(testdata)
    return [
        path for path in dict.fromkeys(paths) if not any(path.is_relative_to(p) for p in paths if p != path)
    ]
