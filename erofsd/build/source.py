"""Where file trees come from: what every source gives, and a directory as one.

A source is an iterator of `SourceEntry` in the order in which they are to be applied. The content of an entry
must be read, or left alone, before the next entry is asked for.
"""

from __future__ import annotations

import errno
import os
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from erofsd.errors import BackendDenied, BlobNotFound, SourceError, UsageError
from erofsd.images.erofs.format import TYPE_NAMES
from erofsd.images.tree import Node

Warn = Callable[[str], None]

# Shared by all nodes that have none: half of the memory of a node would be empty containers.
NO_XATTRS: dict[bytes, bytes] = {}
NO_CHUNKS: array[int] = array("q")
# Numbers that occurred lately: packages come with few owners, modes and times.
_numbers: dict[int, int] = {}
_NUMBERS_MAX = 10_000


class Content(Protocol):
    """The bytes of one regular file, read once from front to back."""

    @property
    def size(self) -> int: ...

    @property
    def extents(self) -> list[tuple[int, int]] | None:
        """Offset and length of what is data, ascending; the rest is zeros. None: all of it is data."""
        ...

    def readinto(self, offset: int, view: memoryview) -> None:
        """Fill *view* with data from *offset* of the file; calls go forward, and never into a hole.

        Raises:
            SourceError, CorruptImage: The bytes are not there; names the file.
        """
        ...

    def close(self) -> None:
        """Give back what reading held."""
        ...


@dataclass(slots=True)
class SourceEntry:
    """One name of a source.

    Attributes:
        path: Names joined by ``/``, without ``.``, ``..`` and empty ones; ``b""`` is the root.
        node: Its attributes; of a hard link, those that its entry states.
        link: Of a hard link, the path of the name it is to share the inode of, in the same form.
        content: Of a regular file.
    """

    path: bytes
    node: Node
    link: bytes | None = None
    content: Content | None = None


def make_node(
    type_: str,
    mode: int,
    uid: int,
    gid: int,
    mtime: int,
    *,
    size: int = 0,
    rdev: int = 0,
    target: bytes = b"",
    xattrs: dict[bytes, bytes] | None = None,
) -> Node:
    """A node that shares its empty containers, and its numbers where others have the same."""
    if len(_numbers) > _NUMBERS_MAX:
        _numbers.clear()
    shared = _numbers.setdefault
    return Node(
        type_,
        shared(mode, mode),
        shared(uid, uid),
        shared(gid, gid),
        shared(mtime, mtime),
        size,
        rdev,
        target,
        xattrs or NO_XATTRS,
        NO_CHUNKS,
    )


def show(path: bytes) -> str:
    """*path* for people: as it is where that can be printed."""
    return path.decode("utf-8", "backslashreplace") or "/"


def reason(exc: OSError) -> str:
    """What the system said, without the numbers."""
    return exc.strerror or str(exc)


def source_error(path: bytes, exc: OSError) -> SourceError:
    """The error for a file that cannot be read: names it."""
    kind = SourceError
    if exc.errno in (errno.EACCES, errno.EPERM):
        kind = BackendDenied
    elif exc.errno in (errno.ENOENT, errno.ENOTDIR):
        kind = BlobNotFound
    return kind(f"{show(path)}: {reason(exc)}")


# --- a directory ---

# Paths longer than PATH_MAX (4096) are walked from a directory that is held open.
_PATH_LIMIT = 3500
_NO_XATTRS_ERRNOS = (errno.ENOTSUP, errno.ENODATA, errno.ENOSYS)


@dataclass(slots=True)
class _Level:
    # One directory on the way down: names still to visit, and what the names go behind.
    path: bytes
    os_path: bytes
    names: Iterator[bytes]
    held_fd: int = -1


