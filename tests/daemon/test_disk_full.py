"""No room: readers get EIO, nothing is lost, and it goes on by itself when there is room again."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import rafs
from tests.daemon.conftest import Daemon
from tests.daemon.test_mounts import assert_content, drop_caches, tree
from tests.registry import need


@pytest.fixture
def small_disk(make_directory: Callable[[], Path]) -> Iterator[Path]:
    """32 MiB of ext4."""
    directory = make_directory()
    image, top = directory / "disk", directory / "top"
    top.mkdir()
    with open(image, "wb") as file:
        file.truncate(32 << 20)
    subprocess.run([need("mkfs.ext4"), "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, top], check=True)
    yield top
    subprocess.run(["umount", "-l", top], check=True)


def error_of_reading(path: Path, content: bytes) -> int:
    try:
        found = path.read_bytes()
    except OSError as exc:
        return exc.errno or -1
    assert found == content, path
    return 0


def test_a_full_disk_is_an_error_until_there_is_room(
    engine_here: str, small_disk: Path, make_directory: Callable[[], Path], tmp_path: Path
) -> None:
    daemon = Daemon(make_directory(), deadline=10)
    daemon.state_dir = small_disk / "state"
    ballast = small_disk / "ballast"
    files = tree(20, count=40, size=200_000)
    boot = rafs.write_files(rafs.make_image(files, compressor="none"), tmp_path)
    try:
        daemon.start()
        mounted = daemon.mount(f"file:{boot}", "--blobs", tmp_path / "blobs")
        assert (mounted / "d0/file000").read_bytes() == files["d0/file000"]
        subprocess.run(f"dd if=/dev/zero of={ballast} bs=64K 2>/dev/null", shell=True, check=False)
        errors = {name: error_of_reading(mounted / name, content) for name, content in files.items()}
        assert set(errors.values()) <= {0, errno.EIO}
        assert errno.EIO in errors.values()
        daemon.kill_worker()
        drop_caches()
        assert (mounted / "d0/file000").read_bytes() == files["d0/file000"]
        assert daemon.events("cache.full")
        ballast.unlink()
        assert_content(mounted, files)
        daemon.cli("umount", mounted)
    finally:
        daemon.destroy()
