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
from pathlib import Path

import msgspec

from erofsd.errors import CorruptImage

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
        superblocks: Names in ``/sys/fs/erofs`` that may be this mount's; empty before mount(2) has returned.
        boot_id: The boot in which ``superblocks`` means something.
        lingering: True once it is unmounted here while another mount namespace still has the superblock.
    """

    dir: str
    ref: str
    image: str
    engine: str
    prefetch: str = "hints"
    blobs: tuple[str, ...] = ()
    plain_http: bool = False
    stored: tuple[str, ...] = ()
    superblocks: tuple[str, ...] = ()
    boot_id: str = ""
    lingering: bool = False
    mounted_at: float = msgspec.field(default_factory=time.time)

    @property
    def name(self) -> str:
        """Key in the table: the directory, or the superblock of a lingering one (which has no slash)."""
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
        path: Of the database; made if missing.
    """

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(
            "PRAGMA synchronous=FULL"
        )  # a handful of rows a minute: power loss must not forget one
        self._db.execute(SCHEMA)

    def put(self, record: MountRecord) -> None:
        """Insert or replace the row of ``record.name``."""
        self._db.execute(
            "INSERT INTO mounts VALUES (?, ?) ON CONFLICT(name) DO UPDATE SET record = excluded.record",
            (record.name, msgspec.json.encode(record)),
        )

    def replace(self, old: MountRecord, new: MountRecord) -> None:
        """Put *new* in the place of *old* in one step."""
        with self._db:
            self._db.execute("BEGIN")
            self.delete(old)
            self.put(new)

    def delete(self, record: MountRecord) -> None:
        """Forget *record*; nothing happens if it is not there."""
        self._db.execute("DELETE FROM mounts WHERE name = ?", (record.name,))

    def all(self) -> list[MountRecord]:
        """Every row, in the order in which they were made."""
        rows = self._db.execute("SELECT record FROM mounts ORDER BY rowid").fetchall()
        return [msgspec.json.decode(row[0], type=MountRecord) for row in rows]

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
        """Store an image under *key*, replacing nothing: a key stands for content.

        Raises:
            OSError: No room, or worse; nothing is left behind.
        """
        if (self.path(key) / "image.json").exists():
            return
        aside = self._directory / f".{key}.new"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(mode=0o700)
        try:
            if bootstrap is not None:
                _write(aside / "image.boot", bootstrap)
            for blob_id, meta in blob_metas.items():
                _write(aside / f"{blob_id}.blob.meta", meta)
            _write(aside / "image.json", msgspec.json.encode(saved))
            shutil.rmtree(self.path(key), ignore_errors=True)  # a half-deleted one
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
