"""A tiny EROFS image with holes for the engines to fill, and the proof that one can.

Each file of the image lies on a device of its own, from its first byte to its last: what is read at an offset
of file *n* is what the kernel finds, or asks for, at the same offset of device *n*.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack

from ondemand import syscalls
from ondemand.engines.fanotify import open_group, unavailable
from ondemand.errors import EngineUnavailable
from ondemand.wire import fanotify as wire

BLOCK_SIZE = 4096
PROBE_TIMEOUT_S = 5.0

_SUPERBLOCK_OFFSET = 1024
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHH38x")
_DEVICE_SLOT = struct.Struct("<64sII56x")
_INODE = struct.Struct("<HHHHQIIIIQII16x")
_DIRENT = struct.Struct("<QHBB")
_MAGIC = 0xE0F5E1E2
_FEATURES_INCOMPAT = 0x4 | 0x8  # files by block index, and a device table
_FLAT_INLINE, _INDEXED = 2 << 1 | 1, 4 << 1 | 1  # data layouts, with the bit for extended inodes
_INDEX_FORMAT = 0x20 | 19  # entries of 8 bytes, each for 2^19 blocks
_INDEX = struct.Struct("<HHI")
_FT_REG_FILE, _FT_DIR = 1, 2
_NID_UNIT = 32
_FILE_UNIT = _NID_UNIT * 3


def image(sizes: Sequence[int]) -> bytes:
    """An EROFS image whose files ``0``, ``1``... of *sizes* bytes lie on as many devices.

    Args:
        sizes: Multiples of `BLOCK_SIZE` up to 2 GiB; at most 10 of them, for the image to be one block.

    Source: fs/erofs/erofs_fs.h.
    """
    if not 0 < len(sizes) <= 10 or any(not 0 < size <= 1 << 31 or size % BLOCK_SIZE for size in sizes):
        raise ValueError(f"files of {sizes} bytes")
    slots_at = _SUPERBLOCK_OFFSET + _SUPERBLOCK.size
    root_at = slots_at + _DEVICE_SLOT.size * len(sizes)
    files_at = root_at + 512
    entries = [(b".", root_at, _FT_DIR), (b"..", root_at, _FT_DIR)]
    entries += [(b"%d" % n, files_at + n * _FILE_UNIT, _FT_REG_FILE) for n in range(len(sizes))]
    directory = _directory(sorted(entries))

    out = bytearray(BLOCK_SIZE)
    _SUPERBLOCK.pack_into(
        out,
        _SUPERBLOCK_OFFSET,
        *(_MAGIC, 0, 0, BLOCK_SIZE.bit_length() - 1, 0, root_at // _NID_UNIT, 1 + len(sizes), 0, 0, 1, 0, 0),
        *(bytes(16), bytes(16), _FEATURES_INCOMPAT, 0, len(sizes), slots_at // _DEVICE_SLOT.size),
    )
    for n, size in enumerate(sizes):
        _DEVICE_SLOT.pack_into(out, slots_at + n * _DEVICE_SLOT.size, b"%d" % n, size // BLOCK_SIZE, 0)
        at = files_at + n * _FILE_UNIT
        _INODE.pack_into(out, at, *(_INDEXED, 0, 0o100444, 0, size, _INDEX_FORMAT, n + 2, 0, 0, 0, 0, 1))
        _INDEX.pack_into(out, at + _INODE.size, 0, n + 1, 0)  # from block 0 of device n + 1
    _INODE.pack_into(out, root_at, *(_FLAT_INLINE, 0, 0o040555, 0, len(directory), 0, 1, 0, 0, 0, 0, 2))
    out[root_at + _INODE.size : root_at + _INODE.size + len(directory)] = directory
    return bytes(out)


def _directory(entries: list[tuple[bytes, int, int]]) -> bytes:
    dirents, names = b"", b""
    for name, offset, kind in entries:
        name_at = _DIRENT.size * len(entries) + len(names)
        dirents += _DIRENT.pack(offset // _NID_UNIT, name_at, kind, 0)
        names += name
    return dirents + names


def pattern(offset: int, length: int, seed: int = 1) -> bytes:
    """Bytes that say where they belong: each eight are *seed* plus their number, so never all zero."""
    first, last = offset // 8, -(-(offset + length) // 8)
    words = struct.pack(f"<{last - first}Q", *range(first + seed, last + seed))
    return words[offset - first * 8 :][:length]


def prove_fanotify(directory: str) -> None:
    """Mount an image with a hole in *directory*, attached to nowhere, and fill the hole when asked to.

    Takes milliseconds, at worst `PROBE_TIMEOUT_S`; waits in system calls only. Leaves nothing behind.

    Raises:
        EngineUnavailable: With what was refused, or went wrong.
    """
    size = 4 * BLOCK_SIZE
    with ExitStack() as stack:
        group_fd = open_group()
        stack.callback(os.close, group_fd)  # after the mount is gone; lets the reader go, whatever happens
        try:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=".probe-", dir=directory))
            with open(f"{scratch}/image", "wb") as file:
                file.write(image([size]))
            device_fd = os.open(f"{scratch}/device", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, device_fd)
            os.truncate(device_fd, size)
        except OSError as exc:
            raise EngineUnavailable(f"cannot write into {directory}: {exc}") from exc
        try:
            syscalls.fanotify_mark(group_fd, syscalls.FAN_MARK_ADD, syscalls.FAN_PRE_ACCESS, device_fd)
        except OSError as exc:
            raise unavailable(exc) from exc
        try:
            mount_fd = syscalls.fsmount_erofs(f"{scratch}/image", [f"{scratch}/device"])
        except OSError as exc:
            raise _unmountable(exc) from exc
        stack.callback(os.close, mount_fd)
        _read_through(group_fd, device_fd, mount_fd, size)


def _unmountable(exc: OSError) -> EngineUnavailable:
    hints = {
        errno.ENODEV: "load the file system: modprobe erofs",
        errno.ENOTBLK: "the kernel (CONFIG_EROFS_FS_BACKED_BY_FILE, Linux 6.12) or this file system cannot "
        "mount a file: put the directory on ext4, xfs or btrfs",
        errno.EPERM: "run as root in the first user namespace: CAP_SYS_ADMIN is needed",
        errno.ENOSYS: "the kernel lacks fsopen(): use Linux 5.2 or later",
    }
    return EngineUnavailable(str(exc), hints.get(exc.errno or 0, ""))


def _read_through(group_fd: int, device_fd: int, mount_fd: int, size: int) -> None:
    """Read the file in a thread, answer it in this one."""
    seen: list[bytes | OSError] = []

    def read() -> None:
        try:
            with os.scandir(fd := os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=mount_fd)) as entries:
                names = [entry.name for entry in entries]
            os.close(fd)
            fd = os.open(names[0], os.O_RDONLY, dir_fd=mount_fd)
            try:
                seen.append(os.pread(fd, size, 0))
            finally:
                os.close(fd)
        except OSError as exc:
            seen.append(exc)

    reader = threading.Thread(target=read, name="canary", daemon=True)
    reader.start()
    events = 0
    give_up = time.monotonic() + PROBE_TIMEOUT_S
    poll = select.poll()
    poll.register(group_fd, select.POLLIN)
    while reader.is_alive() and time.monotonic() < give_up:
        if poll.poll(10):
            events += _answer(group_fd, device_fd, size)
    if not seen:
        raise EngineUnavailable(f"a read did not end within {PROBE_TIMEOUT_S:.0f} s, after {events} events")
    if isinstance(seen[0], OSError):
        raise EngineUnavailable(f"reading a hole failed after {events} events: {seen[0]}") from seen[0]
    if seen[0] != pattern(0, size) or not events:
        raise EngineUnavailable(
            f"a hole was read as something else, with {events} events",
            "this kernel does not ask for EROFS's reads: use Linux 6.15 or later, or another engine",
        )


def _answer(group_fd: int, device_fd: int, size: int) -> int:
    event = wire.parse(os.read(group_fd, wire.EVENT_SIZE))
    if not isinstance(event, wire.PreAccess):
        return 0
    stop = min(event.offset + event.count, size)
    if event.offset < stop:
        os.pwrite(device_fd, pattern(event.offset, stop - event.offset), event.offset)
    os.write(group_fd, wire.encode_response(wire.Response(event.fd, 0)))
    os.close(event.fd)
    return 1
