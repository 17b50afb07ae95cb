"""From a reference to an image: Nydus' own, plain EROFS in every place, and what is refused by name."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from erofsd.backends import bootstraplayer
from erofsd.backends.bootstraplayer import unpack_bootstrap_layer
from erofsd.backends.http import url_id
from erofsd.backends.located import Located, locate, open_source
from erofsd.backends.settings import SourceSettings
from erofsd.errors import (
    BackendTemporary,
    BlobCorrupt,
    BlobNotFound,
    CorruptImage,
    ImageRefused,
    UnsupportedImage,
    UsageError,
)
from ondemand.ranges import Range
from tests.registry import Origin, RegistryServer, need

SETTINGS = SourceSettings(docker_config=Path("/nonexistent"), inactivity_s=1.0, locate_attempts=2)
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EROFS = "application/vnd.erofs.layer.v1"
TAR = "application/vnd.oci.image.layer.v1.tar+gzip"
NYDUS = "application/vnd.oci.image.layer.nydus.blob.v1"
BOOTSTRAP = {"containerd.io/snapshot/nydus-bootstrap": "true"}
TAGS = ("zstd", "lz4-128k", "batch", "dict", "index")


async def find(reference: str, **options: Any) -> Located:
    found = await locate(reference, settings=SETTINGS, **({"platform": "linux/amd64"} | options))
    await found.backend.aclose()
    return found


class Layout:
    """An OCI layout that tests put together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifests: list[dict[str, Any]] = []
        (path / "blobs" / "sha256").mkdir(parents=True)
        self.save()

    def save(self) -> None:
        index = {"schemaVersion": 2, "manifests": self.manifests}
        (self.path / "index.json").write_text(json.dumps(index))

    def blob(self, body: bytes, media_type: str, **extra: Any) -> dict[str, Any]:
        digest = hashlib.sha256(body).hexdigest()
        (self.path / "blobs" / "sha256" / digest).write_bytes(body)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(body), **extra}

    def document(self, content: dict[str, Any], media_type: str = MANIFEST, **extra: Any) -> dict[str, Any]:
        return self.blob(
            json.dumps({"schemaVersion": 2, "mediaType": media_type, **content}).encode(), media_type, **extra
        )

    def manifest(self, *layers: dict[str, Any], diff_ids: list[str] | None = None) -> dict[str, Any]:
        config = self.blob(
            json.dumps({"rootfs": {"diff_ids": diff_ids or []}}).encode(),
            "application/vnd.oci.image.config.v1+json",
        )
        return self.document({"config": config, "layers": list(layers)})

    def tag(self, descriptor: dict[str, Any], name: str = "t") -> str:
        self.manifests.append({**descriptor, "annotations": {"org.opencontainers.image.ref.name": name}})
        self.save()
        return f"oci:{self.path}:{name}"


