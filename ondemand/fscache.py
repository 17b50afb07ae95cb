"""Mounting EROFS over fscache: ``mount -t erofs -o fsid=…`` without waiting for oneself.

A mount asks /dev/cachefiles for its objects before it returns, and until they are there it cannot be killed.
So a process that serves the device mounts in a child, which has none of its descriptors: a copy of one would
keep alive what the mount waits for.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Sequence

from ondemand import syscalls

OPTIONS_MAX_SIZE = os.sysconf("SC_PAGESIZE") - 1
SOURCE = "none"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")


def mount_options(fsid: str, *, domain_id: str | None = None, devices: Sequence[str] = ()) -> str:
    """The text for mount(2), or for ``-o``.

    Args:
        fsid: Names the primary image's object. It is a directory's name, too.
        domain_id: Mounts with the same one share devices.
        devices: The n-th names the object of device slot n; empty where the image's own tags are to be used.

    Raises:
        ValueError: A name is not one, or there are too many: all options have to fit into a page.
    """
    for name in (fsid, *([] if domain_id is None else [domain_id]), *devices):
        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise ValueError(f"{name!r} cannot name an object: 1 to 200 of A-Z a-z 0-9 . _ -")
    parts = [f"fsid={fsid}"]
    if domain_id is not None:
        parts.append(f"domain_id={domain_id}")
    parts += [f"device={device}" for device in devices]
    options = ",".join(parts)
    if len(options) > OPTIONS_MAX_SIZE:
        raise ValueError(f"{len(devices)} devices make {len(options)} bytes of options: more than a page")
    return options


async def mount(target: str, options: str) -> None:
    """Mount on the directory *target*, read-only; returns when it is.

    Cancelled, or not, the child goes on until the kernel lets it; a mount that comes too late stays.

    Args:
        options: From `mount_options`.

    Raises:
        OSError: EIO or ENOBUFS: an object was refused, or nobody serves. EBUSY, EEXIST: this fsid is mounted.
            EINVAL: no EROFS image, or not as many devices as it has. ENODEV, ENOENT: no such file system.
    """
    loop = asyncio.get_running_loop()
    pid = syscalls.fork_mount(SOURCE, target, "erofs", syscalls.MS_RDONLY, options)
    pid_fd = os.pidfd_open(pid)
    ended: asyncio.Future[int] = loop.create_future()

    def reap() -> None:
        loop.remove_reader(pid_fd)
        os.close(pid_fd)
        _, status = os.waitpid(pid, 0)
        if not ended.done():
            ended.set_result(os.waitstatus_to_exitcode(status))

    loop.add_reader(pid_fd, reap)
    error = await ended
    if error < 0:
        raise OSError(errno.EINTR, f"mounting {target} was ended by signal {-error}")
    if error:
        raise OSError(error, f"mounting {target} with {options}: {os.strerror(error)}")
