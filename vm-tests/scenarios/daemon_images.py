"""The daemon's own tests of real images, in a guest: the same images, the same assertions, another engine.

kernels: on-demand
time limit: 900 s under emulation, 300 s else
"""

from __future__ import annotations

import os
import subprocess
import sys

TESTS = "nydus_images or loose or own_bootstrap or single_file or chunked or two_directories"
NO_TESTS = 5  # pytest's exit code


def main() -> int:
    """Run them on the guest's ext4, which the engine takes."""
    environment = {**os.environ, "EROFSD_TEST_DIR": "/var/lib/erofsd"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/daemon/test_mounts.py"]
    done = subprocess.run([*command, "-k", TESTS], env=environment, check=False)
    return 1 if done.returncode == NO_TESTS else done.returncode


if __name__ == "__main__":
    sys.exit(main())
