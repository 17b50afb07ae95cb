"""QEMU with KVM where that works, else software emulation; root and shares over virtiofs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from vmrun import cache, packages
from vmrun.cache import Built
from vmrun.errors import RunnerError
from vmrun.job import Job

from .machine import Machine
from .process import guest_process

_QEMU = "qemu-system-x86_64"
_VIRTIOFSD = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
_KVM_GET_API_VERSION = 0xAE00
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


# What a guest under KVM may take to its init, on a busy host; two seconds are usual.
_KVM_START_LIMIT_S = 30.0


def accelerators() -> list[str]:
    """What to try, in order. A /dev/kvm that opens proves little: see :func:`kvm_failure`."""
    if _kvm_known_broken().exists():
        return ["tcg"]
    try:
        with open("/dev/kvm", "rb+", buffering=0) as device:
            usable = fcntl.ioctl(device, _KVM_GET_API_VERSION) == 12
    except OSError:
        usable = False
    return ["kvm", "tcg"] if usable else ["tcg"]


def kvm_failure(job: Job) -> Callable[[], bool]:
    """Tells whether a guest just started under KVM got stuck before its init.

    Where virtualization is nested badly, QEMU aborts on a register it cannot set, or stops the virtual CPU at
    an instruction that KVM had to emulate and could not, and waits for ever.
    """
    limit = time.monotonic() + _KVM_START_LIMIT_S

    def is_stuck() -> bool:
        if job.started():
            return False
        return time.monotonic() > limit or b"KVM internal error" in job.kernel_log.read_bytes()

    return is_stuck


def remember_kvm_broken() -> None:
    """Do not try KVM again until this machine has been restarted."""
    _kvm_known_broken().parent.mkdir(parents=True, exist_ok=True)
    _kvm_known_broken().touch()


def _kvm_known_broken() -> Path:
    return cache.directory() / "locks" / f"kvm-broken-{_BOOT_ID.read_text().strip()}"


@contextlib.contextmanager
def boot(built: Built, job: Job, machine: Machine, accelerator: str) -> Iterator[subprocess.Popen[bytes]]:
    """Boot *built* for *job*; guest memory is shared anonymous memory, as virtiofs has to reach it."""
    if os.geteuid() != 0:
        raise RunnerError("QEMU guests need root: virtiofsd serves the host's / to them")
    if not shutil.which(_QEMU):
        packages.ensure(["qemu-system-x86"])
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(job.kernel_log.open("ab"))
        daemon_log = stack.enter_context((job.directory / "virtiofsd.log").open("ab"))
        # Not beside the rest: a socket's path has 107 bytes at most, and that of the job is the user's.
        short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="erofsd-vm-", dir="/run")))
        sockets = {}
        # The host's / changes rarely, and cached for ever it is three times faster.
        for tag, source, caching in (
            ("hostroot", Path("/"), "always"),
            ("io", job.io, "auto"),
            ("out", job.out, "auto"),
        ):
            sockets[tag] = short / f"{tag}.socket"
            stack.enter_context(_virtiofsd(sockets[tag], source, caching, daemon_log))
        command = _command(built, job, sockets, machine, accelerator)
        yield stack.enter_context(guest_process(command, log))


@contextlib.contextmanager
def _virtiofsd(socket: Path, source: Path, caching: str, log: BinaryIO) -> Iterator[None]:
    program = next((path for path in _VIRTIOFSD if os.access(path, os.X_OK)), None)
    if program is None:
        raise RunnerError(f"no virtiofsd: looked for {' and '.join(_VIRTIOFSD)}")
    options = ["-o", f"source={source}", "-o", "sandbox=chroot", "-o", f"cache={caching}"]
    with guest_process([program, "-f", f"--socket-path={socket}", *options], log) as process:
        deadline = time.monotonic() + 30
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RunnerError(
                    f"virtiofsd for {source} did not start: {Path(log.name).read_text()[-500:]}"
                )
            time.sleep(0.01)
        yield


def _command(
    built: Built, job: Job, sockets: dict[str, Path], machine: Machine, accelerator: str
) -> list[str]:
    kernel, initrd = built.file("kernel"), built.file("initrd")
    kernel_line = (
        "console=ttyS0 loglevel=6 panic=-1 oops=panic panic_on_warn=1 root=hostroot rootfstype=virtiofs ro "
        f"init={job.init} vm_job={job.directory} {machine.append}"
    )
    cpu = "host" if accelerator == "kvm" else "max"
    size = machine.memory_mib
    command = f"""
        {_QEMU} -accel {accelerator} -M q35 -cpu {cpu} -smp {machine.cpus}
        -m {size} -object memory-backend-memfd,id=mem,size={size}M,share=on -numa node,memdev=mem
        -nodefaults -no-user-config -display none -monitor none -serial stdio -no-reboot
        -drive if=none,id=disk,file={job.disk},format=raw,cache=unsafe,discard=unmap
        -device virtio-blk-pci,drive=disk -device virtio-rng-pci
        -kernel {kernel}""".split()
    if initrd:
        command += ["-initrd", str(initrd)]
    for tag, socket in sockets.items():
        command += ["-chardev", f"socket,id={tag},path={socket}"]
        command += ["-device", f"vhost-user-fs-pci,chardev={tag},tag={tag}"]
    return [*command, "-append", kernel_line.strip()]
