"""The real program against the real kernel: a daemon, or none, and the verbs that talk to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ondemand.engines import probe

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        os.geteuid() != 0 or not probe("fanotify", "/var/tmp").works, reason="fanotify does not work here"
    ),
]

EROFSD = (sys.executable, "-m", "erofsd")
PATIENCE_S = 30.0


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:
    """The first true value of *condition*; fails when time is up or *process* ends."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        assert process is None or process.poll() is None, f"it ended with {process.returncode}"
        time.sleep(0.01)
    return value


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory on a file system that engines work on; nothing stays mounted below it."""
    path = Path(tempfile.mkdtemp(prefix="erofsd-test-", dir="/var/tmp"))
    (path / "mnt").mkdir()
    yield path
    subprocess.run(["umount", "--quiet", "--lazy", str(path / "mnt")], check=False)
    shutil.rmtree(path)


@pytest.fixture
def ref(testdata: Path) -> str:
    """An image."""
    return f"oci:{testdata}/nydusify/layout:zstd"


def ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of *process*, which is about to end; it is killed if it is not."""
    try:
        return process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


@pytest.fixture
def daemon(place: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """A daemon; gives what runs a verb against it."""
    socket = place / "api.sock"
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [*EROFSD, "serve", "--socket", str(socket), "--state-dir", str(place / "state")], stderr=log
        )
    try:
        wait_for(socket.exists, process)

        def verb(*argv: object) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*EROFSD, *map(str, argv)],
                env={**os.environ, "EROFSD_SOCKET": str(socket)},
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
            )

        yield verb
    finally:
        process.send_signal(signal.SIGTERM)
        code = ended(process)
    assert code == 0, (place / "log").read_text()


def test_image_is_mounted_listed_prefetched_and_unmounted(
    daemon: Callable[..., subprocess.CompletedProcess[str]], place: Path, ref: str
) -> None:
    mnt = place / "mnt"
    assert json.loads(daemon("ls", "--json").stdout) == []
    done = daemon("mount", ref, mnt, "--prefetch", "none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{ref} on {mnt} (rafs6, fanotify, verified: blake3)")
    assert (mnt / "links/h1").stat().st_size == 70000
    [mount] = json.loads(daemon("ls", "--json").stdout)
    assert (mount["dir"], mount["ref"], mount["state"]) == (str(mnt), ref, "lazy")
    assert daemon("mount", ref, mnt, "--prefetch", "none").returncode == 0
    other = daemon("mount", ref.replace(":zstd", ":batch"), mnt)
    assert other.returncode == 1
    assert "is mounted there" in other.stderr
    done = daemon("prefetch", mnt)
    assert done.returncode == 0, done.stderr
    [mount] = json.loads(daemon("ls", "--json").stdout)
    assert mount["state"] == "complete"
    assert mount["fetched_bytes"] == mount["total_bytes"] > 0
    assert str(mnt) in daemon("ls").stdout
    done = daemon("umount", mnt)
    assert done.returncode == 0, done.stderr
    assert not os.path.ismount(mnt)
    assert json.loads(daemon("ls", "--json").stdout) == []
    again = daemon("umount", mnt)
    assert again.returncode == 1
    assert again.stderr.startswith("erofsd: ")


def test_doctor_sees_the_daemon(daemon: Callable[..., subprocess.CompletedProcess[str]], place: Path) -> None:
    report = json.loads(daemon("doctor", "--json", "--state-dir", place / "state").stdout)
    [check] = [check for check in report["checks"] if check["name"] == "daemon"]
    assert check["status"] == "ok"
    assert f"worker {(place / 'worker.pid').read_text().strip()}" in check["detail"]


@pytest.mark.parametrize(("tag", "code"), [("zran", 4), ("source", 4), ("missing", 5)])
def test_mount_that_is_refused_names_the_image(
    tag: str, code: int, daemon: Callable[..., subprocess.CompletedProcess[str]], place: Path, ref: str
) -> None:
    done = daemon("mount", ref.replace(":zstd", f":{tag}"), place / "mnt")
    assert done.returncode == code
    assert "nydusify/layout" in done.stderr
    assert "Traceback" not in done.stderr


def test_standalone_mount_serves_until_it_is_unmounted(place: Path, ref: str) -> None:
    mnt = place / "mnt"
    (place / "config.toml").write_text(f'state_dir = "{place}/state"\n')
    process = subprocess.Popen(
        [*EROFSD, "mount", "--standalone", "--config", str(place / "config.toml"), ref, str(mnt)]
    )
    try:
        wait_for(lambda: os.path.ismount(mnt), process)
        assert len((mnt / "links/h1").read_bytes()) == 70000
        subprocess.run(["umount", str(mnt)], check=True)
        assert ended(process) == 0
    finally:
        process.kill()


def test_standalone_mount_that_is_refused_ends_with_its_exit_code(place: Path, ref: str) -> None:
    (place / "config.toml").write_text(f'state_dir = "{place}/state"\n')
    config = ["--config", str(place / "config.toml")]
    done = subprocess.run(
        [*EROFSD, "mount", "--standalone", *config, ref.replace(":zstd", ":zran"), str(place / "mnt")],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 4
    assert "zran" in done.stderr


def test_demonstration_that_is_interrupted_leaves_nothing_behind(place: Path) -> None:
    process = subprocess.Popen(
        [*EROFSD, "quickstart", "--dir", str(place)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    for line in process.stderr:
        if b"erofsd mount" in line:
            process.terminate()
            break
    assert ended(process) == 130
    assert [path.name for path in place.iterdir()] == ["mnt"]
    assert str(place) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize(
    ("argv", "code", "word"),
    [
        (["--state-dir", "/proc/nonexistent"], 1, "/proc/nonexistent: cannot be used"),
        (["--socket", "/proc/nonexistent/s"], 1, "/proc/nonexistent: cannot be used"),
        (["--state-dir", "/dev/shm"], 3, "/dev/shm: is on tmpfs"),
        (["--config", "/nonexistent.toml"], 2, "no such configuration file"),
    ],
)
def test_daemon_that_cannot_start_says_why_in_one_line(
    argv: list[str], code: int, word: str, place: Path
) -> None:
    defaults = ["--state-dir", str(place / "state"), "--socket", str(place / "s")]
    done = subprocess.run(
        [*EROFSD, "serve", *defaults, *argv], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == code
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_second_daemon_on_the_same_state_is_refused(
    daemon: Callable[..., subprocess.CompletedProcess[str]], place: Path
) -> None:
    done = daemon("serve", "--state-dir", place / "state", "--socket", place / "other.sock")
    assert done.returncode == 1
    assert "another erofsd" in done.stderr
