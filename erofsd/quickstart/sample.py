"""A sample image of real files that every machine with Python has: Python's own library."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from erofsd.errors import ErofsdError
from erofsd.quickstart.registry import REF_NAME

LAYER_TYPE = "application/vnd.erofs.layer.v1"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.empty.v1+json"
TAG = "sample"

#: Not part of the library itself, or of no use to a program that only imports.
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test")


@dataclass(frozen=True, slots=True)
class Sample:
    """The sample image in an OCI layout.

    Attributes:
        tree: What the image was made from.
        layout: The OCI layout directory; the image's tag is `TAG`.
        image_size: Size of the EROFS image in bytes.
        files: Regular files in it.
    """

    tree: Path
    layout: Path
    image_size: int
    files: int


def make_sample(directory: Path) -> Sample:
    """Make the sample image below *directory*.

    Raises:
        ErofsdError: mkfs.erofs is missing or fails.
    """
    tree = directory / "tree"
    files = copy_library(Path(sysconfig.get_path("stdlib")), tree / "python")
    image = directory / "sample.erofs"
    run_mkfs(image, tree)
    layout = directory / "layout"
    size = image.stat().st_size
    make_layout(layout, image)
    return Sample(tree, layout, size, files)


def copy_library(source: Path, target: Path) -> int:
    """Copy the Python library in *source*; returns the number of regular files."""

    def left_out(directory: str, names: list[str]) -> list[str]:
        return [n for n in names if n in LEFT_OUT or os.path.islink(os.path.join(directory, n))]

    shutil.copytree(source, target, ignore=left_out)
    return sum(len(names) for _, _, names in os.walk(target))


def run_mkfs(image: Path, tree: Path) -> None:
    """Make an uncompressed EROFS image of *tree*.

    Raises:
        ErofsdError: mkfs.erofs is missing or fails.
    """
    program = shutil.which("mkfs.erofs")
    if program is None:
        raise ErofsdError("mkfs.erofs is not installed", hint="apt-get install erofs-utils")
    # Tails stay out of the inodes: what has to be there before the mount is then inodes and names only. The
    # times of files stay: Python compares a source's with what its bytecode says.
    options = ["--quiet", "--preserve-mtime", "--all-root", "-Enoinline_data"]
    command = [program, *options, str(image), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ErofsdError(f"mkfs.erofs failed with {done.returncode}: {done.stderr.strip()[-300:]}")


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
