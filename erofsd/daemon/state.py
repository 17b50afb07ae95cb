"""What survives the worker, the keeper and the machine: mounts in SQLite, images in files.

``mounts.db`` says what must be mounted. A row is written before mount(2) and deleted after umount(2), so a
crash between the two is found by comparing rows with ``/proc/self/mountinfo``.

``images/<key>/`` holds what an image's mount needs without the network: ``image.json``, and for RAFS the
bootstrap (``image.boot``, the very file that is mounted) and the chunk information of every blob
(``<blob id>.blob.meta``, in Nydus' cache form). It is written aside and renamed into place, synced.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import structlog

from erofsd.errors import CacheFull, CorruptImage, ErofsdError

log = structlog.get_logger("erofsd.state")

RESERVE_SIZE = 256 << 10
NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)

SCHEMA = """
CREATE TABLE IF NOT EXISTS mounts (
    name TEXT PRIMARY KEY,
    record BLOB NOT NULL
) STRICT
"""


class MountRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One mount, as it must come back.

    Attributes:
        ref: As the user gave it.
        image: Key of the image in ``images/``.
        blobs: ``--blobs``, if given.
        engine: The engine that serves it.
        stored: Names of the stored blobs, primary first, then by device slot: what the superblock has open.
        fsid: cachefiles: names the primary's object, and the mount.
        prepared: Registered for mount(8): never mounted by us, and kept until it is unregistered.
        superblocks: Names in ``/sys/fs/erofs`` that may be this mount's; empty before mount(2) has returned.
        boot_id: The boot in which ``superblocks`` means something.
        lingering: True once it is unmounted here while another mount namespace still has the superblock.
        leaving: True from before the daemon itself unmounts it at its end: so it comes back.
    """

    dir: str
    ref: str
    image: str
    engine: str
    prefetch: str = "hints"
    blobs: tuple[str, ...] = ()
    plain_http: bool = False
    stored: tuple[str, ...] = ()
    fsid: str = ""
    prepared: bool = False
    superblocks: tuple[str, ...] = ()
    boot_id: str = ""
    lingering: bool = False
    leaving: bool = False
    mounted_at: float = msgspec.field(default_factory=time.time)

    @property
    def name(self) -> str:
        """Key in the table: the directory; fsid or superblock (without slash) where there is none."""
        if self.prepared:
            return self.fsid
        return "+".join(self.superblocks) if self.lingering else self.dir


