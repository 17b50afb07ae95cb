"""One run, laid out as a directory that host and guest see under the same path.

The guest's root is the host's own, so passing the command, its environment and its pipes is a matter of files
in a directory. Two directories are shared writable: ``io``, which brings the output and the status back, and
``$VM_OUT``. ``guest-init`` lists what is where.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import roots, space
from .cache import Built
from .errors import RunnerError

GUEST_INIT = Path(__file__).resolve().parent.parent / "guest-init"
STATE_DIRECTORY = "/var/lib/erofsd"
DISK_SIZE = 4 << 30
# Loaded at boot in kernels that have them as modules; what a kernel lacks is skipped, its log says so.
_MODULES = "overlay virtio_blk ext4 loop fuse cachefiles erofs"


@dataclass(frozen=True, slots=True)
class Job:
    """The files of one run."""

    directory: Path
    out: Path  # $VM_OUT, the same path in the guest
    disk: Path
    kernel_log: Path
    keeps_disk: bool = False  # the caller's own: what an earlier run wrote is on it

    @property
    def io(self) -> Path:
        """Shared with the guest, writable from there."""
        return self.directory / "io"

    @property
    def init(self) -> Path:
        """The guest's PID 1: a copy, as the checkout's path may not fit on a kernel command line."""
        return self.directory / "init"

    @property
    def overlay(self) -> Path:
        """What lies over a root that is not the host's."""
        return self.directory / "overlay"

    def started(self) -> bool:
        """Whether the guest's init came as far as the command."""
        return (self.io / "started").exists()

    def status(self) -> int | None:
        """The command's exit code, None as long as it has not ended or its output is not all here."""
        try:
            text = (self.io / "status").read_text()
        except FileNotFoundError:
            return None
        return int(text) if text.endswith("\n") else None

    def reset(self) -> None:
        """Make the job ready for another boot after one that never reached the command."""
        for name in ("started", "status"):
            (self.io / name).unlink(missing_ok=True)
        for name in ("stdout", "stderr"):
            (self.io / name).write_bytes(b"")
        self.kernel_log.write_bytes(b"")
        if not self.keeps_disk:
            self.disk.unlink(missing_ok=True)
        if not self.disk.exists():
            _make_disk(self.disk)


@contextlib.contextmanager
def lay_out(
    kernel_name: str,
    vehicle: str,
    built: Built,
    command: Sequence[str],
    environment: Mapping[str, str],
    umask: int,
    root: Path | None = None,
    disk: Path | None = None,
) -> Iterator[Job]:
    """Make the directory of a run of *command* in the caller's directory; removed afterwards.

    The kernel log lies beside it and stays: whoever is satisfied with the run removes it.

    Args:
        root: What the guest has below its overlay instead of the host's own /; boots systemd.
        disk: The file behind /var/lib/erofsd, made if it is missing; a fresh one that goes when None.

    Raises:
        RunnerError: A path that the guest cannot see, or no room.
    """
    home = space.job_home()
    cwd = Path.cwd()
    for path in (cwd, built.path, *([root] if root else [])):
        if space.is_hidden(path):
            raise RunnerError(
                f"{path} cannot be seen in the guest, which has its own {space.HIDDEN_IN_GUEST}"
            )
    if not space.is_plain(built.path):
        raise RunnerError(f"{built.path}: blanks, commas and the like do not pass QEMU; set EROFSD_VM_CACHE")
    if disk and not space.is_plain(disk):
        raise RunnerError(f"{disk}: blanks, commas and the like do not pass QEMU")
    log_fd, log_name = tempfile.mkstemp(prefix=f"erofsd-vm-{kernel_name}-", suffix=".log", dir=home)
    os.close(log_fd)
    directory = Path(tempfile.mkdtemp(prefix="erofsd-vm-", dir=home))
    try:
        with _out_directory(environment, home) as out:
            job = Job(directory, out, disk or directory / "disk", Path(log_name), keeps_disk=disk is not None)
            _fill(job, kernel_name, vehicle, built, command, environment, umask, root)
            yield job
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if Path(log_name).stat().st_size == 0:
            Path(log_name).unlink()


@contextlib.contextmanager
def _out_directory(environment: Mapping[str, str], home: Path) -> Iterator[Path]:
    """The caller's $VM_OUT, made if need be, or a fresh directory that stays if the guest writes to it."""
    if chosen := environment.get("VM_OUT"):
        out = Path(chosen).absolute()
        out.mkdir(parents=True, exist_ok=True)
        out = out.resolve()
        if out == Path("/") or "," in str(out):
            raise RunnerError(f"VM_OUT={out}: the root, or a path with a comma, cannot be shared")
        yield out
        return
    out = Path(tempfile.mkdtemp(prefix="erofsd-vm-out-", dir=home))
    try:
        yield out
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()


