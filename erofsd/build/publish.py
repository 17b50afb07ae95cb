"""Images as registries hold them: configs, manifests and indexes, of Nydus and of ordinary images; pushing.

Sources: rafs-v6 6.1 (what nydusify demands), 7.1, 7.2, 7.4; opencontainers/image-spec manifest.md,
image-index.md, config.md; opencontainers/distribution-spec, "Referrers Tag Schema".
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import erofsd
from erofsd.backends.documents import INDEX_TYPES, MANIFEST_TYPES, digest_of
from erofsd.backends.manifest import (
    NYDUS_ARTIFACT,
    NYDUS_BLOB,
    NYDUS_BLOB_TYPE,
    NYDUS_BOOTSTRAP,
    NYDUS_FS_VERSION,
)
from erofsd.backends.push import Content, ImageTarget, Tell
from erofsd.build.deflate import PIECE_SIZE, GzipWriter
from erofsd.errors import BlobNotFound, CorruptImage

MANIFEST_TYPE = MANIFEST_TYPES[0]
INDEX_TYPE = INDEX_TYPES[0]
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
GZIP_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
EROFS_LAYER_TYPE = "application/vnd.erofs.layer.v1"
NYDUS_SOURCE_DIGEST = "containerd.io/snapshot/nydus-source-digest"
NYDUS_SOURCE_REFERENCE = "containerd.io/snapshot/nydus-source-reference"
NYDUS_BUILDER = "containerd.io/snapshot/nydus-builder-version"
_NYDUS_PREFIX = "containerd.io/snapshot/nydus-"

UPLOADS_AT_ONCE = 3
_BOOTSTRAP_COMMENT = "Nydus Bootstrap Layer"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """Content and the descriptor that names it.

    Attributes:
        content: A file, or the bytes.
        mounts: Repositories of the destination's registry that may have it already.
    """

    media_type: str
    digest: str
    size: int
    content: Content
    annotations: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[str, ...] = ()

    @classmethod
    def of(cls, media_type: str, content: bytes) -> Stored:
        """Bytes, named by their digest."""
        return cls(media_type, digest_of(content), len(content), content)

    @property
    def descriptor(self) -> Json:
        """As it stands in a manifest."""
        found: Json = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        return found


@dataclass(frozen=True, slots=True)
class ReadyImage:
    """An image, complete but for being stored.

    Attributes:
        contents: Config and layers.
        platform: Of its entry in an index, as the source has it.
        annotations: Of its entry in an index.
    """

    manifest: bytes
    contents: tuple[Stored, ...]
    platform: Json | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of the manifest."""
        return digest_of(self.manifest)


# --- layers ---


def data_layer(blob_id: str, size: int, content: Content, mounts: Iterable[str] = ()) -> Stored:
    """A data blob as a layer."""
    return Stored(NYDUS_BLOB_TYPE, f"sha256:{blob_id}", size, content, {NYDUS_BLOB: "true"}, tuple(mounts))


def bootstrap_layer(
    bootstrap: Path, blob_metas: Mapping[str, bytes], path: Path, threads: int
) -> tuple[Stored, str]:
    """The last layer of a Nydus image, written to *path*. Blocks.

    Args:
        blob_metas: ``.blob.meta`` files by blob id.

    Returns:
        It, and its diff_id.
    """
    with path.open("wb") as file, GzipWriter(file, threads) as gzip:
        gzip.write(_tar_header("image", 0o755, None))
        with bootstrap.open("rb") as source:
            _add_file(gzip, "image/image.boot", source, os.fstat(source.fileno()).st_size)
        for blob_id, meta in sorted(blob_metas.items()):
            _add_file(gzip, f"image/{blob_id}.blob.meta", io.BytesIO(meta), len(meta))
        gzip.write(bytes(2 * tarfile.BLOCKSIZE))
    annotations = {NYDUS_BOOTSTRAP: "true", NYDUS_FS_VERSION: "6"}
    return Stored(GZIP_LAYER_TYPE, gzip.digest, gzip.size, path, annotations), gzip.content_digest


def _add_file(gzip: GzipWriter, name: str, source: BinaryIO, size: int) -> None:
    gzip.write(_tar_header(name, 0o444, size))
    while piece := source.read(PIECE_SIZE):
        gzip.write(piece)
    gzip.write(bytes(-size % tarfile.BLOCKSIZE))


def _tar_header(name: str, mode: int, size: int | None) -> bytes:
    info = tarfile.TarInfo(name)
    info.mode, info.type, info.size = mode, tarfile.DIRTYPE, 0
    if size is not None:
        info.type, info.size = tarfile.REGTYPE, size
    return info.tobuf(tarfile.GNU_FORMAT)