class SavedImage(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored of an image beside its bootstrap.

    Attributes:
        devices: Plain EROFS: (blob id, decoded size, pin) of each device slot.
        primary: Plain EROFS: (blob id, size, pin) of the primary image.
        metadata: Plain EROFS: ranges to fill before the mount, as (start, stop).
        holder: RAFS: id of the blob that held the bootstrap, if one did.
        blob_ids: RAFS: ids of the blobs whose ``.blob.meta`` is stored.
    """

    ref: str
    kind: str
    digest: str | None
    holder: str | None = None
    block_size: int
    compressed: bool
    primary: tuple[str, int, str] | None = None
    devices: tuple[tuple[str, int, str], ...] = ()
    metadata: tuple[tuple[int, int], ...] = ()
    blob_ids: tuple[str, ...] = ()


class MountTable:
    """The mounts that must exist. Every change is durable against SIGKILL when the call returns.

    Args:
        path: Of the database; made if missing. One that SQLite cannot read is put aside.
        served: Mounts may be guarded that were noted here. If so, and there is no database, it was lost.

    Attributes:
        damaged: Some of what was in it is lost: there may be mounts that no row tells of.

    Raises:
        ErofsdError: As every method: it cannot be read or written now.
    """

    def __init__(self, path: Path, *, served: bool = False) -> None:
        self._path = path
        self._served = served
        self._reserve = path.with_name("reserve")
        self.damaged = served and not path.exists()
        try:
            self._open()
        except sqlite3.OperationalError as exc:  # no room, no permission: the file may be as good as ever
            if not served:
                raise self._refused(exc) from exc
            self._open_to_read(exc)
            return
        except sqlite3.DatabaseError as exc:
            aside = self._put_aside()
            log.error("mounts.lost", error=f"{path}: {exc}", hint=f"it is kept as {aside}; mount again")
            self.damaged = True
            try:
                self._open()
            except sqlite3.Error as again:
                raise self._refused(again) from again
        # The next worker has to know, too, until a first one starts from nothing.
        if self.damaged and served:
            self._execute("PRAGMA user_version = 1")
        elif not served:
            self._execute("PRAGMA user_version = 0")
        self.damaged |= self._execute("PRAGMA user_version") != [(0,)]
        self._make_reserve()

    def _make_reserve(self) -> None:
        # Room that is given up for a change when there is none: what was unmounted must not come back.
        with contextlib.suppress(OSError), open(self._reserve, "ab") as file:
            os.posix_fallocate(file.fileno(), 0, RESERVE_SIZE)

    def _open(self) -> None:
        self._db = sqlite3.connect(self._path, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            # A handful of rows a minute: power loss must not forget one.
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(SCHEMA)
            self._db.execute("SELECT name, record FROM mounts").fetchall()
        except sqlite3.Error:
            self._db.close()
            raise

    def _open_to_read(self, reason: sqlite3.Error) -> None:
        # Mounts are guarded, and nobody but us will answer for them: better that than nothing.
        log.error("mounts.unwritable", error=str(self._refused(reason)))
        self._db = sqlite3.connect(f"file:{quote(str(self._path))}?mode=ro", uri=True, isolation_level=None)
        self.damaged |= self._execute("PRAGMA user_version") != [(0,)]

    def _put_aside(self) -> Path:
        aside = self._path.with_name(self._path.name + ".bad")
        for suffix in ("-wal", "-shm", ""):
            found = self._path.with_name(self._path.name + suffix)
            with contextlib.suppress(FileNotFoundError):
                found.rename(aside.with_name(aside.name + suffix))
        return aside

    def _refused(self, exc: sqlite3.Error) -> ErofsdError:
        return ErofsdError(
            f"{self._path}: {exc}", hint="make room where state_dir is, and see that it is writable"
        )

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as exc:
            raise self._refused(exc) from exc

    def _change(self, work: Callable[[], None]) -> None:
        """Do *work*; if there is no room, give up the reserve and do it again."""
        try:
            work()
        except ErofsdError as exc:
            code = getattr(exc.__cause__, "sqlite_errorcode", 0) & 0xFF
            if code not in NO_ROOM or not self._reserve.exists():
                raise
            self._reserve.unlink()
            work()

    def put(self, record: MountRecord) -> None:
        """Insert or replace the row of ``record.name``."""
        self._change(lambda: self._put(record))

    def _put(self, record: MountRecord) -> None:
        self._execute(
            "INSERT INTO mounts VALUES (?, ?) ON CONFLICT(name) DO UPDATE SET record = excluded.record",
            (record.name, msgspec.json.encode(record)),
        )

    def replace(self, old: MountRecord, new: MountRecord) -> None:
        """Put *new* in the place of *old* in one step."""
        self.replace_all([(old, new)])

    def replace_all(self, pairs: Sequence[tuple[MountRecord, MountRecord]]) -> None:
        """Put the second of each pair in the place of the first, all in one step."""
        self._change(lambda: self._replace_all(pairs))

    def _replace_all(self, pairs: Sequence[tuple[MountRecord, MountRecord]]) -> None:
        self._execute("BEGIN")
        try:
            for old, new in pairs:
                if old.name != new.name:
                    self._delete(old)
                self._put(new)
            self._execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # a full disk has ended it already
                self._db.execute("ROLLBACK")
            raise

    def delete(self, record: MountRecord) -> None:
        """Forget *record*; nothing happens if it is not there."""
        self._change(lambda: self._delete(record))

    def _delete(self, record: MountRecord) -> None:
        self._execute("DELETE FROM mounts WHERE name = ?", (record.name,))

    def all(self) -> list[MountRecord]:
        """Every row that can be understood, in the order in which they were made."""
        found = []
        for name, row in self._execute("SELECT name, record FROM mounts ORDER BY rowid"):
            try:
                found.append(msgspec.json.decode(row, type=MountRecord))
            except msgspec.MsgspecError as exc:
                if not self.damaged:
                    log.error("mounts.lost", dir=name, error=f"{self._path}: a row cannot be read: {exc}")
                self.damaged = True
                if not self._served:
                    self._execute("DELETE FROM mounts WHERE name = ?", (name,))
        return found

    def close(self) -> None:
        """Close the database."""
        self._db.close()


class ImageFiles:
    """The directory ``images/``.

    Args:
        directory: Made if missing.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory

    def path(self, key: str) -> Path:
        """Directory of the image *key*."""
        return self._directory / key

    def bootstrap_path(self, key: str) -> Path:
        """The bootstrap that is mounted."""
        return self.path(key) / "image.boot"

    def save(
        self, key: str, saved: SavedImage, bootstrap: bytes | None, blob_metas: dict[str, bytes]
    ) -> None:
        """Store an image under *key*, unless it is there already: a key stands for content.

        Raises:
            CacheFull: No room, or worse; nothing is left behind.
        """
        files = {f"{blob_id}.blob.meta": meta for blob_id, meta in blob_metas.items()}
        files["image.json"] = msgspec.json.encode(saved)  # the last one
        if bootstrap is not None:
            files = {"image.boot": bootstrap, **files}
        try:
            if not self._has(key, files):
                self._write(key, files)
        except OSError as exc:
            raise CacheFull(f"{self.path(key)}: {exc.strerror}", hint="make room where state_dir is") from exc

    def _has(self, key: str, files: Mapping[str, bytes]) -> bool:
        # By content: what is mounted is this very file, and nothing else would notice that it has changed.
        try:
            return all((self.path(key) / name).read_bytes() == data for name, data in files.items())
        except FileNotFoundError:
            return False

    def _write(self, key: str, files: Mapping[str, bytes]) -> None:
        aside = self._directory / f".{key}.new"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(mode=0o700)
        try:
            for name, data in files.items():
                _write(aside / name, data)
            shutil.rmtree(self.path(key), ignore_errors=True)  # half-deleted, or damaged
            aside.rename(self.path(key))
            _sync_directory(self._directory)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def load(self, key: str) -> tuple[SavedImage, bytes | None, dict[str, bytes]]:
        """What :meth:`save` stored.

        Raises:
            CorruptImage: It is not there or damaged: the image must be fetched again.
        """
        try:
            saved = msgspec.json.decode((self.path(key) / "image.json").read_bytes(), type=SavedImage)
            bootstrap = self.bootstrap_path(key).read_bytes() if saved.primary is None else None
            metas = {b: (self.path(key) / f"{b}.blob.meta").read_bytes() for b in saved.blob_ids}
        except (OSError, msgspec.MsgspecError) as exc:
            raise CorruptImage(
                f"stored image {self.path(key)}: {exc}", hint="erofsd umount and mount the reference again"
            ) from exc
        return saved, bootstrap, metas

    def remove(self, key: str) -> None:
        """Delete the image *key*, if it is there. A superblock that has its bootstrap open keeps it."""
        with contextlib.suppress(OSError):
            (self.path(key) / "image.json").unlink(missing_ok=True)  # from here on it is nobody's image
        shutil.rmtree(self.path(key), ignore_errors=True)

    def remove_others(self, used: set[str]) -> None:
        """Delete every image whose key is not in *used*."""
        for entry in self._directory.iterdir():
            if entry.name not in used:
                self.remove(entry.name)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
