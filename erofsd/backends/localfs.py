"""Directories and single files as a source."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import stat
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from erofsd.backends.blobid import split_blob_id
from erofsd.errors import BackendDenied, BackendTemporary, BlobCorrupt, BlobNotFound, ErofsdError, SourceError
from ondemand.ranges import Range

PIECE_SIZE = 1 << 20
# What is in the page cache is read at once up to this size: a hop to a thread costs more (28 us and up).
INLINE_MAX = 64 << 10


def path_id(path: Path) -> str:
    """The blob id of a single file: a name, nothing of its content."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()


def file_pin(status: os.stat_result) -> str:
    """One line that names this very version of a file."""
    return f"size={status.st_size} mtime_ns={status.st_mtime_ns} inode={status.st_ino}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where some bytes lie: a part of a file."""

    path: Path
    offset: int
    size: int


class LocalBackend:
    """Files of this machine.

    A blob is looked for among *files*, then in each directory as ``ID``, ``sha256/ID`` and
    ``blobs/sha256/ID`` (the latter are those of OCI layouts), then it is *fallback*.

    Args:
        files: Single files by blob id.
        fallback: The file that holds any blob that is found nowhere else.
        pins: What files must still be (`file_pin`), by blob id.
    """

    def __init__(
        self,
        directories: Sequence[Path] = (),
        *,
        files: Mapping[str, Path] | None = None,
        fallback: Path | None = None,
        pins: Mapping[str, str] | None = None,
    ) -> None:
        self._directories = tuple(directories)
        self._files = dict(files or {})
        self._fallback = fallback
        self._pins = dict(pins or {})
        self._sizes: dict[str, int] = {}
        shown = directories[0] if directories else fallback or next(iter(self._files.values()), "")
        self._name = str(shown)
        self.transferred_bytes = 0
        self.requests = 0

    @property
    def name(self) -> str:
        """The first directory, or the file."""
        return self._name

    async def size(self, blob_id: str) -> int:
        """See Backend."""
        fd = self._open(blob_id)
        try:
            return self._sizes[blob_id]
        finally:
            os.close(fd)

    async def stream(self, blob_id: str, want: Range) -> AsyncIterator[bytes]:
        """See Backend."""
        if not want:
            return
        fd = self._open(blob_id)
        self.requests += 1
        try:
            size = self._sizes[blob_id]
            if want.stop > size:
                raise BlobCorrupt(f"{self._name}: {blob_id} has {size} bytes, and {want} was asked for")
            at = want.start
            while at < want.stop:
                piece = await _read(fd, at, min(PIECE_SIZE, want.stop - at))
                if not piece:
                    raise BackendTemporary(f"{self._name}: {blob_id} ends at {at}, it had {size} bytes")
                at += len(piece)
                self.transferred_bytes += len(piece)
                yield piece
        except OSError as exc:
            raise translate(exc, f"{self._name}: {blob_id}") from exc
        finally:
            os.close(fd)

    async def aclose(self) -> None:
        """See Backend."""

    def expect(self, blob_id: str, size: int) -> None:
        """Say what size the blob must have; another one is refused from now on."""
        self._sizes[blob_id] = size

    def pin(self, blob_id: str) -> str:
        """Find out which version of the file there is, and stay with it."""
        self._pins.pop(blob_id, None)
        fd = self._open(blob_id)
        try:
            self._pins[blob_id] = file_pin(os.fstat(fd))
        finally:
            os.close(fd)
        return self._pins[blob_id]

    def place(self, blob_id: str) -> Place:
        """Where a blob lies, for whoever reads it without an event loop.

        Raises:
            BlobNotFound, BlobCorrupt, SourceError: As `stream`.
        """
        for path in self._paths(blob_id):
            if path.is_file():
                os.close(self._open(blob_id))
                return Place(path, 0, self._sizes[blob_id])
        raise BlobNotFound(f"{self._name}: has no blob {blob_id}")

    def _open(self, blob_id: str) -> int:
        """A descriptor of the blob, which is what it was before; the caller closes it."""
        fd = self._open_first(blob_id)
        try:
            status = os.fstat(fd)
            pin = self._pins.get(blob_id)
            if pin is not None and file_pin(status) != pin:
                now = file_pin(status)
                raise BlobCorrupt(f"{self._name}: {blob_id}: changed at the source: now {now}, was {pin}")
            size = self._sizes.setdefault(blob_id, status.st_size)
            if size != status.st_size:
                raise BlobCorrupt(
                    f"{self._name}: {blob_id}: changed at the source: {status.st_size} bytes, was {size}"
                )
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _open_first(self, blob_id: str) -> int:
        for path in self._paths(blob_id):
            try:
                # O_NONBLOCK: never wait for a FIFO's writer.
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as exc:
                raise translate(exc, str(path)) from exc
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
        raise BlobNotFound(f"{self._name}: has no blob {blob_id}")

    def _paths(self, blob_id: str) -> list[Path]:
        if blob_id in self._files:
            return [self._files[blob_id]]
        paths: list[Path] = []
        algorithm, name = split_blob_id(blob_id, self._name)
        for directory in self._directories:
            if algorithm is None:
                paths.append(directory / name)
            paths.append(directory / (algorithm or "sha256") / name)
            paths.append(directory / "blobs" / (algorithm or "sha256") / name)
        if self._fallback is not None:
            paths.append(self._fallback)
        return paths


async def _read(fd: int, offset: int, length: int) -> bytes:
    if length <= INLINE_MAX:
        buffer = bytearray(length)
        try:
            count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError as exc:  # EAGAIN: not in the page cache; EOPNOTSUPP: not with this file system
            if exc.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
        else:
            if count == length:
                return bytes(buffer)
    return await asyncio.to_thread(os.pread, fd, length, offset)


def translate(exc: OSError, what: str) -> ErofsdError:
    """Our error for what the file system said about *what*."""
    reason = exc.strerror or str(exc)
    match exc.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return BlobNotFound(f"{what}: {reason}")
        case errno.EACCES | errno.EPERM:
            return BackendDenied(f"{what}: {reason}")
        case errno.EIO | errno.ESTALE | errno.ETIMEDOUT | errno.EINTR | errno.EMFILE | errno.ENFILE:
            return BackendTemporary(f"{what}: {reason}")
    return SourceError(f"{what}: {reason}")
