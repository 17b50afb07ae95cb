"""A real daemon, as a user runs it, on this host's own kernel."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ondemand.engines import probe

#: How many times longer everything takes than on a processor: on an emulated one.
SLOWNESS = float(os.environ.get("EROFSD_TEST_SLOWNESS", 1))
#: On a file system that an engine takes: ext4, xfs or btrfs.
BASE = os.environ.get("EROFSD_TEST_DIR", "/var/tmp")


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
    """Poll until *condition* is true; returns its value. The limit is for an ordinary machine."""
    deadline = time.monotonic() + timeout_s * SLOWNESS
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s} s")
        time.sleep(0.01)
    return value


class Daemon:
    """``erofsd serve`` with a socket and state directory of its own."""

    def __init__(self, directory: Path, **config: Any) -> None:
        self.directory = directory
        self.socket = directory / "api.sock"
        self.state_dir = directory / "state"
        self.log_path = directory / "log"
        lines = [f"{key} = {json.dumps(value)}" for key, value in {"log_level": "debug", **config}.items()]
        (directory / "config.toml").write_text("\n".join(lines) + "\n")
        self.process: subprocess.Popen[bytes] | None = None
        self.directories: list[Path] = []

    def start(self) -> Daemon:
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "erofsd",
                    "serve",
                    *self._options(),
                    "--state-dir",
                    str(self.state_dir),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(lambda: self.socket.exists() or self.process.poll() is not None, "the socket")
        if self.process.poll() is not None:
            raise AssertionError(f"serve ended with {self.process.returncode}:\n{self.log()}")
        return self

    def _options(self) -> list[str]:
        return ["--config", str(self.directory / "config.toml"), "--socket", str(self.socket)]

    def cli(self, verb: str, *arguments: Any, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``erofsd VERB …`` against this daemon."""
        done = subprocess.run(
            [sys.executable, "-m", "erofsd", verb, *map(str, arguments)],
            env={**os.environ, "EROFSD_SOCKET": str(self.socket)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"erofsd {verb} {arguments}: {done.returncode}\n{done.stderr}\n{self.log()[-4000:]}"
            )
        return done

    def mount(self, ref: str, *options: Any) -> Path:
        """Mount *ref* on a new directory."""
        target = self.directory / f"mnt{len(self.directories)}"
        target.mkdir()
        self.directories.append(target)
        self.cli("mount", ref, target, *options)
        return target

    def ls(self, directory: Path | None = None) -> Any:
        mounts = json.loads(self.cli("ls", "--json").stdout)
        if directory is None:
            return mounts
        return next(m for m in mounts if m["dir"] == str(directory))

    def pid(self, who: str) -> int:
        return int((self.directory / f"{who}.pid").read_text())

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's lines with that event."""
        found = []
        for line in self.log().splitlines():
            if f'"{name}"' in line:
                found.append(json.loads(line))
        return found

    def metric(self, name: str) -> float:
        """One value of ``/metrics``."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.socket))
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(name)))

    @staticmethod
    def parent(pid: int) -> int:
        return psutil.Process(pid).ppid()

    def kill_worker(self) -> None:
        pid = self.pid("worker")
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # caught between two workers

    def stop(self) -> int:
        """SIGTERM to the keeper; returns the exit code if it is still our own child."""
        keeper = self.pid("keeper")
        os.kill(keeper, signal.SIGTERM)
        assert self.process is not None
        if keeper == self.process.pid:
            return self.process.wait(timeout=40)
        wait_for(lambda: not self.socket.exists(), "the replaced keeper's end", 40)
        return 0

    def destroy(self) -> None:
        if self.socket.exists():
            try:
                self.stop()
            except (ProcessLookupError, FileNotFoundError, subprocess.TimeoutExpired):
                pass
        for name in ("keeper", "worker"):
            try:
                os.kill(self.pid(name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                pass
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for directory in self.directories:
            subprocess.run(["umount", "-l", str(directory)], capture_output=True, check=False)


@pytest.fixture(scope="session")
def engine_here() -> str:
    """The name of the engine that ``auto`` takes; skips where this kernel has none."""
    found = [probe(name, BASE) for name in ("fanotify", "cachefiles")]
    for each in found:
        if each.works:
            return each.name
    pytest.skip("no engine works here: " + "; ".join(f"{each.name}: {each.reason}" for each in found))


@pytest.fixture
def fanotify_here(engine_here: str) -> None:
    """Skips where the engine is another one."""
    if engine_here != "fanotify":
        pytest.skip(f"is about fanotify, and the engine here is {engine_here}")


@pytest.fixture
def make_directory() -> Iterator[Callable[[], Path]]:
    """Makes directories on a file system that takes pre-content marks."""
    made: list[Path] = []

    def make() -> Path:
        made.append(Path(tempfile.mkdtemp(prefix="erofsd-test-", dir=BASE)))
        return made[-1]

    yield make
    for directory in made:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def make_daemon(engine_here: str) -> Iterator[Callable[..., Daemon]]:
    """Makes daemons; all end with the test, and all they mounted."""
    made: list[Daemon] = []

    def make(**config: Any) -> Daemon:
        directory = Path(tempfile.mkdtemp(prefix="erofsd-test-", dir=BASE))
        made.append(Daemon(directory, **config))
        return made[-1].start()

    yield make
    for daemon in made:
        daemon.destroy()
        shutil.rmtree(daemon.directory, ignore_errors=True)


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    return make_daemon(deadline=20 * SLOWNESS)
