"""Images in one tar file, ``oci-archive:`` and ``docker-archive:``, read in place.

An OCI archive is a layout in a tar. A docker archive has a list of its own: which file is the config, which
files are the layers, most often without compression; the manifest is made up from that.

Sources: opencontainers/image-spec, image-layout.md; moby image/spec/spec.md, "Combined Image JSON +
Filesystem Changeset Format"; containers/image docker/internal/tarfile.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import posixpath
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from erofsd.backends.documents import (
    CONFIG_MAX,
    INDEX_MAX,
    Document,
    checked_document,
    digest_of,
    parse_config,
)
from erofsd.backends.localfs import PIECE_SIZE, LocalBackend, Place, translate
from erofsd.backends.ocilayout import LayoutBackend
from erofsd.backends.reference import ArchiveReference, parse_registry_reference
from erofsd.errors import BlobCorrupt, BlobNotFound, CorruptImage, UnsupportedImage, UsageError
from ondemand.ranges import Range

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_LINKS_MAX = 8
_COMPRESSED = {b"\x1f\x8b": ".gzip", b"\x28\xb5\x2f\xfd": ".zstd"}


class ArchiveFiles:
    """The regular files in an uncompressed tar, by name; links are followed inside it.

    Raises:
        SourceError: The archive cannot be read.
        CorruptImage: It is no sound tar.
        UnsupportedImage: It is compressed as a whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, Place] = {}
        self._links: dict[str, str] = {}
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(4)
            if head[:2] in _COMPRESSED or head in _COMPRESSED:
                raise UnsupportedImage(
                    f"{path}: compressed as a whole: it cannot be read in place", hint="decompress it first"
                )
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    self._add(member, size)
        except OSError as exc:
            raise translate(exc, str(path)) from exc
        except (tarfile.TarError, ValueError, EOFError) as exc:
            raise CorruptImage(f"{path}: not a sound tar: {exc}") from exc

    def _add(self, member: tarfile.TarInfo, size: int) -> None:
        name = _clean(member.name)
        if member.isreg():
            if member.offset_data + member.size > size:
                raise CorruptImage(f"{self.path}: cut off in the middle of {name}")
            self._places[name] = Place(self.path, member.offset_data, member.size)
        elif member.issym():
            self._links[name] = _clean(posixpath.join(posixpath.dirname(name), member.linkname))
        elif member.islnk():
            self._links[name] = _clean(member.linkname)

    def names(self) -> list[str]:
        """All files, without links."""
        return list(self._places)

    def find(self, name: str) -> Place | None:
        """Where file *name* lies; None if there is none."""
        name = _clean(name)
        for _ in range(_LINKS_MAX):
            if name not in self._links:
                break
            name = self._links[name]
        return self._places.get(name)

    def read(self, name: str, limit: int) -> bytes:
        """All of file *name*.

        Raises:
            BlobNotFound: There is none.
            UnsupportedImage: It has more than *limit* bytes.
        """
        place = self.find(name)
        if place is None:
            raise BlobNotFound(f"{self.path}: has no {name} in it")
        if place.size > limit:
            raise UnsupportedImage(f"{self.path}: {name}: {place.size} bytes are too many, {limit} the most")
        return read_place(place)


def read_place(place: Place) -> bytes:
    """All bytes of *place*.

    Raises:
        SourceError: They cannot be read.
    """
    try:
        with place.path.open("rb") as file:
            file.seek(place.offset)
            return file.read(place.size)
    except OSError as exc:
        raise translate(exc, str(place.path)) from exc


def _clean(name: str) -> str:
    return posixpath.normpath("/" + name).lstrip("/")


class _Placed:
    """The part of a backend whose blobs are parts of files."""

    name: str
    requests: int
    transferred_bytes: int
    _blobs: dict[str, Place]

    def place(self, blob_id: str) -> Place:
        """Where a blob lies.

        Raises:
            BlobNotFound: It is not there.
        """
        place = self._blobs.get(blob_id)
        if place is None:
            raise BlobNotFound(f"{self.name}: has no blob {blob_id}")
        return place

    async def size(self, blob_id: str) -> int:
        """See Backend."""
        return self.place(blob_id).size

    async def stream(self, blob_id: str, want: Range) -> AsyncIterator[bytes]:
        """See Backend."""
        place = self.place(blob_id)
        if want.stop > place.size:
            raise BlobCorrupt(f"{self.name}: {blob_id} has {place.size} bytes, and {want} was asked for")
        self.requests += 1
        try:
            with place.path.open("rb") as file:
                at = want.start
                while at < want.stop:
                    length = min(PIECE_SIZE, want.stop - at)
                    piece = await asyncio.to_thread(os.pread, file.fileno(), length, place.offset + at)
                    if not piece:
                        raise BlobCorrupt(f"{self.name}: became shorter while it was read")
                    at += len(piece)
                    self.transferred_bytes += len(piece)
                    yield piece
        except OSError as exc:
            raise translate(exc, str(place.path)) from exc


