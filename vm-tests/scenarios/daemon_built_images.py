"""Images that are built in a guest, RAFS and plain EROFS: mounted, and compared with their directories.

kernels: on-demand
time limit: 900 s under emulation, 300 s else
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suite_rig import run_tests

sys.exit(run_tests("tests/daemon/test_built_images.py"))
