"""The work directory: finished layers, so that no layer is converted twice, and what is under way.

    blobs/BLOB_ID        data blobs, named by their SHA-256
    layers/KEY           what a layer became: its tree and where its chunks lie (`LayerRecord`)
    fetched/DIGEST       layers as they come from a registry, complete or not; removed when they are converted
    uploads/             where broken uploads go on: what is made again is the same
    lock                 held by whoever uses the directory

A record is written when its blob is complete on disk, so a killed conversion loses one layer at most. What it
leaves in the user's cache is for its rerun; who comes later clears away what nobody needs: scratch files at
once, and the rest after a week.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec
import structlog

from erofsd.backends.localfs import translate
from erofsd.build.record import LayerRecord, read_blob_id, read_record, write_record
from erofsd.errors import ErofsdError

_LOCK_POLL_S = 0.2
_KEPT_S = 7 * 24 * 3600.0
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, msgspec.MsgspecError)
log = structlog.get_logger()


class WorkDir:
    """A work directory in use by this process. A context manager.

    Args:
        path: Made where it is missing; kept, with all layers in it. None: one below the user's cache,
            removed when all is done, and found again by a rerun when it was not.
        purpose: What a rerun has in common with this run.

    Raises:
        SourceError: It cannot be made.
        ErofsdError: At the end of the block, for what the system said about writing here: others translate
            what it says about their files.
    """

    def __init__(self, path: Path | None, purpose: str) -> None:
        self._temporary = path is None
        self.path = path or default_directory() / f"build-{_hashed(purpose)[:16]}"
        self._lock: BinaryIO | None = None
        self._scratch: str | None = None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            for name in ("blobs", "layers", "fetched", "uploads"):
                (self.path / name).mkdir(exist_ok=True)
            _clear_scratch(self.path)
            self._scratch = tempfile.mkdtemp(prefix="scratch-", dir=self.path)
            if self._temporary:
                self._sweep()
        except OSError as exc:
            raise translate(exc, str(self.path)) from exc
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        _clear_scratch(self.path)
        # What is left of a failed run is only worth keeping if there are layers in it, or broken uploads.
        if self._temporary and (kind is None or not any(_leftovers(self.path))):
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
        if isinstance(exc, OSError) and exc.errno in _OF_THE_DISK:
            raise ErofsdError(
                f"{self.path}: {exc.strerror}",
                hint="layers wait there: make room, or name another place with XDG_CACHE_HOME, or --work-dir",
            ) from exc

    def _sweep(self) -> None:
        """Clear away what runs have left that were killed, and were never run again."""
        for other in self.path.parent.glob("build-*"):
            try:
                lock = (other / "lock").open("rb+")
            except OSError:
                continue  # it is being made, or removed
            with lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    age_s = time.time() - other.stat().st_mtime
                    _clear_scratch(other)
                    if age_s > _KEPT_S or not any(_leftovers(other)):
                        shutil.rmtree(other, ignore_errors=True)
                except OSError:  # in use; ours, for one
                    continue

    def _locked(self) -> BinaryIO:
        """Wait until nobody else works here; a temporary directory is not waited for."""
        told = False
        while True:
            lock = (self.path / "lock").open("wb")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
            else:
                if lock_is_current(lock, self.path / "lock"):
                    return lock
                lock.close()
            if self._temporary:
                self.path = Path(tempfile.mkdtemp(prefix="build-", dir=self.path.parent))
                continue
            if not told:
                told = True
                log.warning("workdir.busy", path=str(self.path))
            time.sleep(_LOCK_POLL_S)

    def scratch(self, name: str) -> Path:
        """A path for something that nobody needs afterwards."""
        assert self._scratch is not None  # inside the block only
        return Path(self._scratch, name)

    def blob(self, blob_id: str) -> Path:
        """Where a finished blob lies."""
        return self.path / "blobs" / blob_id

    def fetched(self, digest: str) -> Path:
        """Where a layer is kept while it arrives."""
        return self.path / "fetched" / digest.replace(":", "-")

    @property
    def uploads(self) -> Path:
        """Directory of broken uploads."""
        return self.path / "uploads"

    def keep_blob(self, path: Path, blob_id: str) -> Path:
        """Take a finished blob from *path*, on the same file system."""
        os.replace(path, self.blob(blob_id))
        return self.blob(blob_id)

    def write_back(self, blob_id: str) -> None:
        """Begin to write a finished blob to the disk, so that whoever syncs it later waits less."""
        fd = os.open(self.blob(blob_id), os.O_RDONLY)
        try:
            # Starts what is dirty on its way without waiting, and drops only what is clean: mm/fadvise.c.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def knows(self, key: str) -> bool:
        """True if it is known what the layer *key* became, and its blob is here."""
        try:
            with self._record(key).open("rb") as file:
                blob_id = read_blob_id(file)
        except FileNotFoundError:
            return False
        except _UNREADABLE as exc:
            log.info("layer.forgotten", path=str(self._record(key)), reason=str(exc))
            return False
        return blob_id is None or self.blob(blob_id).is_file()

    def load(self, key: str) -> LayerRecord | None:
        """What the layer *key* became; None if that is not known any more."""
        try:
            with self._record(key).open("rb") as file:
                return read_record(file)
        except _UNREADABLE:
            return None

    def save(self, key: str, record: LayerRecord) -> None:
        """Remember what the layer *key* became; its blob was given to `keep_blob` before.

        Both are on disk when this returns, the blob first: what is remembered is there after a power failure.
        """
        path = self.scratch(f"record-{_hashed(key)}")
        try:
            if record.layer.blob is not None:
                _sync(self.blob(record.layer.blob.blob_id))
                _sync(self.path / "blobs")
            with path.open("wb") as file:
                write_record(file, record)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path, self._record(key))
        except OSError as exc:
            raise translate(exc, str(path)) from exc

    def _record(self, key: str) -> Path:
        return self.path / "layers" / _hashed(key)


def _clear_scratch(directory: Path) -> None:
    for path in directory.glob("scratch-*"):
        shutil.rmtree(path, ignore_errors=True)


def _leftovers(directory: Path) -> Iterator[Path]:
    for name in ("layers", "fetched", "uploads"):
        yield from (directory / name).iterdir()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock_is_current(lock: BinaryIO, path: Path) -> bool:
    """False if the directory of *lock* was removed, by whoever held it, before we got it."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def default_directory() -> Path:
    """Below the user's cache directory. Source: XDG Base Directory Specification."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "erofsd"
    try:
        return Path.home() / ".cache" / "erofsd"
    except RuntimeError:  # neither $HOME nor an entry in passwd
        return Path("/var/cache/erofsd")


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