class OciArchiveBackend(_Placed, LayoutBackend):
    """The images of one OCI archive; an ImageSource. Blocks while it is made: it reads all tar headers.

    Raises:
        As ArchiveFiles.
    """

    def __init__(self, path: Path) -> None:
        LayoutBackend.__init__(self, path)
        self._members = ArchiveFiles(path)
        self._blobs = {}
        for name in self._members.names():
            directory, _, algorithm = posixpath.dirname(name).rpartition("/")
            if directory == "blobs" and (place := self._members.find(name)):
                digest = f"{algorithm}:{posixpath.basename(name)}"
                self._blobs[digest.removeprefix("sha256:")] = place

    @property
    def name(self) -> str:  # type: ignore[override]
        """``oci-archive:FILE``."""
        return f"oci-archive:{self._path}"

    def _read(self, name: str) -> bytes:
        return self._members.read(name, INDEX_MAX)


class _Listed(msgspec.Struct, rename="pascal"):
    """One image in a docker archive's ``manifest.json``."""

    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class DockerArchiveBackend(_Placed, LocalBackend):
    """The images of one docker archive; an ImageSource. Blocks while it is made.

    Raises:
        As ArchiveFiles.
    """

    def __init__(self, path: Path) -> None:
        LocalBackend.__init__(self)
        self._path = path
        self._members = ArchiveFiles(path)
        self._blobs = {}
        self._made: dict[str, bytes] = {}
        try:
            text = self._members.read("manifest.json", INDEX_MAX)
            self._images = msgspec.json.decode(text, type=list[_Listed])
        except BlobNotFound as exc:
            raise UnsupportedImage(f"{path}: no docker archive: there is no manifest.json in it") from exc
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise CorruptImage(f"{path}: manifest.json: {exc}") from exc

    @property
    def name(self) -> str:  # type: ignore[override]
        """``docker-archive:FILE``."""
        return f"docker-archive:{self._path}"

    async def fetch_document(self, selector: str | None) -> Document:
        """See ImageSource. The manifest is made up: schema 2, with the archive's layers as they are."""
        if selector in self._made:
            return checked_document(self._made[selector], DOCKER_MANIFEST, selector, self.name)
        image = self._choose(selector)
        body = await asyncio.to_thread(self._make_manifest, image)
        document = checked_document(body, DOCKER_MANIFEST, None, f"{self.name}: {image.config}")
        self._made[document.digest] = body
        return document

    def _choose(self, tag: str | None) -> _Listed:
        known = [tag for image in self._images for tag in image.repo_tags or ()]
        hint = f"it has: {', '.join(known)}" if known else ""
        if tag is None:
            if len(self._images) != 1:
                raise UsageError(f"{self.name}: holds {len(self._images)} images: say which", hint=hint)
            return self._images[0]
        wanted = parse_registry_reference(tag)
        for image in self._images:
            if any(parse_registry_reference(other) == wanted for other in image.repo_tags or ()):
                return image
        raise BlobNotFound(f"{self.name}: has no {tag}", hint=hint)

    def _make_manifest(self, image: _Listed) -> bytes:
        config = self._members.read(image.config, CONFIG_MAX)
        diff_ids = parse_config(config, f"{self.name}: {image.config}").rootfs.diff_ids or []
        if len(diff_ids) != len(image.layers):
            raise CorruptImage(f"{self.name}: {len(image.layers)} layers, but {len(diff_ids)} diff_ids")
        place = self._members.find(image.config)
        assert place is not None  # it was just read
        config_digest = digest_of(config)
        self._blobs[config_digest.removeprefix("sha256:")] = place
        layers = [self._layer(name, diff_id) for name, diff_id in zip(image.layers, diff_ids, strict=True)]
        manifest = {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": {"mediaType": DOCKER_CONFIG, "size": len(config), "digest": config_digest},
            "layers": layers,
        }
        return json.dumps(manifest, separators=(",", ":")).encode()

    def _layer(self, name: str, diff_id: str) -> dict[str, object]:
        place = self._members.find(name)
        if place is None:
            raise CorruptImage(f"{self.name}: has no layer {name}")
        head = read_place(Place(place.path, place.offset, min(4, place.size)))
        suffix = _COMPRESSED.get(head[:2]) or _COMPRESSED.get(head)
        # As it is stored: that is the diff_id only without compression.
        digest = _digest(place) if suffix else diff_id
        self._blobs[digest.removeprefix("sha256:")] = place
        return {"mediaType": DOCKER_LAYER + (suffix or ""), "size": place.size, "digest": digest}


def _digest(place: Place) -> str:
    hasher = hashlib.sha256()
    with place.path.open("rb") as file:
        file.seek(place.offset)
        left = place.size
        while left and (piece := file.read(min(PIECE_SIZE, left))):
            hasher.update(piece)
            left -= len(piece)
    return f"sha256:{hasher.hexdigest()}"


def open_archive(reference: ArchiveReference) -> OciArchiveBackend | DockerArchiveBackend:
    """The ImageSource in the archive that *reference* names. Blocks.

    Raises:
        As ArchiveFiles.
    """
    if reference.kind == "oci-archive":
        return OciArchiveBackend(reference.path)
    return DockerArchiveBackend(reference.path)
