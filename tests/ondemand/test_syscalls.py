"""System calls say what they tried and why it failed; nothing stays open."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ondemand import syscalls
from ondemand.canary import image
from ondemand.ranges import Range, RangeSet

BLOCK = 4096


@pytest.fixture
def file_fd() -> Iterator[int]:
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        yield file.fileno()


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_data_ranges_are_what_was_written(file_fd: int) -> None:
    os.truncate(file_fd, 64 * BLOCK)
    assert syscalls.data_ranges(file_fd) == RangeSet()
    os.pwrite(file_fd, b"x" * BLOCK, 3 * BLOCK)
    os.pwrite(file_fd, b"x" * 2 * BLOCK, 62 * BLOCK)
    os.fsync(file_fd)
    expected = RangeSet([Range.of(3 * BLOCK, BLOCK), Range.of(62 * BLOCK, 2 * BLOCK)])
    assert syscalls.data_ranges(file_fd) == expected


def test_a_punched_hole_is_no_data_and_reads_as_zeros(file_fd: int) -> None:
    os.pwrite(file_fd, b"x" * 8 * BLOCK, 0)
    syscalls.punch_hole(file_fd, Range.of(2 * BLOCK, 3 * BLOCK))
    syscalls.punch_hole(file_fd, Range(5, 5))
    assert not syscalls.data_ranges(file_fd).covers(Range.of(2 * BLOCK, 1))
    assert os.fstat(file_fd).st_size == 8 * BLOCK
    assert os.pread(file_fd, 3 * BLOCK, 2 * BLOCK) == bytes(3 * BLOCK)


def test_errors_carry_errno_and_attempt(file_fd: int, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="fallocate") as failed:
        syscalls.fallocate(file_fd, 0, 0, 0)
    assert failed.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="umount2") as failed:
        syscalls.umount2(str(tmp_path / "absent"))
    assert failed.value.errno in (errno.ENOENT, errno.EPERM)
    with pytest.raises(OSError, match="fanotify_mark") as failed:
        syscalls.fanotify_mark(file_fd, syscalls.FAN_MARK_ADD, syscalls.FAN_PRE_ACCESS, file_fd)
    assert failed.value.errno == errno.EINVAL


def test_the_descriptor_limit_goes_up_to_what_is_allowed() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        assert syscalls.raise_descriptor_limit() == before[1]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.kernel
def test_mounting_attaches_and_leaves_no_descriptor(fanotify_directory: Path) -> None:
    source, target = fanotify_directory / "image, with a comma", fanotify_directory / "target"
    devices = [fanotify_directory / "first", fanotify_directory / "second"]
    source.write_bytes(image([BLOCK, 2 * BLOCK]))
    for n, device in enumerate(devices):
        device.write_bytes(b"%d" % n * BLOCK * (n + 1))
    target.mkdir()
    before = open_fds()
    syscalls.mount_erofs(str(source), str(target), [str(device) for device in devices], {"directio": None})
    try:
        assert open_fds() == before
        assert sorted(os.listdir(target)) == ["0", "1"]
        assert (target / "0").read_bytes() == b"0" * BLOCK
        assert (target / "1").read_bytes() == b"1" * 2 * BLOCK
    finally:
        syscalls.umount2(str(target))
    assert os.listdir(target) == []


@pytest.mark.kernel
def test_by_descriptor_paths_a_mount_needs_no_names(fanotify_directory: Path) -> None:
    (fanotify_directory / "image").write_bytes(image([BLOCK]))
    (fanotify_directory / "device").write_bytes(b"x" * BLOCK)
    fds = [os.open(fanotify_directory / name, os.O_RDONLY) for name in ("image", "device")]
    mount_fd = syscalls.fsmount_erofs(f"/proc/self/fd/{fds[0]}", [f"/proc/self/fd/{fds[1]}"])
    fd = os.open("0", os.O_RDONLY, dir_fd=mount_fd)
    assert os.read(fd, 2 * BLOCK) == b"x" * BLOCK
    for each in (fd, mount_fd, *fds):
        os.close(each)


@pytest.mark.kernel
def test_a_refused_mount_leaves_no_descriptor(fanotify_directory: Path) -> None:
    source = fanotify_directory / "image"
    source.write_bytes(image([BLOCK]))
    before = open_fds()
    for devices, options, expected in [
        ([], {"no_such_option": "1"}, errno.EINVAL),
        (["x" * 300], {}, errno.EINVAL),
        ([str(fanotify_directory / "absent")], {}, errno.ENOENT),
        ([str(source), str(source)], {}, errno.EINVAL),
    ]:
        with pytest.raises(OSError, match="mount") as failed:
            syscalls.fsmount_erofs(str(source), devices, options)
        assert failed.value.errno == expected
    assert "no_such_option" in refusal(str(source), {"no_such_option": "1"})
    assert open_fds() == before


def refusal(source: str, options: dict[str, str | None]) -> str:
    try:
        os.close(syscalls.fsmount_erofs(source, [], options))
    except OSError as exc:
        return str(exc)
    return ""
