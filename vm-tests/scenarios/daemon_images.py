"""The daemon's own tests of real images, in a guest.

kernels: on-demand
time limit: 900 s under emulation, 300 s else
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suite_rig import run_tests

TESTS = "nydus_images or loose or own_bootstrap or single_file or chunked or two_directories"

sys.exit(run_tests("tests/daemon/test_mounts.py", "-k", TESTS, may_skip=True))
