"""The embedded registry, asked by skopeo and by hand."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from erofsd.quickstart.registry import LayoutRegistry, serve_layout
from tests.images.plainlayout import LAYER_TYPE, TAG, make_layout

CONTENT = bytes(range(256)) * 1024


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A layout with one artifact of one layer, CONTENT."""
    image = tmp_path / "image"
    image.write_bytes(CONTENT)
    make_layout(tmp_path / "layout", image)
    return tmp_path / "layout"


@pytest.fixture
async def registry(layout: Path) -> AsyncIterator[LayoutRegistry]:
    """A registry that serves it."""
    async with serve_layout(layout) as running:
        yield running


@pytest.fixture
async def http(registry: LayoutRegistry) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of it."""
    async with aiohttp.ClientSession(f"http://{registry.address}") as session:
        yield session


async def layer_digest(http: aiohttp.ClientSession) -> str:
    """Digest of the one layer, by way of the manifest."""
    async with http.get(f"/v2/some/name/manifests/{TAG}") as response:
        body = await response.read()
        manifest = json.loads(body)
        assert response.headers["Docker-Content-Digest"] == f"sha256:{hashlib.sha256(body).hexdigest()}"
        assert response.content_type == manifest["mediaType"]
    [layer] = manifest["layers"]
    assert (layer["mediaType"], layer["size"]) == (LAYER_TYPE, len(CONTENT))
    return str(layer["digest"])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("bytes=0-0", CONTENT[:1]),
        ("bytes=4096-8191", CONTENT[4096:8192]),
        ("bytes=262000-", CONTENT[262000:]),
        ("bytes=-10", CONTENT[-10:]),
        ("bytes=262140-999999", CONTENT[262140:]),
    ],
)
async def test_ranges_are_exact_and_counted(
    wanted: str, expected: bytes, http: aiohttp.ClientSession, registry: LayoutRegistry
) -> None:
    path = f"/v2/x/blobs/{await layer_digest(http)}"
    before = registry.traffic.bytes
    async with http.get(path, headers={"Range": wanted}) as response:
        assert response.status == 206
        assert await response.read() == expected
        assert response.headers["Content-Range"].endswith(f"/{len(CONTENT)}")
    assert registry.traffic.bytes - before == len(expected)


async def test_whole_blob_and_head_agree(http: aiohttp.ClientSession) -> None:
    path = f"/v2/x/blobs/{await layer_digest(http)}"
    async with http.get(path) as response:
        assert response.status == 200
        assert await response.read() == CONTENT
    async with http.head(path) as response:
        assert response.status == 200
        assert response.content_length == len(CONTENT)


async def test_range_behind_the_end_is_refused(http: aiohttp.ClientSession) -> None:
    path = f"/v2/x/blobs/{await layer_digest(http)}"
    async with http.get(path, headers={"Range": "bytes=999999-"}) as response:
        assert response.status == 416


@pytest.mark.parametrize(
    "path",
    [
        "manifests/other",
        f"blobs/sha256:{'0' * 64}",
        "blobs/sha256:../../index.json",
        "manifests/../../index.json",
    ],
)
async def test_what_is_not_there_is_404(path: str, http: aiohttp.ClientSession) -> None:
    async with http.get(f"/v2/x/{path}") as response:
        assert response.status == 404


@pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")
async def test_skopeo_can_copy_from_it(testdata: Path, tmp_path: Path) -> None:
    async with serve_layout(testdata / "nydusify/layout") as registry:
        process = await asyncio.create_subprocess_exec(
            *("skopeo", "copy", "--quiet", "--src-tls-verify=false", "--preserve-digests"),
            *(f"docker://{registry.address}/x:zstd", f"oci:{tmp_path}/copy:zstd"),
        )
        assert await process.wait() == 0
    copied = json.loads((tmp_path / "copy/index.json").read_bytes())["manifests"][0]["digest"]
    source = json.loads((testdata / "nydusify/layout/index.json").read_bytes())["manifests"]
    assert copied in [m["digest"] for m in source]