def _fill(
    job: Job,
    kernel_name: str,
    vehicle: str,
    built: Built,
    command: Sequence[str],
    environment: Mapping[str, str],
    umask: int,
    root: Path | None,
) -> None:
    (job.directory / "dev").mkdir()
    job.io.mkdir()
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        (job.directory / "dev" / name).symlink_to(f"/proc/self/fd{target}")
    for name in ("stdout", "stderr"):
        os.mkfifo(job.directory / f"{name}.fifo")
    shutil.copy(GUEST_INIT, job.init)
    job.init.chmod(0o755)
    guest_environment = {**environment, "VM_OUT": str(job.out), "VM_KERNEL": kernel_name}
    (job.directory / "command").write_bytes(command_script(command, guest_environment, Path.cwd(), umask))
    modules = built.file("modules")
    setup = {
        "vm_modules": str(modules) if modules else "",
        "vm_load": _MODULES,
        "vm_hostname": os.uname().nodename,
        "vm_out": str(job.out),
        "vm_systemd": "yes" if root else "",
    }
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in setup.items()]
    (job.directory / "setup").write_text("".join(lines))
    if root:
        roots.overlay(job.overlay, job.init)
    (job.directory / "fstab").write_bytes(fstab(job, vehicle, modules, root))
    job.reset()


def command_script(command: Sequence[str], environment: Mapping[str, str], cwd: Path, umask: int) -> bytes:
    """A shell script that becomes *command*, byte for byte, in *cwd* with exactly *environment*.

    By env(1), not by export: a name like ``npm_config_x-y`` is fine for execve and not for a shell.
    """
    words = ["env", "-i", "--", *(f"{name}={value}" for name, value in environment.items())]
    if "=" in command[0]:  # env would take it for one more variable; nice passes it on untouched
        words += ["nice", "-n", "0"]
    quoted = " ".join(shlex.quote(word) for word in (*words, *command))
    script = f"umask {umask:04o}\ncd {shlex.quote(str(cwd))} || exit 126\nexec {quoted}\n"
    return os.fsencode(script)


def fstab(job: Job, vehicle: str, modules: Path | None, root: Path | None = None) -> bytes:
    """What the guest mounts, in order, below /run/root; missing targets are made in the overlay."""
    disk = {"uml": "ubda", "qemu": "vda"}[vehicle]
    lower = f"{job.overlay}:{root}" if root else "/"
    rows = [
        ("overlay", "", "overlay", f"lowerdir={lower},upperdir=/run/upper,workdir=/run/work"),
        ("proc", "/proc", "proc", "defaults"),
        ("sysfs", "/sys", "sysfs", "defaults"),
        ("devtmpfs", "/dev", "devtmpfs", "defaults"),
        ("shm", "/dev/shm", "tmpfs", "X-mount.mkdir"),
        ("devpts", "/dev/pts", "devpts", "X-mount.mkdir,gid=5,mode=620,ptmxmode=666"),
        ("run", "/run", "tmpfs", "mode=755"),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", "defaults"),
        ("debugfs", "/sys/kernel/debug", "debugfs", "defaults"),
        (f"/dev/{disk}", STATE_DIRECTORY, "ext4", "X-mount.mkdir"),
        *(_bind(path) for path in ([*roots.visible(Path.cwd()), job.directory] if root else [])),
        _share(vehicle, "io", job.io),
        _share(vehicle, "out", job.out),
    ]
    if modules:
        rows.append(_bind(modules / "lib/modules", Path("/lib/modules")))
    lines = (" ".join(map(_fstab_word, (what, f"/run/root{where}", *rest))) for what, where, *rest in rows)
    return os.fsencode("".join(f"{line} 0 0\n" for line in lines))


def _bind(path: Path, target: Path | None = None) -> tuple[str, str, str, str]:
    """The row that shows a directory of the host, read-only, at the same or another path."""
    return (str(path), str(target or path), "none", "bind,X-mount.mkdir")


def _share(vehicle: str, tag: str, path: Path) -> tuple[str, str, str, str]:
    """The row that mounts the host's *path* writable at the same path; hostfs takes it as its only option."""
    if vehicle == "uml":
        return (tag, str(path), "hostfs", f"X-mount.mkdir,{path}")
    return (tag, str(path), "virtiofs", "X-mount.mkdir")


def _fstab_word(word: str) -> str:
    for character in "\\ \t\n":
        word = word.replace(character, f"\\{ord(character):03o}")
    return word


def _make_disk(path: Path) -> None:
    """A fresh ext4 in a sparse file, 2 MiB of real space; tells mkfs that the holes are zeros already."""
    with path.open("wb") as file:
        file.truncate(DISK_SIZE)
    mkfs = ["mkfs.ext4", "-q", "-F", "-E", "assume_storage_prezeroed=1", str(path)]
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    reply = subprocess.run(mkfs, capture_output=True, text=True, env=environment)
    if reply.returncode != 0:
        raise RunnerError(f"mkfs.ext4 (package e2fsprogs): {reply.stderr.strip()}")