# --- configs and manifests ---


def parse_json(body: bytes, name: str) -> Json:
    """A JSON object, with all that we do not know in it.

    Raises:
        CorruptImage: It is none.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise CorruptImage(f"{name}: not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise CorruptImage(f"{name}: not a JSON object")
    return value


def encode_json(value: Json) -> bytes:
    """One way to write it, so that equal values have equal digests."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def new_config(platform: str) -> Json:
    """The config of an image that has none, for ``os/architecture[/variant]``."""
    os, _, rest = platform.partition("/")
    architecture, _, variant = rest.partition("/")
    config: Json = {"architecture": architecture, "os": os, "config": {}}
    if variant:
        config["variant"] = variant
    return config


def nydus_config(config: Json, diff_ids: Sequence[str]) -> bytes:
    """*config* for other layers: everything else stays. Source: nydus-snapshotter pkg/converter."""
    history = [
        *_list(config.get("history")),
        {"created_by": "Nydus Converter", "comment": _BOOTSTRAP_COMMENT},
    ]
    return encode_json(_with_layers(config, diff_ids, history))


def plain_config(config: Json, diff_id: str) -> bytes:
    """*config* of a Nydus image for one ordinary layer."""
    # As many items without empty_layer as there are layers: image-spec, config.md.
    kept = [
        {**item, "empty_layer": True}
        for item in _list(config.get("history"))
        if isinstance(item, dict) and item.get("comment") != _BOOTSTRAP_COMMENT
    ]
    return encode_json(_with_layers(config, [diff_id], [*kept, {"created_by": "erofsd convert --to oci"}]))


def _with_layers(config: Json, diff_ids: Sequence[str], history: list[Any]) -> Json:
    rootfs = {"type": "layers", "diff_ids": list(diff_ids)}
    return {**config, "rootfs": rootfs, "history": history}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def nydus_image(
    config: Json,
    data: Sequence[Stored],
    bootstrap: Stored,
    diff_id: str,
    *,
    annotations: Mapping[str, str],
    subject: Json | None = None,
) -> ReadyImage:
    """A Nydus image.

    Args:
        config: Of its source.
        data: Data layers; every blob that the bootstrap names is among them.
        diff_id: Of the bootstrap layer.
        annotations: Of the manifest.
        subject: Descriptor of the source, to be found from there.
    """
    body = nydus_config(config, [*(layer.digest for layer in data), diff_id])
    manifest: Json = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE}
    if subject is not None:
        manifest["artifactType"] = NYDUS_ARTIFACT
    return _image(manifest, body, (*data, bootstrap), annotations, subject)