class DirectorySource:
    """A directory and all below it, siblings in the order of their bytes, parents first.

    Hard links are told by device and inode number: the first name brings the content. Other file systems
    mounted below are walked through, as tar does.

    Args:
        path: The directory; a symbolic link to one is followed.
        first: Paths below it (files, or directories with all files in them) that come before all others,
            without their parents. What is not there is passed over: these are hints.

    Raises:
        UsageError: *path* is no directory.
        SourceError: Something cannot be read; names it.
    """

    def __init__(self, path: str | os.PathLike[str] | bytes, first: Iterable[bytes] = ()) -> None:
        self.root = os.fsencode(path)
        self.first = tuple(name.strip(b"/") for name in first)
        try:
            if not stat.S_ISDIR(os.stat(self.root).st_mode):
                raise UsageError(f"{show(self.root)}: is no directory")
        except OSError as exc:
            raise source_error(self.root, exc) from exc

    def __iter__(self) -> Iterator[SourceEntry]:
        linked: dict[tuple[int, int], bytes] = {}
        done: set[bytes] = set()
        for path in self.first:
            if path and self._reachable(path):
                for entry in self._walk(path, os.path.join(self.root, path), linked, done):
                    if entry.node.type == "reg":
                        done.add(entry.path)
                        yield entry
        # The root by what is inside, so that a symbolic link to it is followed.
        yield from self._walk(b"", os.path.join(self.root, b"."), linked, done)

    def _reachable(self, path: bytes) -> bool:
        """True if *path* is there and no symbolic link leads to it."""
        try:
            parents = [path[:at] for at, byte in enumerate(path) if byte == 0x2F]
            return all(stat.S_ISDIR(os.lstat(os.path.join(self.root, p)).st_mode) for p in parents) and bool(
                os.lstat(os.path.join(self.root, path))
            )
        except OSError:
            return False

    def _walk(
        self, path: bytes, os_path: bytes, linked: dict[tuple[int, int], bytes], done: set[bytes]
    ) -> Iterator[SourceEntry]:
        levels: list[_Level] = []
        try:
            entry = self._entry(path, os_path, linked)
            if path not in done:
                yield entry
            if entry.node.type == "dir":
                levels.append(self._open(path, os_path))
            while levels:
                level = levels[-1]
                name = next(level.names, None)
                if name is None:
                    _release(levels.pop())
                    continue
                path = level.path + name
                if path in done:
                    continue
                os_path = level.os_path + name
                entry = self._entry(path, os_path, linked)
                yield entry
                if entry.node.type == "dir":
                    levels.append(self._open(path, os_path))
        finally:
            for level in levels:
                _release(level)

    def _open(self, path: bytes, os_path: bytes) -> _Level:
        held_fd = -1
        try:
            if len(os_path) > _PATH_LIMIT:
                held_fd = os.open(os_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                os_path = b"/proc/self/fd/%d" % held_fd
            names = iter(sorted(os.listdir(os_path)))
        except OSError as exc:
            raise source_error(os.path.join(self.root, path), exc) from exc
        return _Level(path + b"/" if path else b"", os_path + b"/", names, held_fd)

    def _entry(self, path: bytes, os_path: bytes, linked: dict[tuple[int, int], bytes]) -> SourceEntry:
        full = os.path.join(self.root, path)
        try:
            status = os.lstat(os_path)
            type_ = TYPE_NAMES.get(stat.S_IFMT(status.st_mode))
            if type_ is None:
                raise SourceError(f"{show(full)}: an unknown kind of file, mode {status.st_mode:o}")
            node = make_node(
                type_,
                stat.S_IMODE(status.st_mode),
                status.st_uid,
                status.st_gid,
                status.st_mtime_ns,
                size=status.st_size if type_ == "reg" else 0,
                rdev=status.st_rdev if type_ in ("chr", "blk") else 0,
                target=os.readlink(os_path) if type_ == "lnk" else b"",
                xattrs=_xattrs(os_path),
            )
        except OSError as exc:
            raise source_error(full, exc) from exc
        if status.st_nlink > 1 and type_ != "dir":
            first = linked.setdefault((status.st_dev, status.st_ino), path)
            if first != path:
                return SourceEntry(path, node, link=first)
        sparse = status.st_blocks * 512 < status.st_size
        content = FileContent(os_path, full, status.st_size, sparse) if type_ == "reg" else None
        return SourceEntry(path, node, content=content)


def _release(level: _Level) -> None:
    if level.held_fd >= 0:
        os.close(level.held_fd)


def _xattrs(os_path: bytes) -> dict[bytes, bytes]:
    try:
        names = os.listxattr(os_path, follow_symlinks=False)
    except OSError as exc:
        if exc.errno in _NO_XATTRS_ERRNOS:
            return NO_XATTRS
        raise
    if not names:
        return NO_XATTRS
    return {os.fsencode(name): os.getxattr(os_path, name, follow_symlinks=False) for name in names}


class FileContent:
    """A file on disk; opened when it is first read. See `Content`.

    Args:
        os_path: To open it by.
        path: To name it by.
        sparse: Ask the file system where its holes are.
    """

    __slots__ = ("_fd", "_os_path", "_path", "_sparse", "size")

    def __init__(self, os_path: bytes, path: bytes, size: int, sparse: bool) -> None:
        self.size = size
        self._os_path = os_path
        self._path = path
        self._sparse = sparse
        self._fd = -1

    @property
    def extents(self) -> list[tuple[int, int]] | None:
        """See `Content`."""
        if not self._sparse:
            return None
        try:
            return list(_data_extents(self._open(), self.size))
        except OSError as exc:
            if exc.errno in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no holes
                return None
            raise source_error(self._path, exc) from exc

    def readinto(self, offset: int, view: memoryview) -> None:
        """See `Content`."""
        done = 0
        try:
            fd = self._open()
            while done < len(view):
                count = os.preadv(fd, (view[done:],), offset + done)
                if not count:
                    raise SourceError(f"{show(self._path)}: became shorter while it was read")
                done += count
        except OSError as exc:
            raise source_error(self._path, exc) from exc

    def close(self) -> None:
        """See `Content`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        if self._fd < 0:
            # O_NONBLOCK: nobody may put a FIFO in its place and have us wait for it.
            self._fd = os.open(self._os_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        return self._fd


def _data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole is left
                return
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < end:
            yield start, end - start
