"""What this machine can run is found out by trying, and told with reason and hint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ondemand.canary import BLOCK_SIZE, image, pattern
from ondemand.engines import ENGINES, KNOWN, Probe, probe
from ondemand.engines.fanotify import FanotifyEngine


def test_engines_are_found_by_name() -> None:
    assert ENGINES["fanotify"] is FanotifyEngine
    assert set(ENGINES) <= set(KNOWN)


def test_every_known_engine_answers_and_an_unknown_one_does_not(tmp_path: Path) -> None:
    for name in KNOWN:
        result = probe(name, str(tmp_path))
        assert result.name == name
        assert result.works or result.reason
    with pytest.raises(KeyError):
        probe("punched cards", str(tmp_path))


def test_an_engine_that_this_version_lacks_says_so(tmp_path: Path) -> None:
    result = probe("nbd", str(tmp_path))
    assert (result.works, "nbd" in result.reason) == (False, True)


@pytest.mark.kernel
def test_fanotify_works_and_leaves_nothing_behind(fanotify_directory: Path) -> None:
    fds = set(os.listdir("/proc/self/fd"))
    assert probe("fanotify", str(fanotify_directory)) == Probe("fanotify", True)
    assert list(fanotify_directory.iterdir()) == []
    assert set(os.listdir("/proc/self/fd")) == fds


@pytest.mark.kernel
def test_fanotify_on_tmpfs_is_refused_with_a_hint(fanotify_directory: Path) -> None:
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no tmpfs at /dev/shm")
    result = probe("fanotify", "/dev/shm")
    assert not result.works
    assert "fanotify_mark" in result.reason
    assert "ext4" in result.hint


def test_fanotify_in_a_directory_that_is_not_there(tmp_path: Path) -> None:
    result = probe("fanotify", str(tmp_path / "absent"))
    assert not result.works
    assert result.reason


def test_fanotify_without_privilege(tmp_path: Path) -> None:
    if os.geteuid():
        assert "root" in probe("fanotify", str(tmp_path)).hint
        return
    script = (
        "import os, sys; sys.path[:] = eval(sys.argv[1]); os.setuid(65534)\n"
        "from ondemand.engines import probe; print(probe('fanotify', '/tmp'))"
    )
    done = subprocess.run(
        [os.path.realpath("/proc/self/exe"), "-c", script, repr(sys.path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "works=False" in done.stdout
    assert "CAP_SYS_ADMIN" in done.stdout


@pytest.mark.parametrize("count", [1, 2, 10])
def test_others_read_the_canary_as_we_do(tmp_path: Path, count: int) -> None:
    if shutil.which("fsck.erofs") is None:
        pytest.skip("no fsck.erofs here")
    contents = [pattern(0, BLOCK_SIZE * (n + 1), n + 1) for n in range(count)]
    (tmp_path / "image").write_bytes(image([len(content) for content in contents]))
    for n, content in enumerate(contents):
        (tmp_path / f"device{n}").write_bytes(content)
    devices = [f"--device={tmp_path}/device{n}" for n in range(count)]
    subprocess.run(["fsck.erofs", *devices, f"--extract={tmp_path}/out", tmp_path / "image"], check=True)
    assert [(tmp_path / f"out/{n}").read_bytes() for n in range(count)] == contents


@pytest.mark.parametrize("sizes", [[], [0], [100], [BLOCK_SIZE] * 11, [1 << 32]])
def test_sizes_that_the_canary_cannot_have_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="files of"):
        image(sizes)


@pytest.mark.parametrize(("offset", "length"), [(0, 16), (3, 10), (8, 8), (4095, 2), (7, 0)])
def test_the_pattern_does_not_depend_on_where_it_is_cut(offset: int, length: int) -> None:
    assert pattern(offset, length, 9) == pattern(0, 8192, 9)[offset : offset + length]
    assert 0 not in [int.from_bytes(pattern(n, 8), "little") for n in range(0, 4096, 8)]
