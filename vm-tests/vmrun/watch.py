"""Relay a running command's output and decide how its run ended.

The guest appends to two files that both sides see; the host copies what is new. The verdict:

* ``status`` is there: the command ended, and all its output was written before that file.
* the vehicle's process is gone without it, after a panic or because somebody killed it: the guest is lost.
* the limit passed: neither.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from .job import Job

# Nothing tells the host when a guest writes to a shared file; 50 looks a second cost under 1 % of a CPU.
_POLL_INTERVAL_S = 0.02
# A pipe that select() calls writable takes this much without blocking.
_PIECE = select.PIPE_BUF


class End(Enum):
    """How a run ended."""

    COMMAND_ENDED = auto()
    TIME_LIMIT = auto()
    GUEST_LOST = auto()


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the run ended, and the command's exit code if it did end."""

    end: End
    exit_code: int = 0


class _Relay:
    """Copies a growing file to a descriptor of ours."""

    def __init__(self, source: Path, target_fd: int) -> None:
        self._file = source.open("rb", buffering=0)
        self._pending = b""
        self.target_fd = target_fd

    def load(self) -> bool:
        """Whether there is something to write now."""
        if not self._pending:
            self._pending = self._file.read(1 << 20)
        return bool(self._pending)

    def write_piece(self) -> None:
        written = os.write(self.target_fd, self._pending[:_PIECE])
        self._pending = self._pending[written:]

    def finish(self) -> None:
        """Write everything that the file still holds."""
        while self.load():
            self.write_piece()


def watch(
    process: subprocess.Popen[bytes], job: Job, deadline: float, is_stuck: Callable[[], bool] = lambda: False
) -> Verdict:
    """Relay until the command has ended, the guest is gone, or time.monotonic() has reached *deadline*.

    Args:
        is_stuck: What else makes the guest a lost one while its process lives.
    """
    relays = [_Relay(job.io / "stdout", 1), _Relay(job.io / "stderr", 2)]
    verdict = None
    while verdict is None:
        _relay_once(relays)
        verdict = _verdict(process, job, deadline, is_stuck)
    for relay in relays:
        relay.finish()
    return verdict


def _relay_once(relays: list[_Relay]) -> None:
    """Write one piece where something is pending and the reader takes it; else wait for one poll interval."""
    pending = {relay.target_fd: relay for relay in relays if relay.load()}
    if not pending:
        time.sleep(_POLL_INTERVAL_S)
        return
    _, writable, _ = select.select([], list(pending), [], _POLL_INTERVAL_S)
    for fd in writable:
        pending[fd].write_piece()


def _verdict(
    process: subprocess.Popen[bytes], job: Job, deadline: float, is_stuck: Callable[[], bool]
) -> Verdict | None:
    # The process first: a status written just before the guest went away counts.
    gone = process.poll() is not None or is_stuck()
    code = job.status()
    if code is not None:
        return Verdict(End.COMMAND_ENDED, code)
    if gone:
        return Verdict(End.GUEST_LOST)
    if time.monotonic() >= deadline:
        return Verdict(End.TIME_LIMIT)
    return None
