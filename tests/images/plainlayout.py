"""Plain EROFS images of mkfs.erofs in OCI layouts, as other people's tools publish them."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

from erofsd.quickstart.registry import REF_NAME

LAYER_TYPE = "application/vnd.erofs.layer.v1"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.empty.v1+json"
TAG = "plain"


def run_mkfs(image: Path, tree: Path) -> None:
    """Make an uncompressed EROFS image of *tree*, its metadata apart from data."""
    options = ["--quiet", "--preserve-mtime", "--all-root", "-Enoinline_data"]
    subprocess.run(["mkfs.erofs", *options, image, tree], check=True)


def make_layout(layout: Path, image: Path) -> None:
    """Move the EROFS image *image* into a new OCI layout, as the one layer of an artifact tagged `TAG`."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    with image.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = image.stat().st_size
    image.rename(blobs / digest)
    config = _put(blobs, b"{}")
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": LAYER_TYPE,
        "config": {"mediaType": CONFIG_TYPE, **config},
        "layers": [{"mediaType": LAYER_TYPE, "digest": f"sha256:{digest}", "size": size}],
    }
    described = {
        "mediaType": MANIFEST_TYPE,
        **_put(blobs, json.dumps(manifest).encode()),
        "annotations": {REF_NAME: TAG},
    }
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def _put(blobs: Path, content: bytes) -> dict[str, str | int]:
    digest = hashlib.sha256(content).hexdigest()
    (blobs / digest).write_bytes(content)
    return {"digest": f"sha256:{digest}", "size": len(content)}
