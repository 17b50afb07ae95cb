"""Space in a cache directory: what lies there, whether it is in use, and getting rid of it.

The kernel never evicts by itself. When space is short the device says so, and whoever bound the cache tells
it what to delete. Files of objects that were opened for the first time have no name until they are closed:
they are not seen here.
"""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ondemand import syscalls
from ondemand.cachefiles import Device
from ondemand.provider import ObjectKey
from ondemand.wire import cachefiles as wire


def is_wanted(device: Device) -> bool:
    """True while there is less free space than the ``cull`` limit, and until the ``run`` limit is reached."""
    poll = select.poll()
    poll.register(device.fileno(), select.POLLOUT)
    return bool(poll.poll(0))


def files(directory: Path) -> Iterator[tuple[ObjectKey, Path]]:
    """Objects with a named file in the cache at *directory*, but for those whose key is no plain file name.

    Source: fs/cachefiles/volume.c, fs/cachefiles/key.c: ``cache/I<volume>/@<hash>/D<cookie>``.
    """
    for path in (directory / "cache").glob("I*/@*/D*"):
        volume = os.fsencode(path.parent.parent.name)[1:]
        yield ObjectKey(os.fsencode(path.name)[1:], volume), path


def find(volume: Path, cookie: str) -> Path | None:
    """The named file of the object *cookie* in the directory of its *volume*; None if there is none.

    Looks everywhere instead of hashing as the kernel does, fs/fscache/cookie.c, which is its own affair.
    """
    paths = (f"{volume}/@{fan:02x}/D{cookie}" for fan in range(256))
    return next((Path(path) for path in paths if os.path.lexists(path)), None)


def is_in_use(device: Device, path: Path) -> bool:
    """True if a mount uses the object whose file is *path*.

    Raises:
        FileNotFoundError: There is none.
    """
    try:
        _in_directory(path.parent, lambda: device.command(wire.InUse(os.fsencode(path.name))))
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            return True
        raise
    return False


def cull(device: Device, path: Path) -> bool:
    """Delete the object whose file is *path*; False if a mount uses it.

    A directory, a volume for instance, is moved to the ``graveyard`` beside ``cache``, for the caller to
    delete.

    Raises:
        FileNotFoundError: There is none.
    """
    try:
        _in_directory(path.parent, lambda: device.command(wire.Cull(os.fsencode(path.name))))
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            return False
        raise
    return True


def _in_directory(directory: Path, work: Callable[[], None]) -> None:
    """Do *work* in a thread whose working directory is *directory*: the device looks names up there.

    The other threads' is another one, so they are not disturbed.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            syscalls.unshare(syscalls.CLONE_FS)
            os.chdir(directory)
            work()
        except BaseException as exc:
            failed.append(exc)

    thread = threading.Thread(target=run, name="cull")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
