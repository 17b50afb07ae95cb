"""Guests for the tests in this directory: ``pytest vm-tests [--kernel NAME ...] [--build-kernels]``."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from vmrun.kernels import KERNELS, find, obtain  # noqa: E402

BY_DEFAULT = ("uml-6.12", "uml-6.1")


@dataclass(frozen=True)
class Guest:
    """Runs commands in fresh guests of one kernel, by the program that people use."""

    kernel: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def emulated(self) -> bool:
        """Whether it may run under software emulation, ten times slower than UML."""
        return KERNELS[self.kernel].vehicle == "qemu"

    @property
    def on_demand(self) -> bool:
        return self.kernel != "debian-fanotify"

    def arguments(self, *options: str) -> list[str]:
        return [str(HERE / "run"), "--kernel", self.kernel, *options]

    def run(
        self,
        *command: str | bytes | Path,
        options: tuple[str, ...] = (),
        cwd: Path | None = None,
        **more: str,
    ) -> subprocess.CompletedProcess[bytes]:
        """Boot, run *command*, wait; *more* is added to the environment."""
        return subprocess.run(
            [*self.arguments(*options), "--", *command],
            capture_output=True,
            cwd=cwd,
            env={**os.environ, **self.environment, **more},
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernel",
        action="append",
        metavar="NAME",
        help=f"boot this one; repeatable, or all; default {BY_DEFAULT}",
    )
    parser.addoption("--build-kernels", action="store_true", help="build what is missing instead of skipping")


def selected_kernels(config: pytest.Config) -> list[str]:
    """The kernels that this run of pytest is about."""
    asked = config.getoption("--kernel") or list(BY_DEFAULT)
    return list(KERNELS) if "all" in asked else asked


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "guest" in metafunc.fixturenames and "scenario" not in metafunc.fixturenames:
        metafunc.parametrize("guest", selected_kernels(metafunc.config), indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The guest's own limit must end a test before pytest does: only then is there a kernel log.
    for item in items:
        if "guest" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(1300))


@pytest.fixture
def guest(request: pytest.FixtureRequest, tmp_path: Path) -> Guest:
    """A guest of the kernel that the test is parametrized with."""
    kernel = KERNELS[request.param]
    if request.config.getoption("--build-kernels"):
        obtain(kernel, may_build=True)
    elif find(kernel) is None:
        pytest.skip(
            f"{kernel.name} is not built: `vm-tests/run --build {kernel.name}`, or pytest --build-kernels"
        )
    job_home = tmp_path / "jobs"
    job_home.mkdir()
    return Guest(kernel.name, {"TMPDIR": str(job_home)})
