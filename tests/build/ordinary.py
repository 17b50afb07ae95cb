"""Ordinary images to convert: OCI layouts made of tars, and running the program on them."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erofsd.cli import main
from tests.build import tars

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
AMD64 = {"architecture": "amd64", "os": "linux"}


@dataclass
class Layout:
    """An OCI layout that grows."""

    path: Path
    manifests: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.path / "blobs" / "sha256").mkdir(parents=True)
        (self.path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        self._write_index()

    def blob(self, body: bytes, media_type: str, **more: Any) -> dict[str, Any]:
        """Store *body*; its descriptor."""
        name = hashlib.sha256(body).hexdigest()
        (self.path / "blobs" / "sha256" / name).write_bytes(body)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(body), **more}

    def layer(self, tar: bytes, **more: Any) -> dict[str, Any]:
        """A gzip layer."""
        return self.blob(gzip.compress(tar, 1, mtime=0), LAYER_TYPE, **more)

    def image(
        self,
        tag: str | None,
        *tar: bytes,
        config: dict[str, Any] | None = None,
        layers: list[dict[str, Any]] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """An image of layers that are tars, or of *layers*; its descriptor."""
        descriptors = [self.layer(t) for t in tar] if layers is None else layers
        diff_ids = [f"sha256:{hashlib.sha256(t).hexdigest()}" for t in tar]
        full = {
            **AMD64,
            "config": {"Cmd": ["/bin/true"], "Labels": {"a": "ü"}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [{"created_by": f"layer {n}"} for n in range(len(descriptors))],
            **(config or {}),
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": self.blob(json.dumps(full).encode(), CONFIG_TYPE),
            "layers": descriptors,
        }
        return self.document(tag, manifest, **more)

    def index(self, tag: str, *members: dict[str, Any], **more: Any) -> dict[str, Any]:
        """An index."""
        body = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": list(members), **more}
        return self.document(tag, body)

    def document(self, tag: str | None, body: dict[str, Any], **more: Any) -> dict[str, Any]:
        """A manifest or index; with *tag* it is to be found in the layout by that."""
        descriptor = self.blob(json.dumps(body).encode(), body["mediaType"], **more)
        if tag is not None:
            named = {**descriptor, "annotations": {"org.opencontainers.image.ref.name": tag}}
            self.manifests.append(named)
            self._write_index()
        return descriptor

    def ref(self, tag: str) -> str:
        """``oci:DIR:TAG``."""
        return f"oci:{self.path}:{tag}"

    def read(self, digest: str) -> bytes:
        """A blob."""
        return (self.path / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()

    def manifest(self, tag: str) -> dict[str, Any]:
        """The manifest or index that has *tag* now."""
        index = json.loads((self.path / "index.json").read_text())
        for entry in index["manifests"]:
            if entry.get("annotations", {}).get("org.opencontainers.image.ref.name") == tag:
                found: dict[str, Any] = json.loads(self.read(entry["digest"]))
                return found
        raise KeyError(tag)

    def _write_index(self) -> None:
        index = {"schemaVersion": 2, "manifests": self.manifests}
        (self.path / "index.json").write_text(json.dumps(index))


def tree_tar(*entries: bytes) -> bytes:
    """A whole tar."""
    return b"".join(entries) + tars.END


@dataclass(frozen=True)
class Done:
    """A command that was run."""

    returncode: int
    stdout: str
    stderr: str


def erofsd(*argv: object, check: bool = True) -> Done:
    """Run a command; in this process, which saves starting Python."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(arg) for arg in argv])
    done = Done(code, out.getvalue(), err.getvalue())
    if check:
        assert done.returncode == 0, done.stderr
    return done


def convert(*argv: object) -> dict[str, Any]:
    """Run ``erofsd convert``; what it says it did."""
    found: dict[str, Any] = json.loads(erofsd("convert", "--json", *argv).stdout)
    return found


def facts(*argv: object) -> dict[str, dict[str, Any]]:
    """Every entry of an image, by path."""
    lines = erofsd("inspect", "--files", "--digests", "--json", *argv).stdout.splitlines()
    return {fact["path"]: fact for fact in map(json.loads, lines)}
