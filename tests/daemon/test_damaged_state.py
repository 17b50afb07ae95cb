"""What lies in the state directory is damaged: one clear error, and nobody reads zeros or wrong bytes."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import rafs
from tests.daemon.conftest import Daemon, wait_for
from tests.daemon.readers import EIO, read, right
from tests.daemon.test_mounts import assert_content, drop_caches, tree
from tests.registry import need

pytestmark = pytest.mark.usefixtures("fanotify_here")


@dataclass
class Mounted:
    """An image that is mounted, nothing of it read."""

    daemon: Daemon
    files: dict[str, bytes]
    boot: Path
    top: Path

    @property
    def big(self) -> str:
        """What a reader of the file ``big`` should see."""
        return right(self.files["big"])

    def mount_again(self) -> None:
        self.daemon.cli("mount", f"file:{self.boot}", self.top, "--blobs", self.boot.parent / "blobs")


def mount(daemon: Daemon, directory: Path, seed: int = 1) -> Mounted:
    files = tree(seed, count=6)
    boot = rafs.write_files(rafs.make_image(files), directory / f"image{seed}")
    top = daemon.mount(f"file:{boot}", "--blobs", boot.parent / "blobs", "--prefetch", "none")
    return Mounted(daemon, files, boot, top)


@pytest.fixture
def mounted(daemon: Daemon, tmp_path: Path) -> Mounted:
    return mount(daemon, tmp_path)


def replace_worker(daemon: Daemon) -> None:
    worker = daemon.pid("worker")
    daemon.kill_worker()
    wait_for(lambda: daemon.pid("worker") != worker, "another worker")


def stored_image(daemon: Daemon) -> Path:
    (found,) = (daemon.state_dir / "images").iterdir()
    return found


def test_a_mount_that_does_not_come_back_is_refused_and_its_neighbour_is_not(
    mounted: Mounted, tmp_path: Path
) -> None:
    daemon = mounted.daemon
    (stored_image(daemon) / "image.json").write_bytes(b"garbage")
    other = mount(daemon, tmp_path, seed=2)
    replace_worker(daemon)
    assert read(mounted.top / "big") == EIO
    assert read(other.top / "big") == other.big
    status = daemon.ls(mounted.top)
    assert status["state"] == "failed"
    assert "stored image" in status["last_error"]
    assert daemon.ls(other.top)["state"] == "complete"


def test_readers_of_a_failed_mount_get_no_zeros_after_the_end(mounted: Mounted) -> None:
    (stored_image(mounted.daemon) / "image.json").write_bytes(b"garbage")
    with open(mounted.top / "big", "rb") as file:
        replace_worker(mounted.daemon)
        assert mounted.daemon.stop() == 1  # this reader still holds it
        assert not os.path.ismount(mounted.top)
        with pytest.raises(OSError, match="Input/output error"):
            file.read(4096)


def test_a_damaged_bootstrap_is_not_mounted_when_its_image_is(mounted: Mounted) -> None:
    daemon = mounted.daemon
    boot = stored_image(daemon) / "image.boot"
    boot.write_bytes(boot.read_bytes().replace(b"file003", b"fileXXX"))
    replace_worker(daemon)
    assert daemon.ls(mounted.top)["state"] == "failed"
    mounted.mount_again()
    assert not list(mounted.top.rglob("fileXXX"))
    assert_content(mounted.top, mounted.files)
    daemon.cli("umount", mounted.top)
    assert not os.path.ismount(mounted.top)
    assert daemon.ls() == []


def test_a_database_of_garbage_costs_the_mounts_and_no_reader_sees_zeros(mounted: Mounted) -> None:
    daemon = mounted.daemon
    for path in daemon.state_dir.glob("mounts.db*"):
        path.write_bytes(b"garbage" * 2000)
    for _ in range(2):  # the second worker finds a sound database, without the mount
        replace_worker(daemon)
        assert read(mounted.top / "big") == EIO
    assert daemon.ls() == []
    assert daemon.events("mounts.lost")
    subprocess.run(["umount", mounted.top], check=True)
    mounted.mount_again()
    assert_content(mounted.top, mounted.files)


def test_without_its_database_it_ends_with_an_error_for_those_who_still_read(mounted: Mounted) -> None:
    daemon = mounted.daemon
    for path in daemon.state_dir.glob("mounts.db*"):
        path.unlink()
    with open(mounted.top / "big", "rb") as file:
        replace_worker(daemon)
        assert daemon.stop() == 1
        with pytest.raises(OSError, match="Input/output error"):
            file.read(4096)


def test_it_starts_over_a_database_of_garbage(mounted: Mounted) -> None:
    assert mounted.daemon.stop() == 0
    (mounted.daemon.state_dir / "mounts.db").write_bytes(b"garbage" * 2000)
    mounted.daemon.start()
    assert mounted.daemon.events("mounts.lost")
    mounted.mount_again()
    assert_content(mounted.top, mounted.files)


def test_a_row_that_cannot_be_read_does_not_touch_the_others(mounted: Mounted, tmp_path: Path) -> None:
    daemon = mounted.daemon
    other = mount(daemon, tmp_path, seed=2)
    with sqlite3.connect(daemon.state_dir / "mounts.db") as table:
        table.execute("UPDATE mounts SET record = ? WHERE name = ?", (b'{"dir": 5}', str(mounted.top)))
    table.close()
    replace_worker(daemon)
    assert read(mounted.top / "big") == EIO
    assert read(other.top / "big") == other.big


def test_maps_and_data_that_were_damaged_while_it_was_down_are_fetched_again(
    mounted: Mounted, tmp_path: Path
) -> None:
    daemon = mounted.daemon
    others = [mount(daemon, tmp_path, seed) for seed in (2, 3)]
    every = [mounted, *others]
    for each in every:
        assert_content(each.top, each.files)
    assert daemon.stop() == 0
    names = [next(p.name for p in (each.boot.parent / "blobs").iterdir()) + ".0" for each in every]
    blobs = daemon.state_dir / "blobs"
    (blobs / f"{names[0]}.map").write_bytes(os.urandom(9000))
    os.truncate(blobs / f"{names[1]}.data", 8192)
    subprocess.run(
        [need("fallocate"), "--punch-hole", "-o", "0", "-l", "1048576", blobs / f"{names[2]}.data"],
        check=True,
    )
    daemon.start()
    for each in every:
        assert_content(each.top, each.files)
        assert daemon.ls(each.top)["errors"] == 0


@pytest.fixture
def fragile_disk(make_directory: Callable[[], Path]) -> Path:
    """64 MiB of ext4 that becomes read-only at an error."""
    directory = make_directory()
    image, top = directory / "disk", directory / "top"
    top.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run([need("mkfs.ext4"), "-q", "-e", "remount-ro", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, top], check=True)
    return top


def test_a_disk_that_becomes_read_only_is_an_error_in_time(
    fragile_disk: Path, make_directory: Callable[[], Path], tmp_path: Path
) -> None:
    daemon = Daemon(make_directory(), deadline=10)
    daemon.state_dir = fragile_disk / "state"
    try:
        daemon.start()
        mounted = mount(daemon, tmp_path)
        os.sync()
        lines = Path("/proc/self/mounts").read_text().splitlines()
        device = next(line.split()[0] for line in lines if line.split()[1] == str(fragile_disk))
        Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("a test")
        drop_caches()
        assert read(mounted.top / "big") == EIO
        replace_worker(daemon)
        assert read(mounted.top / "big") == EIO
        assert "Read-only" in daemon.ls(mounted.top)["last_error"]
        assert daemon.stop() == 0
        assert not os.path.ismount(mounted.top)
    finally:
        daemon.destroy()
        subprocess.run(["umount", "-l", fragile_disk], check=True)
        shutil.rmtree(fragile_disk.parent, ignore_errors=True)
