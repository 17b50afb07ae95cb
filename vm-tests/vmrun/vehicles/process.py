"""Start a guest's processes so that none outlives the runner, however that ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def guest_process(
    command: Sequence[str | Path],
    log: BinaryIO,
    environment: Mapping[str, str] | None = None,
    cpus: set[int] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run *command* in a process group of its own, output to *log*; killed on leaving, or with the runner.

    Args:
        cpus: The only CPUs it may run on; all that the runner may use when None.
    """
    runner = os.getpid()

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != runner:  # it died before the line above
            os._exit(1)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a panicking UML aborts
        if cpus:
            os.sched_setaffinity(0, cpus)

    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,  # a ^C goes to the runner only, which ends the guest in order
        preexec_fn=prepare,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
