"""User Mode Linux: the guest is a process on the host, its root is hostfs, its disk a file on ubd."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator

from vmrun import cache, space
from vmrun.cache import Built
from vmrun.job import Job

from .machine import Machine
from .process import guest_process


@contextlib.contextmanager
def boot(built: Built, job: Job, machine: Machine) -> Iterator[subprocess.Popen[bytes]]:
    """Boot *built* for *job*, pinned to a CPU.

    Pinned, because tracer and traced process on two CPUs make everything two to three times slower; guests
    that run side by side each claim a CPU of their own as far as there are any.
    """
    kernel = built.file("kernel")
    assert kernel is not None
    command = [
        str(kernel),
        f"mem={machine.memory_mib}M",
        "root=/dev/root rootfstype=hostfs rootflags=/ ro",
        f"ubd0={job.disk}",
        "con=null con0=null,fd:1",  # the console is our log; no terminal is looked for
        f"uml_dir={job.directory}/uml",
        "loglevel=7 panic=-1 oops=panic panic_on_warn=1",
        f"init={job.init} vm_job={job.directory}",
        machine.append,
    ]
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(job.directory),  # it panics early when it cannot write there
        "TMPDIR": str(space.memory_home(machine.memory_mib << 20)),
    }
    words = " ".join(command).split()
    with (
        _claimed_cpu() as cpu,
        job.kernel_log.open("ab") as log,
        guest_process(words, log, environment, cpus={cpu}) as process,
    ):
        yield process


@contextlib.contextmanager
def _claimed_cpu() -> Iterator[int]:
    allowed = sorted(os.sched_getaffinity(0))
    random.shuffle(allowed)
    by_lock = {f"cpu-{cpu}": cpu for cpu in allowed}
    with cache.claim_one_of(list(by_lock)) as lock:
        yield by_lock[lock] if lock else allowed[0]
