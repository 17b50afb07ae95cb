"""``erofsd doctor``: can this machine do it, and if not, why, and what to do about it."""

from __future__ import annotations

import argparse
import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from erofsd.cli.options import (
    Subparsers,
    add_config,
    add_json,
    add_socket,
    add_verb,
    load_config,
    run_async,
    socket_path,
)
from erofsd.errors import ErofsdError, NotPossibleHere

if TYPE_CHECKING:
    from ondemand.engines import Probe

Status = Literal["ok", "warning", "failed"]

OPTIONS_WANTED = ("CONFIG_EROFS_FS", "CONFIG_EROFS_FS_BACKED_BY_FILE", "CONFIG_FANOTIFY_ACCESS_PERMISSIONS")
DESCRIPTORS_WANTED = 65536
SPACE_WANTED = 1 << 30
GROUPS_WANTED = 16

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    detail: str
    hint: str = ""


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = add_verb(
        subparsers,
        "doctor",
        "check what this machine can do, and say how to mend what is wrong",
        "erofsd doctor\nerofsd doctor --json | jq '.engines[] | select(.works)'",
    )
    add_config(parser)
    add_socket(parser)
    parser.add_argument(
        "--state-dir", type=Path, metavar="DIR", help="check this directory instead of the configured one"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check everything; the exit code is 0 if erofsd can work here, 3 if no engine does, 1 for the rest."""
    from erofsd.cli.output import print_json

    checks, state_dir, socket = _check_config(args)
    checks += [_check_privileges(), _check_erofs(), *_check_options()]
    checks += _check_state_dir(state_dir)
    checks += [_check_descriptors(), _check_groups()]
    checks.append(run_async(_check_daemon(socket, socket.exists())))
    engines = _probe(state_dir)
    works = any(engine.works for engine in engines)
    failed = any(check.status == "failed" for check in checks)
    if args.json:
        print_json({"ok": works and not failed, "engines": engines, "checks": checks})
    else:
        _print(checks, engines)
    if not works:
        return NotPossibleHere.exit_code
    return ErofsdError.exit_code if failed else 0


def _probe(state_dir: Path) -> list[Probe]:
    from erofsd.cli import machine

    return machine.probe_engines(machine.existing(state_dir))


def _check_config(args: argparse.Namespace) -> tuple[list[Check], Path, Path]:
    from erofsd.config import DEFAULT_PATH, Config

    path = args.config or DEFAULT_PATH
    config = Config()
    try:
        config = load_config(args)
        detail = str(path) if path.exists() else f"{path} does not exist: defaults"
        check = Check("configuration", "ok", detail)
    except ErofsdError as exc:
        check = Check("configuration", "failed", str(exc), exc.hint)
    args.config = args.config if check.status == "ok" else None  # it is named as wrong once, and not used
    return [check], args.state_dir or config.state_dir, socket_path(args)


def _check_privileges() -> Check:
    from erofsd.cli import machine

    if machine.is_privileged():
        return Check("privileges", "ok", "CAP_SYS_ADMIN")
    return Check("privileges", "failed", "no CAP_SYS_ADMIN", "run it as root: sudo erofsd doctor")


def _check_erofs() -> Check:
    from erofsd.cli import machine

    kernel = f"Linux {os.uname().release}"
    if machine.knows_file_system("erofs"):
        features = Path("/sys/fs/erofs/features")
        names = sorted(p.name for p in features.iterdir()) if features.is_dir() else []
        return Check("erofs", "ok", f"{kernel}: {', '.join(names) or 'no optional features'}")
    if machine.has_module("erofs"):
        return Check("erofs", "warning", f"{kernel}: module not loaded yet", "modprobe erofs")
    return Check(
        "erofs",
        "failed",
        f"{kernel} has no EROFS, built in or as a module",
        "use a kernel with CONFIG_EROFS_FS; Debian's and Ubuntu's standard kernels have it",
    )


def _check_options() -> list[Check]:
    from erofsd.cli import machine

    options = machine.kernel_options()
    if not options:
        return []  # this kernel does not tell; trying the engines says more anyway
    missing = [option for option in OPTIONS_WANTED if options.get(option) not in ("y", "m")]
    if not missing:
        return [Check("kernel options", "ok", ", ".join(OPTIONS_WANTED))]
    hint = f"use a kernel that is built with {' and '.join(missing)}"
    return [Check("kernel options", "warning", f"not set: {', '.join(missing)}", hint)]


def _check_state_dir(state_dir: Path) -> list[Check]:
    from erofsd.cli import machine
    from erofsd.cli.output import human

    place = machine.existing(state_dir)
    kind = machine.file_system(state_dir)
    free = shutil.disk_usage(place).free
    if kind in machine.STATE_FILE_SYSTEMS:
        check = Check("state directory", "ok", f"{state_dir} on {kind}, {human(free)} free")
    else:
        check = Check(
            "state directory",
            "failed",
            f"{state_dir} is on {kind}",
            f"put it on one of {', '.join(machine.STATE_FILE_SYSTEMS)} with --state-dir or state_dir",
        )
    if check.status == "ok" and free < SPACE_WANTED:
        check = Check(
            check.name, "warning", check.detail, "images need room for what is read of them: free some space"
        )
    return [check]


def _check_descriptors() -> Check:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= DESCRIPTORS_WANTED:
        return Check("descriptors", "ok", "unlimited" if hard == resource.RLIM_INFINITY else f"up to {hard}")
    return Check(
        "descriptors",
        "warning",
        f"up to {hard}: each waiting reader and each incomplete blob takes some, and when there are none"
        " left reads fail",
        f"raise the limit to {DESCRIPTORS_WANTED}: LimitNOFILE= in the unit, ulimit -Hn in a shell",
    )


def _check_groups() -> Check:
    try:
        limit = int(Path("/proc/sys/fs/fanotify/max_user_groups").read_text())
    except OSError:
        return Check("fanotify groups", "warning", "/proc/sys/fs/fanotify is missing: no fanotify here")
    if limit >= GROUPS_WANTED:
        return Check("fanotify groups", "ok", f"up to {limit} for a user")
    return Check(
        "fanotify groups", "warning", f"only {limit} for a user", "sysctl fs.fanotify.max_user_groups=128"
    )


async def _check_daemon(socket: Path, exists: bool) -> Check:
    import asyncio

    from erofsd.client import Client, DaemonUnreachable

    try:
        async with asyncio.timeout(5), Client(socket, patience_s=2) as client:
            info = await client.daemon()
    except DaemonUnreachable as exc:
        if exists and "permission" not in str(exc):
            return Check("daemon", "warning", f"{socket} is left from a daemon that is gone", "erofsd serve")
        return Check("daemon", "ok", f"not running: {exc}")
    except TimeoutError:
        return Check(
            "daemon", "failed", f"the daemon on {socket} does not answer", "look at its log; is it stopped?"
        )
    except ErofsdError as exc:
        return Check("daemon", "failed", str(exc), exc.hint)
    return Check(
        "daemon",
        "ok",
        f"version {info.version} runs on {socket}: keeper {info.keeper_pid}, worker {info.pid}",
    )


def _print(checks: list[Check], engines: list[Probe]) -> None:
    from erofsd.cli.output import colour, printable

    def line(mark: str, name: str, detail: str, hint: str) -> None:
        word = colour(f"{mark:8}", COLOURS.get(mark, "dim"))
        print(f"{word} {name:18} {printable(detail)}")
        if hint:
            print(f"{'':8} {'':18} -> {printable(hint)}")

    for check in checks:
        line(check.status, check.name, check.detail, check.hint)
    for engine in engines:
        # One engine is enough: that another is missing is no failure.
        line(
            "ok" if engine.works else "no",
            f"engine {engine.name}",
            "works" if engine.works else engine.reason,
            engine.hint,
        )
    print()
    if any(engine.works for engine in engines):
        names = ", ".join(engine.name for engine in engines if engine.works)
        print(f"Images can be mounted lazily here, with {names}.")
    else:
        print("Images cannot be mounted lazily here: no engine works.")
