"""System calls that ``os`` does not have: one function each, named after the call, raising OSError.

Constants keep their header names. Every call releases the GIL: a thread that waits in one of them, in a
``mount`` that needs an answer for instance, does not keep the answering thread from running.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Mapping, Sequence

from ondemand._kernel import ffi, lib
from ondemand.ranges import Range, RangeSet

FAN_CLASS_PRE_CONTENT: int = lib.FAN_CLASS_PRE_CONTENT
FAN_CLOEXEC: int = lib.FAN_CLOEXEC
FAN_NONBLOCK: int = lib.FAN_NONBLOCK
FAN_UNLIMITED_QUEUE: int = lib.FAN_UNLIMITED_QUEUE
FAN_UNLIMITED_MARKS: int = lib.FAN_UNLIMITED_MARKS
FAN_PRE_ACCESS: int = lib.FAN_PRE_ACCESS
FAN_MARK_ADD: int = lib.FAN_MARK_ADD
FAN_MARK_REMOVE: int = lib.FAN_MARK_REMOVE
O_LARGEFILE: int = lib.O_LARGEFILE
MNT_DETACH: int = lib.MNT_DETACH
MNT_FORCE: int = lib.MNT_FORCE
UMOUNT_NOFOLLOW: int = lib.UMOUNT_NOFOLLOW
FALLOC_FL_KEEP_SIZE: int = lib.FALLOC_FL_KEEP_SIZE
FALLOC_FL_PUNCH_HOLE: int = lib.FALLOC_FL_PUNCH_HOLE
MS_RDONLY: int = lib.MS_RDONLY
CLONE_FS: int = lib.CLONE_FS


def _failed(call: str, error: int | None = None) -> OSError:
    number = ffi.errno if error is None else error
    return OSError(number, f"{call}: {os.strerror(number)}")


def fanotify_init(flags: int, event_f_flags: int) -> int:
    """A new group's descriptor. EPERM without CAP_SYS_ADMIN in the first user namespace."""
    fd = lib.fanotify_init(flags, event_f_flags)
    if fd < 0:
        raise _failed(f"fanotify_init({flags:#x}, {event_f_flags:#x})")
    return fd


def fanotify_mark(group_fd: int, flags: int, mask: int, fd: int) -> None:
    """Add or remove a mark on the inode that *fd* has open; needs no path.

    Raises:
        OSError: EINVAL where the kernel has no such event, EOPNOTSUPP where the file system does not take
            part, ENOENT when the mark to remove is not there.
    """
    if lib.k_fanotify_mark(group_fd, flags, mask, fd) < 0:
        raise _failed(f"fanotify_mark({flags:#x}, {mask:#x})")


def fork_mount(source: str, target: str, filesystem: str, flags: int, options: str) -> int:
    """Call mount(2) in a child that holds none of our descriptors; returns its process id at once.

    Its exit status is mount's errno, 0 if it is mounted; the caller waits for it. For mounts that this
    process has to answer: a mount that waits for an answer cannot be killed, nor can a process one of whose
    threads waits in it; and with a copy of the descriptor that the answer comes through, it waits for itself.

    Args:
        options: At most a page, with its NUL.
    """
    pid = lib.k_fork_mount(
        os.fsencode(source), os.fsencode(target), filesystem.encode(), flags, os.fsencode(options)
    )
    if pid < 0:
        raise _failed("fork")
    return pid


def unshare(flags: int) -> None:
    """Give the calling thread its own; with CLONE_FS a working directory."""
    if lib.unshare(flags) < 0:
        raise _failed(f"unshare({flags:#x})")


def read_complete(fd: int, msg_id: int) -> None:
    """CACHEFILES_IOC_READ_COMPLETE: let the reader of request *msg_id* look at the cache file again.

    Python's own ioctl() takes no number above 2^31.

    Raises:
        OSError: EINVAL where no such READ waits on the object of *fd*: its reader was killed, for instance.
    """
    if lib.k_read_complete(fd, msg_id) < 0:
        raise _failed(f"ioctl(READ_COMPLETE, {msg_id})")


def address_of(buffer: bytes | bytearray | memoryview) -> int:
    """Where in memory *buffer* begins."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def umount2(target: str, flags: int = 0) -> None:
    """Detach the mount at *target*. EBUSY while somebody uses it; EINVAL where nothing is mounted."""
    if lib.umount2(os.fsencode(target), flags) < 0:
        raise _failed(f"umount2({target!r}, {flags:#x})")


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Reserve, or with FALLOC_FL_PUNCH_HOLE give back, the blocks of a range; *length* is not 0."""
    if lib.fallocate(fd, mode, offset, length) < 0:
        raise _failed(f"fallocate({mode:#x}, {offset}, {length})")


