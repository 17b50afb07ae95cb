"""The engine's tests over this kernel: every engine's suite, and what the scripted device claims.

kernels: on-demand
time limit: 600 s under emulation, 90 s else
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TESTS = ("tests/ondemand/test_engine_suite.py", "tests/ondemand/test_cachefiles_kernel.py")

pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cachefiles and kernel"]
subprocess.run([*pytest, *TESTS], cwd=ROOT, check=True)