@pytest.fixture
def empty(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture(scope="module")
def erofs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain EROFS image of one file."""
    directory = tmp_path_factory.mktemp("erofs")
    (directory / "tree").mkdir()
    (directory / "tree" / "file").write_bytes(b"content" * 1000)
    image = directory / "x.erofs"
    subprocess.run([need("mkfs.erofs"), "--quiet", image, directory / "tree"], check=True)
    return image


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plain EROFS image with its data in a second device."""
    directory = tmp_path_factory.mktemp("devices")
    (directory / "tree").mkdir()
    (directory / "tree" / "file").write_bytes(b"content" * 10_000)
    image, data = directory / "meta.erofs", directory / "data.blob"
    data.touch()
    command = [
        need("mkfs.erofs"),
        "--quiet",
        "--chunksize=4096",
        f"--blobdev={data}",
        image,
        directory / "tree",
    ]
    subprocess.run(command, check=True)
    return image, data


def layer_tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return out.getvalue()


# --- Nydus images ---


@pytest.mark.parametrize("tag", TAGS)
async def test_nydus_image_is_the_same_in_layout_and_registry(
    testdata: Path, nydusify: str, tag: str
) -> None:
    layout = testdata / "nydusify" / "layout"
    one, other = await find(f"oci:{layout}:{tag}"), await find(f"{nydusify}:{tag}")
    assert one.kind == other.kind == "rafs"
    assert one.digest == other.digest
    assert one.bootstrap == other.bootstrap
    assert one.bootstrap is not None
    assert one.bootstrap[1024:1028] == b"\xe2\xe1\xf5\xe0"
    assert one.blob_metas == other.blob_metas
    assert all(len(blob_id) == 64 and len(meta) % 4096 == 0 for blob_id, meta in one.blob_metas.items())
    assert other.ref == f"docker://{nydusify}:{tag}"
    assert other.backend.requests <= 8


async def test_index_leads_to_its_nydus_manifest(testdata: Path) -> None:
    found = await find(f"oci:{testdata / 'nydusify' / 'layout'}:index")
    assert found.digest == "sha256:5d7ff61c58bf2150a3e8c8d41b6280e8ad40d9700f8f4b2679cd7dbfc1e5b86d"


async def test_index_without_the_platform_says_what_there_is(testdata: Path) -> None:
    with pytest.raises(UnsupportedImage, match=r"linux/s390x.*linux/amd64"):
        await find(f"oci:{testdata / 'nydusify' / 'layout'}:index", platform="linux/s390x")


async def test_blobs_may_be_elsewhere(testdata: Path, nydusify: str, tmp_path: Path) -> None:
    layout = testdata / "nydusify" / "layout"
    found = await locate(f"{nydusify}:zstd", settings=SETTINGS, blobs=str(layout), platform="linux/amd64")
    blob_id = next(iter(found.blob_metas))
    assert found.backend.requests == 0
    assert await found.backend.size(blob_id) == (layout / "blobs" / "sha256" / blob_id).stat().st_size
    with pytest.raises(BlobNotFound, match="nowhere"):
        await find(f"{nydusify}:zstd", blobs=[str(tmp_path / "nowhere")])


async def test_data_blobs_come_from_the_same_repository(nydusify: str, testdata: Path) -> None:
    found = await locate(f"{nydusify}:zstd", settings=SETTINGS, platform="linux/amd64")
    for blob_id in found.blob_metas:
        stored = (testdata / "nydusify" / "layout" / "blobs" / "sha256" / blob_id).read_bytes()
        pieces = [p async for p in found.backend.stream(blob_id, Range(10, len(stored)))]
        assert b"".join(pieces) == stored[10:]
    await found.backend.aclose()


@pytest.mark.parametrize(
    ("tag", "problem"), [("zran", "zran"), ("source", "ordinary OCI image, not lazily mountable")]
)
async def test_other_kinds_are_refused_by_name(nydusify: str, tag: str, problem: str) -> None:
    with pytest.raises(UnsupportedImage, match=problem) as caught:
        await find(f"{nydusify}:{tag}")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("annotations", "problem"),
    [
        ({"containerd.io/snapshot/nydus-fs-version": "5"}, "RAFS v5"),
        ({"containerd.io/snapshot/nydus-fs-version": "7"}, "RAFS v7"),
        ({"containerd.io/snapshot/nydus-encrypted-blob": "true"}, "encrypted"),
    ],
)
async def test_annotations_tell_what_cannot_be_served(
    empty: Layout, annotations: dict[str, str], problem: str
) -> None:
    layer = empty.blob(b"", TAR, annotations=BOOTSTRAP | annotations)
    with pytest.raises(UnsupportedImage, match=problem):
        await find(empty.tag(empty.manifest(layer)))


async def test_encrypted_layers_are_refused_by_media_type(empty: Layout) -> None:
    with pytest.raises(UnsupportedImage, match="encrypted"):
        await find(empty.tag(empty.manifest(empty.blob(b"x", TAR + "+encrypted"))))


async def test_rafs_v5_is_refused_even_without_annotation(empty: Layout, testdata: Path) -> None:
    boot = (testdata / "nydusify" / "refuse" / "rafs-v5" / "boot").read_bytes()
    layer = empty.blob(gzip.compress(layer_tar({"image/image.boot": boot})), TAR, annotations=BOOTSTRAP)
    with pytest.raises(UnsupportedImage, match="RAFS v5"):
        await find(empty.tag(empty.manifest(layer)))


async def test_diff_id_must_agree(empty: Layout, testdata: Path) -> None:
    boot = (testdata / "nydus-texture" / "bootstrap" / "rafs-v6-2.2.boot").read_bytes()
    tar = layer_tar({"image.boot": boot})
    layer = empty.blob(gzip.compress(tar), TAR, annotations=BOOTSTRAP)
    right = "sha256:" + hashlib.sha256(tar).hexdigest()
    found = await find(empty.tag(empty.manifest(layer, diff_ids=[right]), "right"))
    assert found.bootstrap == boot
    with pytest.raises(BlobCorrupt, match="config says"):
        await find(empty.tag(empty.manifest(layer, diff_ids=["sha256:" + "0" * 64]), "wrong"))


