"""The engine's tests over this kernel: every engine's suite, and what the scripted device claims.

kernels: on-demand
time limit: 600 s under emulation, 90 s else
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suite_rig import run_tests

TESTS = ("tests/ondemand/test_engine_suite.py", "tests/ondemand/test_cachefiles_kernel.py")

sys.exit(run_tests(*TESTS, "-x", "-k", "cachefiles and kernel"))
