"""The daemon's worker and keeper killed under readers, in a guest.

kernels: on-demand
time limit: 900 s under emulation, 300 s else
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suite_rig import run_tests

sys.exit(run_tests("tests/daemon/test_mounts.py", "-k", "survive or keeper"))