def punch_hole(fd: int, hole: Range) -> None:
    """Give the blocks of *hole* back to the file system; it reads as zeros, the size stays.

    Does nothing for an empty range. On a file under a pre-content mark use a descriptor that is older than
    the mark, or the call waits for an answer.
    """
    if hole:
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, hole.start, len(hole))


def data_ranges(fd: int) -> RangeSet:
    """What of a file is allocated, by SEEK_DATA and SEEK_HOLE, in units of file-system blocks.

    Moves the descriptor's file position. Makes no fanotify event.
    """
    found = RangeSet()
    at = 0
    while True:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # no data behind *at*
                return found
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        found.add(Range(start, at))


def raise_descriptor_limit() -> int:
    """Lift RLIMIT_NOFILE's soft limit to the hard one and return it.

    Each event that waits for its answer holds a descriptor; where none is left, the kernel denies events
    unasked. Processes that are started from here with ``select`` inside should lower theirs again.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def fsmount_erofs(
    source: str, devices: Sequence[str], options: Mapping[str, str | None] | None = None
) -> int:
    """Mount an EROFS image attached to nowhere and return the mount's descriptor (O_PATH, close-on-exec).

    Files can be opened below it with ``dir_fd``. When it is closed, and nothing below is open, the mount is
    gone: a mount that no crash can leave behind.

    Args:
        source: The primary image; a block device, or a file on a file system that has it read folio by folio.
        devices: The n-th is device slot n; as many as the image's device table has.
        options: Further mount options; None as value makes a flag.

    Raises:
        OSError: With the kernel's own words appended, where it had any. ENOTBLK: the source's file system,
            or this kernel, cannot mount a file. ENODEV: no EROFS here. EINVAL: an option, the number of
            devices, or no EROFS image.

    Source: Documentation/filesystems/erofs.rst; fs/erofs/super.c, erofs_fc_parse_param.
    """
    fs_fd = lib.k_fsopen(b"erofs", lib.FSOPEN_CLOEXEC)
    if fs_fd < 0:
        raise _failed("fsopen('erofs')")
    try:
        _fsconfig(fs_fd, "source", source)
        for device in devices:
            _fsconfig(fs_fd, "device", device)
        for key, value in (options or {}).items():
            _fsconfig(fs_fd, key, value)
        _fsconfig(fs_fd, "ro", None)
        if lib.k_fsconfig(fs_fd, lib.FSCONFIG_CMD_CREATE, ffi.NULL, ffi.NULL, 0) < 0:
            raise _refused(fs_fd, f"mounting {source!r} with {len(devices)} devices")
        mount_fd = lib.k_fsmount(fs_fd, lib.FSMOUNT_CLOEXEC, lib.MOUNT_ATTR_RDONLY)
        if mount_fd < 0:
            raise _refused(fs_fd, "fsmount")
        return mount_fd
    finally:
        os.close(fs_fd)


def mount_erofs(
    source: str, target: str, devices: Sequence[str], options: Mapping[str, str | None] | None = None
) -> None:
    """Mount an EROFS image on the directory *target*, read-only. Arguments and errors: `fsmount_erofs`.

    One option per call instead of mount(2)'s page of text: any number of devices, and commas in paths. Each
    value has at most 255 bytes; ``/proc/self/fd/N`` is short, and no path race.
    """
    mount_fd = fsmount_erofs(source, devices, options)
    try:
        if lib.k_move_mount(mount_fd, os.fsencode(target)) < 0:
            raise _failed(f"move_mount({target!r})")
    finally:
        os.close(mount_fd)  # while it is open, umount2() says EBUSY


def _fsconfig(fs_fd: int, key: str, value: str | None) -> None:
    if value is None:
        done = lib.k_fsconfig(fs_fd, lib.FSCONFIG_SET_FLAG, key.encode(), ffi.NULL, 0)
    else:
        done = lib.k_fsconfig(fs_fd, lib.FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0)
    if done < 0:
        raise _refused(fs_fd, f"mount option {key}" + ("" if value is None else f"={value}"))


def _refused(fs_fd: int, attempt: str) -> OSError:
    # The messages of an fs context come one per read, as "e erofs: text"; ENODATA when there are no more.
    number = ffi.errno
    messages = []
    while True:
        try:
            messages.append(os.read(fs_fd, 4096).decode(errors="replace").strip())
        except OSError:
            break
    return _failed("; ".join([attempt, *messages]), number)
