"""Every file in ``scenarios/`` in a guest of its own, on each selected kernel it is for.

A scenario is a Python program. Its docstring says in lines of their own which ``kernels:`` it is for
(``on-demand``, ``fanotify``, ``all``, or names) and its ``time limit:``. It passes by ending with 0; 77
skips, the last line of its output being the reason. A lost guest is told apart from a failed test. Two more
lines it may have: ``root: systemd`` boots that, and with ``boots: 2`` it runs in so many guests one after the
other, with one disk.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import HERE, KERNELS, Guest, selected_kernels
from vmrun import roots

SKIP = 77
LOST = 125
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
    time_limits_s: tuple[float, float]  # of one boot: under emulation, else
    root: str
    boots: int

    @classmethod
    def load(cls, path: Path) -> Scenario:
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        kernels = re.search(r"^kernels: (.+)$", text, re.MULTILINE)
        limits = re.search(r"^time limit: (\d+) s under emulation, (\d+) s else$", text, re.MULTILINE)
        if not kernels or not limits:
            raise ValueError(f"{path.name}: its docstring lacks `kernels:` or `time limit:`")
        root = re.search(r"^root: (\w+)$", text, re.MULTILINE)
        boots = re.search(r"^boots: (\d+)$", text, re.MULTILINE)
        names = [name for word in kernels[1].split() for name in GROUPS.get(word, [word])]
        return cls(
            path,
            tuple(names),
            (float(limits[1]), float(limits[2])),
            root[1] if root else roots.HOST,
            int(boots[1]) if boots else 1,
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    scenarios = [Scenario.load(path) for path in sorted((HERE / "scenarios").glob("*.py"))]
    selected = selected_kernels(metafunc.config)
    pairs = [
        (scenario, kernel) for scenario in scenarios for kernel in scenario.kernels if kernel in selected
    ]
    ids = [f"{scenario.path.stem}-{kernel}" for scenario, kernel in pairs]
    metafunc.parametrize(("scenario", "guest"), pairs, indirect=["guest"], ids=ids)


def test_scenario(scenario: Scenario, guest: Guest, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if scenario.root != roots.HOST and not request.config.getoption("--build-kernels") and not roots.find():
        pytest.skip("the root with systemd is not built: `vm-tests/run --build-root`, or --build-kernels")
    limit_s = scenario.time_limits_s[0 if guest.emulated else 1]
    options = ["--timeout", str(limit_s), "--root", scenario.root]
    if scenario.boots > 1:
        options += ["--disk", str(tmp_path / "disk")]
    for _ in range(scenario.boots):
        reply = guest.run(sys.executable, scenario.path, options=tuple(options))
        if reply.returncode == LOST and scenario.boots == 1:
            # UML itself dies now and then, of its own page tables; what dies twice is ours.
            reply = guest.run(sys.executable, scenario.path, options=tuple(options))
        _judge(reply)


def _judge(reply: subprocess.CompletedProcess[bytes]) -> None:
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