@pytest.mark.parametrize("which", ["layer", "config", "manifest"])
async def test_content_that_has_another_digest_is_refused(testdata: Path, tmp_path: Path, which: str) -> None:
    layout = tmp_path / "layout"
    shutil.copytree(testdata / "nydusify" / "layout", layout)
    digest = {
        "manifest": "d165c42ed4b4078444f686e30b9911212ac6369150cdb7c7900db30f29434742",
        "config": "59bac5fbe22147606d853de74d257468bb3cf951d92689fc7be529e9ad6e157c",
        "layer": "9be6b8b8343147c131bd4b28f0890a718c1af66c0612bade69e2536a7812dda2",
    }[which]
    blob = layout / "blobs" / "sha256" / digest
    body = bytearray(blob.read_bytes())
    body[30] ^= 1
    blob.unlink()
    blob.write_bytes(body)
    with pytest.raises(BlobCorrupt, match=digest):
        await find(f"oci:{layout}:zstd")


# --- documents of other kinds ---


@pytest.mark.parametrize(
    "content",
    [
        {"schemaVersion": 1, "name": "x", "fsLayers": []},
        {"mediaType": "application/vnd.docker.distribution.manifest.v1+prettyjws"},
    ],
)
async def test_schema_1_is_refused_by_name(empty: Layout, content: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedImage, match="schema 1"):
        await find(empty.tag(empty.blob(json.dumps(content).encode(), MANIFEST)))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"layers": 5}',
        b'{"layers": []}',
        b'{"layers": [{"digest": "sha256:zz", "size": 1}]}',
        b'{"layers": [{"digest": "sha256:' + b"0" * 64 + b'", "size": -1}]}',
        b'{"layers": ' + b"[" * 100_000,
        b"\xff{}",
    ],
)
async def test_broken_manifests_are_corrupt(empty: Layout, body: bytes) -> None:
    with pytest.raises(CorruptImage):
        await find(empty.tag(empty.blob(body, MANIFEST)))


async def test_indexes_within_indexes_are_searched_for_a_tag(empty: Layout, erofs: Path) -> None:
    manifest = empty.manifest(empty.blob(erofs.read_bytes(), EROFS))
    manifest["annotations"] = {"org.opencontainers.image.ref.name": "inner"}
    empty.tag(empty.document({"manifests": [manifest]}, INDEX), "outer")
    found = await find(f"oci:{empty.path}:inner")
    assert found.digest == manifest["digest"]
    with pytest.raises(BlobNotFound) as caught:
        await find(f"oci:{empty.path}:none")
    assert "outer" in caught.value.hint


async def test_layout_with_one_image_needs_no_tag(empty: Layout, erofs: Path) -> None:
    empty.tag(empty.manifest(empty.blob(erofs.read_bytes(), EROFS)))
    assert (await find(f"oci:{empty.path}")).kind == "erofs"
    empty.tag(empty.manifest(empty.blob(b"other", EROFS)), "u")
    with pytest.raises(UsageError) as caught:
        await find(f"oci:{empty.path}")
    assert caught.value.hint == "it has: t, u"


# --- plain EROFS ---


async def check_erofs(found: Located, image: Path) -> None:
    """*found* is *image*, and its backend, also when opened anew, gives its bytes."""
    assert found.kind == "erofs"
    assert found.bootstrap is None
    assert found.primary is not None
    assert found.primary in found.pins
    for _ in range(2):
        backend = open_source(found.ref, settings=SETTINGS, pins=found.pins)
        size = image.stat().st_size
        assert await backend.size(found.primary) == size
        pieces = [p async for p in backend.stream(found.primary, Range(5, size))]
        assert b"".join(pieces) == image.read_bytes()[5:]
        await backend.aclose()


@pytest.mark.parametrize("media_type", [EROFS, "application/vnd.erofs", "application/octet-stream", ""])
async def test_erofs_layer_is_found_by_type_or_by_its_bytes(
    empty: Layout, erofs: Path, media_type: str, registry: RegistryServer
) -> None:
    layer = empty.blob(erofs.read_bytes(), media_type)
    found = await find(empty.tag(empty.manifest(layer)))
    await check_erofs(found, erofs)
    assert found.pins == {layer["digest"][7:]: f"{layer['digest']} size={layer['size']}"}
    pushed = registry.push_layout(empty.path, "t", "erofs")
    await check_erofs(await find(pushed), erofs)


