"""Unmounted by others, at the wrong time, in the wrong order, or under something else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import rafs
from tests.daemon.conftest import Daemon, wait_for
from tests.daemon.readers import read, right
from tests.daemon.test_mounts import assert_content, tree
from tests.registry import need

pytestmark = pytest.mark.usefixtures("fanotify_here")

FILES = tree(30, count=6)


@pytest.fixture
def boot(tmp_path: Path) -> Path:
    return rafs.write_files(rafs.make_image(FILES), tmp_path)


def mount(daemon: Daemon, boot: Path) -> Path:
    return daemon.mount(f"file:{boot}", "--blobs", boot.parent / "blobs", "--prefetch", "none")


@pytest.fixture
def bound(daemon: Daemon) -> Iterator[Path]:
    """A directory to bind mounts to."""
    directory = daemon.directory / "bound"
    directory.mkdir()
    yield directory
    subprocess.run(["umount", "-l", directory], check=False, capture_output=True)


def without_worker(daemon: Daemon, *command: object) -> None:
    """Run *command* between the death of a worker and the birth of the next."""
    keeper, worker = daemon.pid("keeper"), daemon.pid("worker")
    os.kill(keeper, signal.SIGSTOP)
    os.kill(worker, signal.SIGKILL)
    try:
        subprocess.run([str(word) for word in command], check=True)
    finally:
        os.kill(keeper, signal.SIGCONT)
    wait_for(lambda: daemon.pid("worker") != worker, "another worker")


def test_what_is_bound_elsewhere_is_served_although_its_directory_was_unmounted_without_a_worker(
    daemon: Daemon, boot: Path, bound: Path
) -> None:
    mounted = mount(daemon, boot)
    subprocess.run(["mount", "--bind", mounted, bound], check=True)
    without_worker(daemon, "umount", mounted)
    daemon.ls()  # all mounts are back, and what nobody needs is let go
    assert read(bound / "big") == right(FILES["big"])
    subprocess.run(["umount", bound], check=True)
    wait_for(lambda: daemon.ls() == [], "the superblock's end")


def test_what_was_unmounted_without_a_worker_is_forgotten(daemon: Daemon, boot: Path) -> None:
    mounted = mount(daemon, boot)
    without_worker(daemon, "umount", mounted)
    assert daemon.ls() == []


def test_what_lies_over_a_mount_is_not_unmounted_in_its_place(daemon: Daemon, boot: Path) -> None:
    mounted = mount(daemon, boot)
    subprocess.run(["mount", "-t", "tmpfs", "over", mounted], check=True)
    refused = daemon.cli("umount", mounted, check=False)
    assert refused.returncode == 1
    assert "something else is mounted over it" in refused.stderr
    assert len(daemon.ls()) == 1
    assert daemon.stop() == 0
    assert not os.path.ismount(mounted)


def test_mounts_come_back_although_the_worker_was_killed_while_it_unmounted_them(
    daemon: Daemon, boot: Path
) -> None:
    mounts = [mount(daemon, boot) for _ in range(6)]
    keeper, worker = daemon.pid("keeper"), daemon.pid("worker")
    os.kill(keeper, signal.SIGTERM)
    wait_for(lambda: not os.path.ismount(mounts[0]), "the first one to be unmounted")
    try:
        os.kill(worker, signal.SIGKILL)
    except ProcessLookupError:
        pass  # too late: then it is an orderly end
    assert daemon.process is not None
    assert daemon.process.wait(timeout=40) == 0
    assert not any(map(os.path.ismount, mounts))
    daemon.start()
    assert all(map(os.path.ismount, mounts))
    assert_content(mounts[-1], FILES)


def test_a_mount_in_a_mount_comes_back_there(daemon: Daemon, tmp_path: Path, boot: Path) -> None:
    outer_files = {"inner/.keep": b"", "big": FILES["big"]}
    outer_boot = rafs.write_files(rafs.make_image(outer_files), tmp_path / "outer")
    outer = mount(daemon, outer_boot)
    inner = outer / "inner"
    daemon.cli("mount", f"file:{boot}", inner, "--blobs", boot.parent / "blobs")
    assert daemon.cli("umount", outer, check=False).returncode == 1
    assert daemon.stop() == 0
    assert not os.path.ismount(outer)
    daemon.start()
    assert_content(inner, FILES)
    daemon.cli("umount", inner)
    daemon.cli("umount", outer)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGINT], ids=lambda n: n.name)
def test_what_a_terminal_sends_to_both_processes_ends_them_in_order(
    daemon: Daemon, boot: Path, number: signal.Signals
) -> None:
    mounted = mount(daemon, boot)
    with open(mounted / "big", "rb") as file:
        for pid in (daemon.pid("keeper"), daemon.pid("worker")):
            os.kill(pid, number)
        assert daemon.process is not None
        assert daemon.process.wait(timeout=20) == 1  # this reader still holds it
        with pytest.raises(OSError, match="Input/output error"):
            file.read(4096)
    assert not os.path.ismount(mounted)


def test_signals_without_a_meaning_end_nobody(daemon: Daemon, boot: Path) -> None:
    mounted = mount(daemon, boot)
    keeper, worker = daemon.pid("keeper"), daemon.pid("worker")
    for number in (signal.SIGUSR2, signal.SIGALRM):
        for pid in (keeper, worker):
            os.kill(pid, number)
    assert read(mounted / "big") == right(FILES["big"])
    assert (daemon.pid("keeper"), daemon.pid("worker")) == (keeper, worker)


def test_a_keeper_that_cannot_write_beside_its_socket_goes_on(daemon: Daemon, boot: Path) -> None:
    mounted = mount(daemon, boot)
    keeper, worker = daemon.pid("keeper"), daemon.pid("worker")
    subprocess.run([need("chattr"), "+i", daemon.directory], check=True)
    try:
        os.kill(worker, signal.SIGKILL)
        assert read(mounted / "big") == right(FILES["big"])
        assert daemon.events("pid.unwritten")
    finally:
        subprocess.run(["chattr", "-i", daemon.directory], check=True)
    os.kill(min(children(keeper)), signal.SIGKILL)
    wait_for(lambda: daemon.pid("worker") in children(keeper), "the living worker's number")


def children(pid: int) -> set[int]:
    return {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def test_a_daemon_that_cannot_start_says_why_and_ends(daemon: Daemon) -> None:
    assert daemon.stop() == 0
    (daemon.state_dir / "mounts.db").unlink()
    (daemon.state_dir / "mounts.db").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "erofsd", "serve", *daemon._options(), "--state-dir", daemon.state_dir],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1
    assert "mounts.db" in done.stderr.splitlines()[-2]
    assert "Traceback" not in done.stderr
