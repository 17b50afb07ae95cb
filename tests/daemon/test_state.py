"""Mount table and stored images."""

from __future__ import annotations

from pathlib import Path

import pytest

from erofsd.daemon.state import ImageFiles, MountRecord, MountTable, SavedImage
from erofsd.errors import CorruptImage


def record(directory: str, **more: object) -> MountRecord:
    return MountRecord(dir=directory, ref="r", image="k", engine="fanotify", **more)  # type: ignore[arg-type]


def test_a_row_survives_reopening_in_order(tmp_path: Path) -> None:
    table = MountTable(tmp_path / "db")
    table.put(record("/b"))
    table.put(record("/a"))
    table.put(record("/b", superblocks=("erofs-1",)))
    table.close()
    found = MountTable(tmp_path / "db").all()
    assert [(r.dir, r.superblocks) for r in found] == [("/b", ("erofs-1",)), ("/a", ())]


def test_a_lingering_mount_frees_its_directory(tmp_path: Path) -> None:
    table = MountTable(tmp_path / "db")
    old = record("/a", superblocks=("erofs-1",))
    table.put(old)
    gone = record("/a", superblocks=("erofs-1",), lingering=True)
    table.replace(old, gone)
    table.put(record("/a", superblocks=("erofs-2",)))
    assert {(r.lingering, r.superblocks) for r in table.all()} == {
        (True, ("erofs-1",)),
        (False, ("erofs-2",)),
    }
    table.delete(gone)
    assert [r.superblocks for r in table.all()] == [("erofs-2",)]


def saved(**more: object) -> SavedImage:
    return SavedImage(ref="r", kind="rafs", digest=None, block_size=4096, compressed=False, **more)  # type: ignore[arg-type]


def test_an_image_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    files = ImageFiles(tmp_path / "images")
    files.save("k", saved(blob_ids=("b",)), b"boot", {"b": b"meta"})
    assert files.load("k") == (saved(blob_ids=("b",)), b"boot", {"b": b"meta"})
    files.remove_others({"k"})
    assert files.bootstrap_path("k").read_bytes() == b"boot"
    files.remove_others(set())
    with pytest.raises(CorruptImage, match="stored image"):
        files.load("k")


def test_a_half_written_image_is_not_there(tmp_path: Path) -> None:
    files = ImageFiles(tmp_path / "images")
    files.save("k", saved(blob_ids=("b",)), b"boot", {"b": b"meta"})
    (files.path("k") / "b.blob.meta").unlink()
    with pytest.raises(CorruptImage):
        files.load("k")
