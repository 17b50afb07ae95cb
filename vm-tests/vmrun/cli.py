"""Command line of ``vm-tests/run``."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from . import job as jobs
from . import roots
from .cache import Built, directory
from .errors import EXIT_GUEST_LOST, EXIT_TIME_LIMIT, RunnerError
from .kernels import KERNELS, Kernel, find, obtain
from .vehicles import qemu, uml
from .vehicles.machine import Machine
from .watch import End, Verdict, watch

_DESCRIPTION = """\
Boot a test kernel and run COMMAND in it as root, in the caller's directory and environment. The guest's root
is this machine's own / under an overlay that vanishes; /var/lib/erofsd is a fresh 4 GiB ext4; what is written
to $VM_OUT reaches the host. Ends with COMMAND's exit code; 124: time limit, 125: guest lost or not built,
both said on stderr."""


def main(arguments: Sequence[str]) -> int:
    """Run the program; returns its exit code."""
    signal.signal(signal.SIGTERM, _exit_on_signal)
    signal.signal(signal.SIGHUP, _exit_on_signal)
    options, command = _parse(arguments)
    try:
        if options.list:
            return _list()
        if options.rebuild is not None:
            return _build(options.rebuild or list(KERNELS), rebuild=True)
        if options.build_root:
            print(roots.obtain(may_build=True))
            return 0
        if options.build is not None:
            return _build(options.build or list(KERNELS), rebuild=False)
        return _run(options, command)
    except (RunnerError, OSError, subprocess.CalledProcessError) as error:
        _say(str(error))
        return EXIT_GUEST_LOST
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _exit_on_signal(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _say(text: str) -> None:
    print(f"vm-tests/run: {text}", file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split at the first ``--``: everything after it belongs to the command, whatever it looks like."""
    own, command = list(arguments), []
    if "--" in own:
        at = own.index("--")
        own, command = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="vm-tests/run",
        description=_DESCRIPTION,
        usage="%(prog)s --kernel KERNEL [options] -- COMMAND...\n       %(prog)s --build [KERNEL...]\n"
        "       %(prog)s --list",
    )
    parser.add_argument("--kernel", choices=list(KERNELS), metavar="KERNEL", help=", ".join(KERNELS))
    parser.add_argument(
        "--timeout", type=float, metavar="S", help="time limit in seconds; 120 for UML, 600 for QEMU"
    )
    parser.add_argument(
        "--memory",
        type=int,
        default=2048,
        metavar="MIB",
        help="guest memory, default 2048; used as it is touched",
    )
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="virtual CPUs, QEMU only; default 1")
    parser.add_argument(
        "--append", default="", metavar="WORDS", help="more words for the kernel's command line"
    )
    parser.add_argument(
        "--root",
        choices=roots.NAMES,
        default=roots.HOST,
        help="host: this machine's own / (default); systemd: a small Debian 12 that boots systemd, with the"
        " checkout's units enabled; the command is started when all of them are",
    )
    parser.add_argument(
        "--disk",
        type=Path,
        metavar="FILE",
        help="what lies behind /var/lib/erofsd, made if missing and kept: the next run with it finds what"
        " this one synced",
    )
    parser.add_argument(
        "--no-build", action="store_true", help="end with 125 when kernel or root is not built"
    )
    for option, text in (
        ("--build", "build what is missing of these, or of all, and end"),
        ("--rebuild", "the same, also what is built already"),
    ):
        parser.add_argument(option, nargs="*", choices=list(KERNELS), metavar="KERNEL", help=text)
    parser.add_argument("--build-root", action="store_true", help="build the root with systemd, and end")
    parser.add_argument(
        "--list", action="store_true", help="print the kernels, what they are and where they lie"
    )
    options = parser.parse_args(own)
    if not (options.list or options.build_root) and options.build is None and options.rebuild is None:
        if options.kernel is None:
            parser.error("--kernel is missing")
        if not command:
            parser.error("no command: -- COMMAND...")
    return options, command


def _list() -> int:
    print(f"cache: {directory()}\nQEMU guests: {' or '.join(qemu.accelerators())}")
    for kernel in KERNELS.values():
        built = find(kernel)
        state = f"{built.release} in {built.path}" if built else "not built"
        print(f"{kernel.name:16}{kernel.purpose}\n{'':16}{state}")
    return 0


def _build(names: Sequence[str], *, rebuild: bool) -> int:
    for name in names:
        started = time.monotonic()
        built = obtain(KERNELS[name], may_build=True, rebuild=rebuild)
        print(f"{name}: {built.release} in {built.path} ({time.monotonic() - started:.0f} s)", flush=True)
    return 0


def _run(options: argparse.Namespace, command: Sequence[str]) -> int:
    kernel = KERNELS[options.kernel]
    limit_s = kernel.time_limit_s if options.timeout is None else options.timeout
    built = obtain(kernel, may_build=not options.no_build)
    root = roots.obtain(may_build=not options.no_build) if options.root != roots.HOST else None
    disk = options.disk.absolute() if options.disk else None
    umask = os.umask(0o022)
    started = time.monotonic()
    with jobs.lay_out(kernel.name, kernel.vehicle, built, command, os.environ, umask, root, disk) as job:
        verdict = _boot_and_watch(kernel, built, job, options, started + limit_s)
        reached = job.started()
    if verdict == Verdict(End.COMMAND_ENDED, 0):
        job.kernel_log.unlink(missing_ok=True)
        return 0
    where = f"kernel log: {job.kernel_log}"
    when = "while the command ran" if reached else "before the command started"
    match verdict.end:
        case End.COMMAND_ENDED:
            _say(f"the command ended with {verdict.exit_code}; {where}")
            return verdict.exit_code
        case End.TIME_LIMIT:
            _say(f"time limit of {limit_s:g} s reached {when}; {where}")
            return EXIT_TIME_LIMIT
        case End.GUEST_LOST:
            _say(f"guest lost {when}; {where}")
            return EXIT_GUEST_LOST


def _boot_and_watch(
    kernel: Kernel, built: Built, job: jobs.Job, options: argparse.Namespace, deadline: float
) -> Verdict:
    machine = Machine(options.memory, options.cpus, options.append)
    if kernel.vehicle == "uml":
        with uml.boot(built, job, machine) as process:
            return watch(process, job, deadline)
    for accelerator in qemu.accelerators():
        with qemu.boot(built, job, machine, accelerator) as process:
            is_stuck = qemu.kvm_failure(job) if accelerator == "kvm" else lambda: False
            verdict = watch(process, job, deadline, is_stuck)
        if accelerator != "kvm" or verdict.end is not End.GUEST_LOST or job.started():
            break
        qemu.remember_kvm_broken()
        job.reset()
    return verdict