async def test_other_layers_are_devices_in_their_order(empty: Layout, two_devices: tuple[Path, Path]) -> None:
    meta, data = two_devices
    device = empty.blob(data.read_bytes(), EROFS)
    primary = empty.blob(meta.read_bytes(), EROFS)
    found = await find(empty.tag(empty.manifest(device, primary)))
    assert found.primary == primary["digest"][7:]
    assert found.devices == (device["digest"][7:],)
    assert set(found.pins) == {found.primary, *found.devices}


async def test_layers_that_are_to_be_stacked_are_refused(empty: Layout, erofs: Path) -> None:
    layers = [empty.blob(erofs.read_bytes(), EROFS), empty.blob(erofs.read_bytes() + bytes(4096), EROFS)]
    with pytest.raises(UnsupportedImage, match="2 layers"):
        await find(empty.tag(empty.manifest(*layers)))


@pytest.mark.parametrize(
    ("media_type", "problem"),
    [("application/octet-stream", "no EROFS image"), (EROFS + "+zstd", "compressed as a whole")],
)
async def test_opaque_layer_that_is_none_is_refused(empty: Layout, media_type: str, problem: str) -> None:
    with pytest.raises(UnsupportedImage, match=problem):
        await find(empty.tag(empty.manifest(empty.blob(bytes(8192), media_type))))


async def test_layer_of_another_size_than_the_manifest_says_is_refused(empty: Layout, erofs: Path) -> None:
    layer = empty.blob(erofs.read_bytes(), EROFS)
    layer["size"] -= 1
    with pytest.raises(BlobCorrupt, match="bytes"):
        await find(empty.tag(empty.manifest(layer)))


async def test_single_files_are_pinned_by_what_the_file_system_says(erofs: Path, tmp_path: Path) -> None:
    image = tmp_path / "x.erofs"
    shutil.copy(erofs, image)
    for reference in (str(image), f"file:{image}"):
        found = await find(reference)
        await check_erofs(found, image)
        assert found.primary is not None
    os.utime(image, ns=(1, 1))
    backend = open_source(found.ref, settings=SETTINGS, pins=found.pins)
    with pytest.raises(BlobCorrupt, match="changed at the source"):
        await backend.size(found.primary)


async def test_devices_of_a_single_file_are_named_one_by_one(two_devices: tuple[Path, Path]) -> None:
    meta, data = two_devices
    found = await locate(str(meta), settings=SETTINGS, blobs=[str(data)])
    assert len(found.devices) == 1
    pieces = [p async for p in found.backend.stream(found.devices[0], Range(0, 4096))]
    assert b"".join(pieces) == data.read_bytes()[:4096]
    assert set(found.pins) == {found.primary, *found.devices}
    with pytest.raises(UsageError) as caught:
        await find(str(meta))
    assert "--blobs" in caught.value.hint
    with pytest.raises(UsageError, match="1 more devices"):
        await find(str(meta), blobs=[str(data), str(meta)])


async def test_image_behind_a_url_is_pinned_by_its_etag(origin: Origin, erofs: Path) -> None:
    url = f"{origin.url}/x.erofs"
    origin.objects["/x.erofs"] = erofs.read_bytes()
    origin.etags["/x.erofs"] = '"v1"'
    found = await find(url)
    await check_erofs(found, erofs)
    assert found.pins == {url_id(url): f'size={erofs.stat().st_size} etag="v1"'}
    origin.etags["/x.erofs"] = '"v2"'
    backend = open_source(url, settings=SETTINGS, pins=found.pins)
    with pytest.raises(BlobCorrupt, match="changed"):
        await backend.size(url_id(url))
    await backend.aclose()


# --- single bootstraps ---


async def test_loose_nydus_files_are_read_with_blobs(testdata: Path, origin: Origin) -> None:
    boot = testdata / "nydus-texture" / "bootstrap" / "rafs-v6-2.2.boot"
    blobs = testdata / "nydus-texture" / "blobs"
    [blob] = blobs.iterdir()
    origin.objects = {f"/b/{blob.name}": blob.read_bytes(), "/boot": boot.read_bytes()}
    for reference in (f"file:{boot}", f"{origin.url}/boot"):
        for place in (str(blobs), str(blob), f"{origin.url}/b", f"{origin.url}/b/"):
            found = await locate(reference, settings=SETTINGS, blobs=place)
            assert found.bootstrap == boot.read_bytes()
            assert await found.backend.size(blob.name) == blob.stat().st_size
            await found.backend.aclose()
    with pytest.raises(UsageError) as caught:
        await find(f"file:{boot}")
    assert "--blobs" in caught.value.hint


