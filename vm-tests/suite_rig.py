"""What scenarios share that run tests of the checkout's own suite in a guest: the same assertions there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = "/var/lib/erofsd"
SLOWNESS = 1 if os.environ.get("VM_KERNEL", "").startswith("uml") else 10
TEST_LIMIT_S = 120


def run_tests(*arguments: str, may_skip: bool = False) -> int:
    """Run pytest with *arguments*, on the guest's ext4, which all engines take; an exit code.

    Args:
        may_skip: False: a test that is skipped has failed, where the kernel is there that it wanted.
    """
    environment = {**os.environ, "EROFSD_TEST_DIR": HOME, "EROFSD_TEST_SLOWNESS": str(SLOWNESS)}
    limit = f"timeout={TEST_LIMIT_S * SLOWNESS}"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-o", limit, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    return done.returncode or (1 if " skipped" in done.stdout and not may_skip else 0)
