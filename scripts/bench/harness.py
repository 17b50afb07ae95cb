"""What the benchmarks share: a private daemon, an origin, test data, and honest printing.

Every figure is printed with the baseline of the same run: absolute figures wander with the machine.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import rafs  # noqa: E402  # the tests' image writer

MIB = 1 << 20
READY_S = 30.0


def wait_for(condition: Callable[[], Any], what: str) -> None:
    """Poll until *condition* is true."""
    deadline = time.monotonic() + READY_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {READY_S:g} s")
        time.sleep(0.01)


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A directory on a file system that an engine takes: below EROFSD_TEST_DIR, by default /var/tmp."""
    path = Path(tempfile.mkdtemp(prefix="erofsd-bench-", dir=os.environ.get("EROFSD_TEST_DIR", "/var/tmp")))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def origin(directory: Path, work: Path) -> Iterator[str]:
    """nginx serving *directory* on loopback; yields the URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = work / "nginx.conf"
    config.write_text(
        f"worker_processes 1; daemon off; pid {work}/nginx.pid; error_log stderr crit; user root;\n"
        "events { worker_connections 256; }\n"
        "http { access_log off; sendfile on; keepalive_requests 1000000;\n"
        f"  client_body_temp_path {work}; proxy_temp_path {work}; fastcgi_temp_path {work};\n"
        f"  uwsgi_temp_path {work}; scgi_temp_path {work};\n"
        f"  server {{ listen 127.0.0.1:{port}; root {directory}; }} }}\n"
    )
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if nginx is None:
        raise SystemExit("nginx is not installed: apt-get install nginx-light")
    process = subprocess.Popen([nginx, "-c", str(config)])
    try:
        wait_for(lambda: _answers(port), "nginx")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=1)) as connection:
        try:
            connection.request("HEAD", "/")
            connection.getresponse()
        except OSError:
            return False
        return True


class Daemon:
    """A private ``erofsd serve``; use as a context manager."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.socket = work / "api.sock"
        self.state_dir = work / "state"

    def __enter__(self) -> Daemon:
        with open(self.work / "log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "erofsd",
                    "serve",
                    "--socket",
                    str(self.socket),
                    "--state-dir",
                    str(self.state_dir),
                ],
                cwd=ROOT,
                stderr=log,
                stdout=log,
            )
        wait_for(lambda: self.socket.exists() or self._process.poll() is not None, "erofsd serve")
        if self._process.poll() is not None:
            raise SystemExit((self.work / "log").read_text())
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=60)

    def cli(self, *arguments: object) -> str:
        """Run ``erofsd …`` against this daemon; returns its standard output."""
        done = subprocess.run(
            [sys.executable, "-m", "erofsd", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "EROFSD_SOCKET": str(self.socket)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"erofsd {arguments}: {done.stderr}")
        return done.stdout

    def ls(self, directory: Path) -> dict[str, Any]:
        """The daemon's view of one mount."""
        return next(m for m in json.loads(self.cli("ls", "--json")) if m["dir"] == str(directory))

    def cpu_seconds(self) -> float:
        """CPU time of the worker so far."""
        pid = (self.work / "worker.pid").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def real_content(size: int) -> bytes:
    """*size* bytes of what images are made of: this machine's programs and libraries, one after another."""
    found = bytearray()
    for top in ("/usr/lib/x86_64-linux-gnu", "/usr/lib", "/usr/bin"):
        for path in sorted(Path(top).rglob("*")):
            if len(found) >= size:
                return bytes(found[:size])
            if path.is_file() and not path.is_symlink():
                with contextlib.suppress(OSError):
                    found += path.read_bytes()
    while len(found) < size:
        found += found
    return bytes(found[:size])


def drop_caches() -> None:
    """Forget every clean page."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def timed(work: Callable[[], object]) -> float:
    """Seconds that *work* takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def quantile(values: list[float], q: float) -> float:
    """The *q*-quantile (0..1) of *values*."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def heading(title: str) -> None:
    """Print what machine this is and what follows."""
    print(
        f"# {title}\n# Linux {platform.release()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n",
        flush=True,
    )


def row(name: str, ours: str, baseline: str, ratio: float, note: str = "") -> None:
    """Print one figure: ours, the baseline of the same run, and how many times as good as it we are."""
    print(f"{name:<44} {ours:>14} {baseline:>14} {ratio:>8.2f}  {note}", flush=True)


def columns() -> None:
    """Print the table's head."""
    print(f"{'figure':<44} {'erofsd':>14} {'baseline':>14} {'ratio':>8}  (above 1: better than the baseline)")


__all__ = [name for name in dir() if not name.startswith("_")]
_ = rafs
