"""What was located opens: from an OCI layout, from loose files, without its source, or not at all."""

from __future__ import annotations

import asyncio
import json
import shutil
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from erofsd.backends.located import Located, locate
from erofsd.backends.retry import RetryBackend
from erofsd.backends.settings import SourceSettings
from erofsd.errors import BlobNotFound, CorruptImage
from erofsd.images.base import Image
from erofsd.images.erofs.metadata import metadata_ranges
from erofsd.images.erofs.reader import ErofsReader
from erofsd.images.open import fetch_blob_metas, open_image, open_tree
from erofsd.images.source import FileSource
from erofsd.images.summary import summarize, tree_facts
from ondemand.ranges import Range
from tests.images.nydusimages import TAGS, blob_files, decoder
from tests.images.sourcetree import describe_directory, describe_tree, make_tree, mkfs, mounted, without

needs_mkfs = pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="mkfs.erofs is not installed")


async def located_at(ref: str, blobs: str | None = None) -> Located:
    return await locate(ref, settings=SourceSettings(), blobs=blobs)


@pytest.fixture
def facts(testdata: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (testdata / "nydusify" / "facts.jsonl").read_text().splitlines()]


def facts_of(testdata: Path, image: Image) -> list[dict[str, object]]:
    blobs = blob_files(testdata, [layout.blob_id for layout in image.devices])
    return list(tree_facts(open_tree(image, decoder(image.devices, blobs)), digests=True))


@pytest.mark.parametrize("tag", [*TAGS, "index"])
async def test_images_in_a_layout_open(testdata: Path, facts: list[dict[str, Any]], tag: str) -> None:
    located = await located_at(f"oci:{testdata / 'nydusify' / 'layout'}:{tag}")
    image = await open_image(located)
    await located.backend.aclose()
    assert (image.format, image.verified, image.compressed) == ("rafs6", "blake3", False)
    assert image.bootstrap is not None
    assert image.prefetch == (128,)
    assert facts_of(testdata, image) == facts


class Nothing:
    """A source that has gone."""

    name = "nothing"
    transferred_bytes = 0
    requests = 0

    async def size(self, blob_id: str) -> int:
        raise BlobNotFound(f"{blob_id}: gone")

    async def stream(self, blob_id: str, want: Range) -> AsyncIterator[bytes]:
        raise BlobNotFound(f"{blob_id}: gone")
        yield b""

    async def aclose(self) -> None:
        pass


@pytest.mark.parametrize("tag", ["lz4-128k", "dict"])
async def test_with_all_metas_no_source_is_needed(
    testdata: Path, facts: list[dict[str, Any]], tag: str
) -> None:
    located = await located_at(f"oci:{testdata / 'nydusify' / 'layout'}:{tag}")
    metas = await fetch_blob_metas(located)
    await located.backend.aclose()
    image = await open_image(replace(located, backend=RetryBackend(Nothing(), 1), blob_metas=metas))
    assert facts_of(testdata, image) == facts
    with pytest.raises(BlobNotFound, match="gone"):
        await open_image(replace(located, backend=RetryBackend(Nothing(), 1)))


async def test_bootstrap_embedded_in_a_blob_opens(testdata: Path) -> None:
    blob_id = "2fa78cad554b75ac91a4a125ed148d0ddeb25efa4aaa8bd80e5dc292690a4dca"
    path = testdata / "nydus-texture" / "toc" / blob_id
    located = await located_at(f"file:{path}", str(path.parent))
    image = await open_image(located)
    await located.backend.aclose()
    assert [layout.blob_id for layout in image.devices] == [blob_id]
    tree = open_tree(image, decoder(image.devices, {blob_id: path.read_bytes()}))
    digests = {fact["path"]: fact.get("sha256") for fact in tree_facts(tree, digests=True)}
    assert digests["/lib.rs"] == "7628231c52136b04935025215115e29df7f16f223f66c7793e70721483896210"


async def test_damaged_chunk_information_is_refused(testdata: Path, tmp_path: Path) -> None:
    texture = testdata / "nydus-texture"
    (blob,) = (texture / "blobs").iterdir()
    damaged = bytearray(blob.read_bytes())
    damaged[8314 + 40] ^= 0xFF
    (tmp_path / blob.name).write_bytes(damaged)
    located = await located_at(f"file:{texture / 'bootstrap' / 'rafs-v6-2.2.boot'}", str(tmp_path))
    with pytest.raises(CorruptImage, match=rf"{blob.name}.*magic|header"):
        await open_image(located)
    await located.backend.aclose()