async def test_blob_that_holds_its_own_bootstrap_is_enough(testdata: Path) -> None:
    # Expected values: nydus-texture/README.md, 3.2.
    blob_id = "2fa78cad554b75ac91a4a125ed148d0ddeb25efa4aaa8bd80e5dc292690a4dca"
    path = testdata / "nydus-texture" / "toc" / blob_id
    found = await locate(f"file:{path}", settings=SETTINGS)
    assert found.kind == "rafs"
    assert found.bootstrap is not None
    assert hashlib.sha256(found.bootstrap).hexdigest() == (
        "d85f1b77aab4849b34ffc447fee67a46ae9eb2af8533bf5faa62224df1796871"
    )
    assert found.primary == blob_id
    assert await found.backend.size(blob_id) == path.stat().st_size == 10034


async def test_what_is_no_image_is_refused(tmp_path: Path, testdata: Path, origin: Origin) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("hello" * 5000)
    origin.objects["/text"] = b"hello"
    v5 = testdata / "nydusify" / "refuse" / "rafs-v5" / "boot"
    for reference in (f"{tmp_path}/empty", f"{tmp_path}/text", f"{origin.url}/text", f"file:{v5}"):
        with pytest.raises(ImageRefused):
            await find(reference)
    with pytest.raises(UsageError, match="directory"):
        await find(str(tmp_path))
    with pytest.raises(BlobNotFound):
        await find(f"{tmp_path}/nothing")


@pytest.mark.parametrize("reference", ["s3://bucket/key", "oci-archive:/x.tar", "docker-archive:/x.tar:t"])
async def test_what_is_known_but_not_mounted_is_a_matter_of_usage(reference: str) -> None:
    with pytest.raises(UsageError) as caught:
        await find(reference)
    assert caught.value.hint


async def test_source_that_is_not_there_is_given_up_soon() -> None:
    with pytest.raises(BackendTemporary):
        await find("docker://127.0.0.1:1/app:t")


# --- the bootstrap layer ---

Pack = Callable[[bytes], bytes]


def members(body: bytes) -> bytes:
    half = len(body) // 2
    return gzip.compress(body[:half]) + gzip.compress(body[half:]) + bytes(512)


@pytest.mark.parametrize("pack", [gzip.compress, members, zstandard.compress, bytes])
def test_layer_may_be_packed_in_any_way(pack: Pack) -> None:
    boot = os.urandom(300_000) + bytes(300_000)
    tar = layer_tar({"image/x": b"", "image/image.boot": boot, "image/abc.blob.meta": b"meta"})
    found = unpack_bootstrap_layer(pack(tar), "layer")
    assert (found.bootstrap, found.blob_metas) == (boot, {"abc": b"meta"})
    assert found.diff_id == "sha256:" + hashlib.sha256(tar).hexdigest()


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, bytes])
def test_damaged_layer_is_corrupt_wherever_it_is_cut(pack: Pack) -> None:
    layer = pack(layer_tar({"image/image.boot": os.urandom(20_000)}))
    for cut in (1, 2, 5, 100, 10_000, 20_000):
        with pytest.raises(CorruptImage):
            unpack_bootstrap_layer(layer[:cut], "layer")


def test_layer_without_bootstrap_or_with_a_link_for_one_is_corrupt() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("image/image.boot")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    for tar in (out.getvalue(), layer_tar({"other/image.boot": b"x"})):
        with pytest.raises(CorruptImage):
            unpack_bootstrap_layer(gzip.compress(tar), "layer")


def test_bomb_is_defused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstraplayer, "RATIO_FREE", 1 << 20)
    bomb = layer_tar({"image/image.boot": bytes(8 << 20)})
    for pack in (gzip.compress, zstandard.compress):
        with pytest.raises(CorruptImage, match="grows to more than"):
            unpack_bootstrap_layer(pack(bomb), "layer")
    monkeypatch.setattr(bootstraplayer, "UNPACKED_MAX", 1 << 20)
    with pytest.raises(CorruptImage, match="grows to more than"):
        unpack_bootstrap_layer(layer_tar({"image/image.boot": os.urandom(2 << 20)}), "layer")