def erofs_layer(path: Path) -> Stored:
    """A plain EROFS image as a layer. Blocks."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Stored(EROFS_LAYER_TYPE, f"sha256:{digest}", path.stat().st_size, path)


def erofs_image(config: Json, layer: Stored, annotations: Mapping[str, str]) -> ReadyImage:
    """An image whose only layer is a plain EROFS image."""
    history = [*_list(config.get("history")), {"created_by": "erofsd build"}]
    body = encode_json(_with_layers(config, [layer.digest], history))
    kept = {key: value for key, value in annotations.items() if not key.startswith(_NYDUS_PREFIX)}
    return _image({"schemaVersion": 2, "mediaType": MANIFEST_TYPE}, body, (layer,), kept, None)


def plain_image(config: bytes, layer: Stored, annotations: Mapping[str, str]) -> ReadyImage:
    """An image of one layer that is no Nydus image."""
    kept = {key: value for key, value in annotations.items() if not key.startswith(_NYDUS_PREFIX)}
    return _image({"schemaVersion": 2, "mediaType": MANIFEST_TYPE}, config, (layer,), kept, None)


def _image(
    manifest: Json,
    config: bytes,
    layers: Sequence[Stored],
    annotations: Mapping[str, str],
    subject: Json | None,
) -> ReadyImage:
    stored = Stored.of(CONFIG_TYPE, config)
    manifest["config"] = stored.descriptor
    manifest["layers"] = [layer.descriptor for layer in layers]
    if subject is not None:
        manifest["subject"] = subject
    if annotations:
        manifest["annotations"] = dict(sorted(annotations.items()))
    return ReadyImage(encode_json(manifest), (stored, *layers))


def converted_annotations(
    source: Mapping[str, str], digest: str | None, reference: str | None
) -> dict[str, str]:
    """Annotations of a converted manifest: its source's, and where it comes from.

    Args:
        source: Of the source's manifest.
        digest: Of the source's manifest.
        reference: Of the source, where it means something elsewhere.
    """
    found = {key: value for key, value in source.items() if not key.startswith(_NYDUS_PREFIX)}
    found[NYDUS_BUILDER] = f"erofsd {erofsd.__version__}"
    found[NYDUS_FS_VERSION] = "6"
    if digest is not None:
        found[NYDUS_SOURCE_DIGEST] = digest
    if reference is not None:
        found[NYDUS_SOURCE_REFERENCE] = reference
    return found


def image_index(
    images: Sequence[ReadyImage], annotations: Mapping[str, str], subject: Json | None = None
) -> bytes:
    """An index of *images*, each with its platform."""
    entries = []
    for image in images:
        entry: Json = {"mediaType": MANIFEST_TYPE, "digest": image.digest, "size": len(image.manifest)}
        if image.annotations:
            entry["annotations"] = dict(image.annotations)
        if image.platform is not None:
            entry["platform"] = image.platform
        entries.append(entry)
    index: Json = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}
    if subject is not None:
        index["artifactType"] = NYDUS_ARTIFACT
        index["subject"] = subject
    if annotations:
        index["annotations"] = dict(annotations)
    return encode_json(index)


def with_platform(config: Json) -> Json:
    """The platform that *config* states, as an index names it."""
    keys = ("architecture", "os", "os.version", "os.features", "variant")
    return {key: config[key] for key in keys if config.get(key)}


# --- pushing ---


@dataclass(slots=True)
class Published:
    """What publishing came to; sizes in bytes.

    Attributes:
        digest: Of what the tag names.
        present_bytes: Of blobs that were there already, or came from another repository there.
    """

    digest: str
    uploaded_bytes: int = 0
    present_bytes: int = 0


def total_size(images: Iterable[ReadyImage]) -> int:
    """Bytes of all distinct contents of *images*."""
    return sum(stored.size for stored in _distinct(images).values())


async def publish(
    target: ImageTarget,
    images: Sequence[ReadyImage],
    index: bytes | None,
    tag: str | None,
    tell: Tell = lambda size: None,
) -> Published:
    """Store *images*: contents first, then manifests, then what gets the tag. A rerun sends what is missing.

    Args:
        index: Names all *images* and gets the tag; None: there is one image, which gets it.
        tag: None: nothing gets one, all are to be found by digest.

    Raises:
        SourceError, BlobCorrupt: As ImageTarget. Nothing that could be pulled is left behind.
    """
    published = Published(digest_of(index) if index is not None else images[0].digest)
    await _push_contents(target, images, published, tell)
    for image in images:
        await _push_manifest(target, image.manifest, MANIFEST_TYPE, tag if index is None else None)
    if index is not None:
        await _push_manifest(target, index, INDEX_TYPE, tag)
    return published


async def _push_contents(
    target: ImageTarget, images: Sequence[ReadyImage], published: Published, tell: Tell
) -> None:
    waiting = iter(_distinct(images).values())

    async def work() -> None:
        for stored in waiting:
            if await target.provide(stored.digest, stored.size, stored.mounts):
                published.present_bytes += stored.size
                tell(stored.size)
            else:
                await target.push_blob(stored.digest, stored.size, stored.content, tell)
                published.uploaded_bytes += stored.size

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(UPLOADS_AT_ONCE):
                group.create_task(work())
    except BaseExceptionGroup as exc:
        raise exc.exceptions[0] from exc


def _distinct(images: Iterable[ReadyImage]) -> dict[str, Stored]:
    return {stored.digest: stored for image in images for stored in image.contents}


async def _push_manifest(target: ImageTarget, body: bytes, media_type: str, tag: str | None) -> None:
    known = await target.push_manifest(body, media_type, tag)
    document = parse_json(body, target.name)
    if (subject := document.get("subject")) and not known:
        await _list_referrer(target, subject["digest"], body, document)


async def _list_referrer(target: ImageTarget, subject: str, body: bytes, document: Json) -> None:
    """Keep the index of what refers to *subject* ourselves, under the tag that readers look for."""
    tag = subject.replace(":", "-", 1)
    try:
        found = parse_json((await target.fetch_document(tag)).body, f"{target.name}:{tag}")
    except BlobNotFound:
        found = {}
    entry: Json = {"mediaType": document["mediaType"], "digest": digest_of(body), "size": len(body)}
    entry["artifactType"] = document.get("artifactType") or document["config"]["mediaType"]
    if annotations := document.get("annotations"):
        entry["annotations"] = annotations
    others = [m for m in _list(found.get("manifests")) if m.get("digest") != entry["digest"]]
    index: Json = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [*others, entry]}
    await target.push_manifest(encode_json(index), INDEX_TYPE, tag)