# --- plain EROFS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("source") / "top"
    top.mkdir()
    make_tree(top)
    return top


@needs_mkfs
@pytest.mark.parametrize("options", [(), ("-zlz4hc", "-C65536", "-Efragments,ztailpacking")])
async def test_plain_erofs_opens(source: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    path = tmp_path / "image.erofs"
    mkfs(path, source, *options)
    located = await located_at(str(path))
    image = await open_image(located)
    await located.backend.aclose()
    file = FileSource(path)
    assert (image.format, image.verified, image.compressed) == ("erofs", "none", bool(options))
    assert image.primary is not None
    assert (image.primary.size, image.primary.digester, image.devices) == (file.size, None, ())
    assert image.primary.pin
    assert image.metadata == metadata_ranges(ErofsReader(file))
    tree = open_tree(image, lambda device, want: file.pread(want.start, len(want)))
    found = without(describe_tree(tree), "nlink", "mtime")
    assert found == without(describe_directory(source), "nlink", "mtime")
    summary = summarize(image, tree)
    assert sum(summary.entries.values()) == len(found)
    assert summary.metadata_size == image.metadata.byte_count


@needs_mkfs
async def test_plain_erofs_with_a_device_opens(source: Path, tmp_path: Path) -> None:
    path, blob = tmp_path / "image.erofs", tmp_path / "blob"
    mkfs(path, source, "--chunksize=65536", f"--blobdev={blob}")
    located = await located_at(str(path), str(blob))
    image = await open_image(located)
    await located.backend.aclose()
    assert image.primary is not None
    assert [layout.size for layout in image.devices] == [blob.stat().st_size]
    files = [FileSource(path), FileSource(blob)]
    tree = open_tree(image, lambda device, want: files[device].pread(want.start, len(want)))
    found = without(describe_tree(tree), "nlink", "mtime")
    assert found == without(describe_directory(source), "nlink", "mtime")


@needs_mkfs
async def test_truncated_image_is_refused_when_it_is_opened(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "image.erofs"
    mkfs(path, source)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)
    located = await located_at(str(path))
    with pytest.raises(CorruptImage, match="blocks"):
        await open_image(located)
    await located.backend.aclose()


class Stalled(Nothing):
    """A source that never answers."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def size(self, blob_id: str) -> int:
        return 1 << 20

    async def stream(self, blob_id: str, want: Range) -> AsyncIterator[bytes]:
        self.asked.set()
        await asyncio.Event().wait()
        yield b""


async def test_giving_up_on_a_remote_image_frees_the_thread(source: Path, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(1024) + (0xE0F5E1E2).to_bytes(4, "little") + bytes(8192))
    located = await located_at(str(tmp_path / "image"))
    await located.backend.aclose()
    stalled = Stalled()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def run_blocking(func: Any, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            try:
                return func(*args, **kwargs)
            finally:
                loop.call_soon_threadsafe(ended.set)

        return await asyncio.to_thread(run)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        opening = open_image(replace(located, backend=RetryBackend(stalled, 1)), run_blocking)  # type: ignore[arg-type]
        task = group.create_task(opening)
        await stalled.asked.wait()
        task.cancel()
        await ended.wait()


@needs_mkfs
async def test_devices_appended_to_the_primary_need_no_device(source: Path, tmp_path: Path) -> None:
    path, blob = tmp_path / "image.erofs", tmp_path / "blob"
    mkfs(path, source, "--chunksize=65536", f"--blobdev={blob}")
    data = bytearray(path.read_bytes())
    blocks = len(data) // 4096
    slot = int.from_bytes(data[1112:1114], "little") * 128
    data[slot + 64 : slot + 72] = struct.pack("<II", blob.stat().st_size // 4096, blocks)
    data[1032] &= 0xFE  # the checksum no longer holds
    path.write_bytes(data + blob.read_bytes())
    located = await located_at(str(path), str(blob))
    image = await open_image(replace(located, devices=()))
    await located.backend.aclose()
    assert image.devices == ()
    file = FileSource(path)
    tree = open_tree(image, lambda device, want: file.pread(want.start, len(want)))
    found = without(describe_tree(tree), "nlink", "mtime")
    assert found == without(describe_directory(source), "nlink", "mtime")
    with mounted(path, tmp_path / "mnt") as directory:
        if directory is None:
            pytest.skip("no loop mount of EROFS here: compared with the source only")
        assert without(describe_directory(directory), "nlink", "mtime") == found
