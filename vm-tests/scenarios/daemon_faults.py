"""Sources that lie and a disk that is full, the daemon's own tests of both, in a guest.

kernels: on-demand
time limit: 900 s under emulation, 200 s else
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suite_rig import run_tests

sys.exit(run_tests("tests/daemon/test_lies.py", "tests/daemon/test_disk_full.py"))
