"""Real Nydus images of ../shared/testdata, for tests of their readers."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import blake3

from erofsd.blobs.layout import BlobLayout
from erofsd.codecs.base import CODECS
from erofsd.images.erofs.reader import ReadDevice
from erofsd.images.rafs6.blobmeta import parse_blob_meta, usable
from erofsd.images.rafs6.bootstrap import Bootstrap, parse_bootstrap
from erofsd.images.rafs6.layout import build_layouts
from ondemand.ranges import Range

TAGS = ("zstd", "lz4-128k", "batch", "dict")


def layer_files(testdata: Path, tag: str) -> dict[str, bytes]:
    """The files in the bootstrap layer of nydusify's image *tag*, by base name."""
    layout = testdata / "nydusify" / "layout"
    manifest = _manifest(layout, tag)
    layer = _blob(layout, manifest["layers"][-1]["digest"])
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        files = {m.name: archive.extractfile(m) for m in archive if m.isfile()}
        return {name.rpartition("/")[2]: file.read() for name, file in files.items() if file}


def blob_files(testdata: Path, blob_ids: Sequence[str]) -> dict[str, bytes]:
    """Data blobs of nydusify's images, whole, by id."""
    store = testdata / "nydusify" / "layout" / "blobs" / "sha256"
    return {blob_id: (store / blob_id).read_bytes() for blob_id in blob_ids}


def _manifest(layout: Path, tag: str) -> dict[str, Any]:
    index = json.loads((layout / "index.json").read_text())
    for entry in index["manifests"]:
        if entry["annotations"]["org.opencontainers.image.ref.name"] == tag:
            return json.loads(_blob(layout, entry["digest"]))
    raise KeyError(tag)


def _blob(layout: Path, digest: str) -> bytes:
    return (layout / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()


def big_bootstrap(testdata: Path) -> bytes:
    """The bootstrap of a Linux root file system of 3517 inodes, made in 2022."""
    path = testdata / "nydus-texture" / "snapshotter" / "v6-bootstrap-chunk-pos-438272.tar.gz"
    with tarfile.open(path) as archive:
        file = archive.extractfile("image/image.boot")
        assert file
        return file.read()


def layouts_of(
    bootstrap: Bootstrap, files: Mapping[str, bytes], blobs: Mapping[str, bytes]
) -> tuple[BlobLayout, ...]:
    """Layouts from shipped blob.meta files where they are good, else from the blobs themselves."""
    metas = []
    for entry in bootstrap.blobs:
        data = files.get(f"{entry.blob_id}.blob.meta", b"")
        if not usable(entry, data):
            offset, length = entry.meta_range
            data = blobs[entry.blob_id][offset : offset + length]
        metas.append(parse_blob_meta(entry.blob_id, entry, data))
    return build_layouts(bootstrap, metas)


def opened(testdata: Path, tag: str) -> tuple[Bootstrap, tuple[BlobLayout, ...], ReadDevice]:
    """nydusify's image *tag*: bootstrap, layouts, and how to read its blobs."""
    files = layer_files(testdata, tag)
    bootstrap = parse_bootstrap(tag, files["image.boot"])
    blobs = blob_files(testdata, [blob.blob_id for blob in bootstrap.blobs])
    layouts = layouts_of(bootstrap, files, blobs)
    return bootstrap, layouts, decoder(layouts, blobs)


def decoder(layouts: Sequence[BlobLayout], blobs: Mapping[str, bytes]) -> ReadDevice:
    """Decode chunks straight from the stored blobs, by nothing but the layouts; every chunk is verified."""

    def read(device: int, want: Range) -> bytes:
        layout = layouts[device - 1]
        out = bytearray(len(want))
        for chunk in layout.chunks_in(want):
            data = _chunk(layout, chunk, blobs[layout.blob_id])
            here = layout.chunk_range(chunk)
            start, stop = max(here.start, want.start), min(here.stop, want.stop)
            out[start - want.start : stop - want.start] = data[start - here.start : stop - here.start]
        return bytes(out)

    return read


def _chunk(layout: BlobLayout, chunk: int, blob: bytes) -> bytes:
    assert layout.stated[chunk], "a file uses a chunk that the image does not state"
    unit = layout.chunk_unit[chunk]
    stored = blob[layout.unit_offset[unit] :][: layout.unit_stored[unit]]
    decoded = bytearray(layout.unit_size[unit])
    codec = layout.codec if layout.unit_packed[unit] else "none"
    CODECS[codec]().decompress_into(memoryview(stored), memoryview(decoded))
    data = bytes(decoded[layout.chunk_at[chunk] :][: layout.chunk_size[chunk]])
    digest = hashlib.sha256(data) if layout.digester == "sha256" else blake3.blake3(data)
    assert digest.digest() == layout.digest(chunk)
    return data
