"""Images that we write, served by ourselves: RAFS from its blobs, plain EROFS with and without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from erofsd.images.erofs.writer import write_image
from erofsd.images.rafs6.writer import write_bootstrap
from tests.daemon.conftest import Daemon
from tests.images.nodes import awkward
from tests.images.packing import Packed
from tests.images.sourcetree import describe_directory


def test_rafs_with_batches_equals_its_source(daemon: Daemon, tmp_path: Path) -> None:
    source = awkward()
    packed = Packed(source, batch_size=10_000, groups=3)
    for blob_id, stored in packed.stored.items():
        (tmp_path / blob_id).write_bytes(stored)
    with (tmp_path / "image.boot").open("wb") as out:
        write_bootstrap(
            source.root,
            packed.chunks,
            out,
            chunk_size=packed.chunk_size,
            prefetch=[source.root.children[b"dir"]],
        )
    mounted = daemon.mount(f"file:{tmp_path}/image.boot", "--blobs", tmp_path)
    assert describe_directory(mounted) == source.describe()
    assert daemon.ls(mounted)["verified"] == "blake3"


@pytest.mark.parametrize("with_blob", [False, True], ids=["one file", "with a blob"])
def test_plain_erofs_equals_its_source(daemon: Daemon, tmp_path: Path, with_blob: bool) -> None:
    source = awkward()
    with (tmp_path / "image.erofs").open("wb") as image, (tmp_path / "blob").open("wb") as blob:
        written = write_image(
            source.root, image, source.read, chunk_size=65536, blob=blob if with_blob else None
        )
    if with_blob:
        (tmp_path / "blob").rename(tmp_path / written.blob_id)
    mounted = daemon.mount(f"file:{tmp_path}/image.erofs", *(["--blobs", tmp_path] if with_blob else []))
    assert describe_directory(mounted) == source.describe()
    assert daemon.ls(mounted)["format"] == "erofs"
