"""Fixtures every test may use."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from erofsd.blobs.chunkmap import ChunkMap
from erofsd.blobs.store import StoredBlob
from tests.registry import Origin, RegistryServer, lying_origin

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def no_ones_cache() -> Iterator[None]:
    """What failed conversions leave for their rerun does not go to the cache of whoever runs the tests."""
    base = os.environ.get("EROFSD_TEST_DIR", "/var/tmp")  # some is large, and /tmp may be memory
    cache = tempfile.TemporaryDirectory(prefix="erofsd-test-cache-", dir=base)
    with cache as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", directory)
        yield


@pytest.fixture(autouse=True)
def nothing_is_left_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the stored blobs and maps of a test: descriptors that come and go by chance upset others."""
    blobs: list[StoredBlob] = []
    maps: dict[int, ChunkMap] = {}
    begin, create, open_, close = StoredBlob.__init__, ChunkMap.create, ChunkMap.open, ChunkMap.close

    def keep(chunk_map: ChunkMap | None) -> ChunkMap | None:
        if chunk_map is not None:
            maps[id(chunk_map)] = chunk_map
        return chunk_map

    def began(blob: StoredBlob, *args: Any) -> None:
        begin(blob, *args)
        blobs.append(blob)

    def closed(chunk_map: ChunkMap) -> None:
        maps.pop(id(chunk_map), None)
        close(chunk_map)

    monkeypatch.setattr(StoredBlob, "__init__", began)
    monkeypatch.setattr(ChunkMap, "create", lambda *args: keep(create(*args)))
    monkeypatch.setattr(ChunkMap, "open", lambda *args: keep(open_(*args)))
    monkeypatch.setattr(ChunkMap, "close", closed)
    yield
    for blob in blobs:
        blob.close()
    for chunk_map in list(maps.values()):
        chunk_map.close()


@pytest.fixture(scope="session")
def testdata() -> Path:
    """Real images made by other people's tools; absent from the repository itself."""
    path = ROOT.parent / "shared" / "testdata"
    if not path.is_dir():
        pytest.skip("no ../shared/testdata beside the checkout: real images cannot be read")
    return path


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A docker-registry that all tests share: use repository names of your own, and do not stop it."""
    server = RegistryServer(tmp_path_factory.mktemp("registry")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def nydusify(registry: RegistryServer, testdata: Path) -> str:
    """``host/nydusify``: a repository of the shared registry with all images of testdata, by their tags."""
    layout = testdata / "nydusify" / "layout"
    for tag in ("zstd", "lz4-128k", "batch", "dict", "index", "zran", "source"):
        registry.push_layout(layout, tag, "nydusify")
    return f"{registry.host}/nydusify"


@pytest.fixture
def origin() -> Iterator[Origin]:
    """An HTTP server that lies as it is told to."""
    with lying_origin() as server:
        yield server
