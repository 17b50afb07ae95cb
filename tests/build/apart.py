"""``erofsd`` as a process of its own, and how much memory that took."""

from __future__ import annotations

import os
import subprocess
import sys

# Not what wait4 tells: that begins with the memory of whoever started it. Source: Linux fs/exec.c, exec_mmap.
_PROGRAM = """
import re, sys
from erofsd.cli import main
code = main(sys.argv[2:])
with open("/proc/self/status") as status, open(int(sys.argv[1]), "w") as out:
    out.write(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])
sys.exit(code)
"""


def run_apart(*argv: object) -> tuple[str, int]:
    """Run a command that succeeds: its output, and the bytes that were resident at most."""
    read_fd, write_fd = os.pipe()
    with open(read_fd) as told:
        command = [sys.executable, "-c", _PROGRAM, str(write_fd), *map(str, argv)]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, pass_fds=[write_fd], check=True)
        finally:
            os.close(write_fd)
        return done.stdout, int(told.read()) << 10
