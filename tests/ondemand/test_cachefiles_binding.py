"""Limits, options, buffers, and the reasons why a device cannot be had."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondemand import fscache, syscalls
from ondemand.binding import Limits, holders, open_device
from ondemand.buffers import AlignedBuffers, is_aligned
from ondemand.errors import EngineUnavailable

percents = st.lists(st.integers(0, 99), min_size=3, max_size=3, unique=True).map(sorted)


@given(percents)
def test_limits_are_set_in_an_order_that_the_kernel_takes(percents: list[int]) -> None:
    stop, cull, run = percents
    now = {"frun": 7, "fcull": 5, "fstop": 1, "brun": 7, "bcull": 5, "bstop": 1}
    for limit in Limits(run, cull, stop).commands():
        now[limit.name] = limit.percent
        for family in "bf":
            assert now[f"{family}stop"] < now[f"{family}cull"] < now[f"{family}run"] < 100
    assert now == {
        f"{family}{name}": percent
        for family in "bf"
        for name, percent in (("run", run), ("cull", cull), ("stop", stop))
    }


def test_the_kernels_own_limits_need_no_commands() -> None:
    assert list(Limits().commands()) == []


@pytest.mark.parametrize("limits", [(7, 5, 5), (5, 5, 1), (100, 5, 1), (7, 5, -1)])
def test_limits_that_contradict_each_other_are_refused(limits: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="limits"):
        Limits(*limits)


def test_an_absent_device_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable) as refused:
        open_device(tmp_path, path=str(tmp_path / "cachefiles"))
    assert "modprobe" in refused.value.hint


def test_an_absent_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="absent"):
        open_device(tmp_path / "absent")


def test_who_holds_a_device_is_found(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.touch()
    assert holders(str(path)) == []
    with path.open():
        assert [holder for holder in holders(str(path)) if f"({os.getpid()})" in holder]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, "fsid=img"),
        ({"domain_id": "dom"}, "fsid=img,domain_id=dom"),
        ({"devices": ["a", "b"]}, "fsid=img,device=a,device=b"),
    ],
)
def test_mount_options_are_what_mount_takes(arguments: dict, options: str) -> None:
    assert fscache.mount_options("img", **arguments) == options


@pytest.mark.parametrize("name", ["", "a,b", "a/b", "..", "x" * 201, "a b", "ä"])
def test_names_that_cannot_be_mounted_are_refused(name: str) -> None:
    for attempt in (
        lambda: fscache.mount_options(name),
        lambda: fscache.mount_options("img", domain_id=name),
        lambda: fscache.mount_options("img", devices=[name]),
    ):
        with pytest.raises(ValueError, match="cannot name"):
            attempt()


def test_options_beyond_a_page_are_refused() -> None:
    room = fscache.OPTIONS_MAX_SIZE - len("fsid=img")
    devices = ["x" * 72] * (room // 80)
    assert len(fscache.mount_options("img", devices=devices)) <= fscache.OPTIONS_MAX_SIZE
    with pytest.raises(ValueError, match="page"):
        fscache.mount_options("img", devices=[*devices, "x" * 72])


async def test_a_mount_that_fails_says_why(tmp_path: Path) -> None:
    fds = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="mounting") as failed:
        await fscache.mount(str(tmp_path / "absent"), "fsid=img")
    assert failed.value.errno in (errno.ENOENT, errno.ENODEV, errno.EPERM)
    assert set(os.listdir("/proc/self/fd")) == fds


def test_a_child_mounts_without_our_descriptors(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    pid = syscalls.fork_mount("none", str(tmp_path / "absent"), "tmpfs", 0, "")
    os.close(writing)
    assert os.read(reading, 1) == b"", "the child has closed its copy, or ended"
    os.close(reading)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (errno.ENOENT, errno.EPERM)


def test_a_thread_has_a_working_directory_of_its_own(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    seen: list[str] = []

    def run() -> None:
        syscalls.unshare(syscalls.CLONE_FS)
        os.chdir(tmp_path)
        seen.append(os.getcwd())

    before = os.getcwd()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert (seen, os.getcwd()) == ([str(tmp_path)], before)


def test_aligned_memory_is_not_copied() -> None:
    buffers = AlignedBuffers(8192)
    with buffers.borrow() as buffer:
        assert is_aligned(buffer)
        assert not is_aligned(buffer[1:])
        [piece] = buffers.pieces(buffer[4096:])
        assert syscalls.address_of(piece) == syscalls.address_of(buffer) + 4096


@given(st.integers(0, 5 * 4096))
def test_other_memory_is_copied_in_aligned_pieces(length: int) -> None:
    buffers = AlignedBuffers(8192)
    data = os.urandom(length + 1)
    copied = b""
    for piece in buffers.pieces(memoryview(data)[1:] if is_aligned(memoryview(data)) else memoryview(data)):
        assert is_aligned(piece)
        assert len(piece) <= 8192
        copied += piece
    assert copied in (data, data[1:])


def test_buffers_are_used_again_but_not_hoarded() -> None:
    buffers = AlignedBuffers(4096, kept_max=1)
    with buffers.borrow() as first, buffers.borrow() as second:
        addresses = {syscalls.address_of(first), syscalls.address_of(second)}
    assert len(buffers._kept) == 1
    with buffers.borrow() as again:
        assert syscalls.address_of(again) in addresses


def test_a_completion_on_something_else_is_an_error() -> None:
    fd = os.open("/dev/null", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="READ_COMPLETE") as failed:
            syscalls.read_complete(fd, 0xFFFFFFFF)
        assert failed.value.errno in (errno.ENOTTY, errno.EINVAL)
    finally:
        os.close(fd)
