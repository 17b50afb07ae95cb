"""Every file in ``scenarios/`` in a guest of its own, on each selected kernel it is for.

A scenario is a Python program. Its docstring says in lines of their own which ``kernels:`` it is for
(``on-demand``, ``fanotify``, ``all``, or names) and its ``time limit:``. It passes by ending with 0; 77
skips, the last line of its output being the reason. A lost guest is told apart from a failed test.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import HERE, KERNELS, Guest, selected_kernels

SKIP = 77
GROUPS = {
    "on-demand": [name for name in KERNELS if name != "debian-fanotify"],
    "fanotify": ["debian-fanotify"],
    "all": list(KERNELS),
}


@dataclass(frozen=True)
class Scenario:
    """One file of ``scenarios/`` with what its docstring says."""

    path: Path
    kernels: tuple[str, ...]
    time_limits_s: tuple[float, float]  # under emulation, else

    @classmethod
    def load(cls, path: Path) -> Scenario:
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        kernels = re.search(r"^kernels: (.+)$", text, re.MULTILINE)
        limits = re.search(r"^time limit: (\d+) s under emulation, (\d+) s else$", text, re.MULTILINE)
        if not kernels or not limits:
            raise ValueError(f"{path.name}: its docstring lacks `kernels:` or `time limit:`")
        names = [name for word in kernels[1].split() for name in GROUPS.get(word, [word])]
        return cls(path, tuple(names), (float(limits[1]), float(limits[2])))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    scenarios = [Scenario.load(path) for path in sorted((HERE / "scenarios").glob("*.py"))]
    selected = selected_kernels(metafunc.config)
    pairs = [
        (scenario, kernel) for scenario in scenarios for kernel in scenario.kernels if kernel in selected
    ]
    ids = [f"{scenario.path.stem}-{kernel}" for scenario, kernel in pairs]
    metafunc.parametrize(("scenario", "guest"), pairs, indirect=["guest"], ids=ids)


def test_scenario(scenario: Scenario, guest: Guest) -> None:
    limit_s = scenario.time_limits_s[0 if guest.emulated else 1]
    reply = guest.run(sys.executable, scenario.path, options=("--timeout", str(limit_s)))
    output = reply.stdout.decode(errors="replace") + reply.stderr.decode(errors="replace")
    match reply.returncode:
        case 0:
            return
        case code if code == SKIP:
            pytest.skip(reply.stdout.decode(errors="replace").strip().rpartition("\n")[2])
        case 124 | 125 as code if "vm-tests/run: " in output:
            pytest.fail(f"{'TIME LIMIT' if code == 124 else 'GUEST LOST'}\n{output}", pytrace=False)
        case code:
            pytest.fail(f"scenario ended with {code}\n{output}", pytrace=False)
