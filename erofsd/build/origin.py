"""The ordinary image that is to be converted: which manifests, which layers, where their bytes are.

Sources: opencontainers/image-spec image-index.md, manifest.md, layer.md ("Non-Distributable Layers");
moby/buildkit docs/attestations/attestation-storage.md; containers/ocicrypt for encrypted layers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from erofsd.backends.archives import DockerArchiveBackend, open_archive
from erofsd.backends.documents import (
    CONFIG_MAX,
    Descriptor,
    Document,
    Index,
    Manifest,
    fetch_whole,
    parse_document,
)
from erofsd.backends.http import HttpBackend
from erofsd.backends.localfs import Place
from erofsd.backends.manifest import NYDUS_BOOTSTRAP, fits, is_nydus, single
from erofsd.backends.measured import MeasuredBackend
from erofsd.backends.ocilayout import LayoutBackend
from erofsd.backends.reference import (
    ArchiveReference,
    LayoutReference,
    Reference,
    RegistryReference,
)
from erofsd.backends.registry import RegistryBackend
from erofsd.backends.retry import RetryBackend
from erofsd.backends.settings import SourceSettings
from erofsd.backends.transport import HttpClient, HttpLimits
from erofsd.build.publish import Json, parse_json, with_platform
from erofsd.errors import BlobNotFound, UnsupportedImage, UsageError

_ATTESTATION = "vnd.docker.reference.type"
_LAYER_TYPES = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)
_PACKED = ("", "+gzip", "+zstd", ".gzip", ".zstd")

OrdinaryReference = RegistryReference | LayoutReference | ArchiveReference


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image of one platform.

    Attributes:
        config: As it is, with all that we do not know in it.
        entry: Of the index that names it; None if none does.
    """

    document: Document
    manifest: Manifest
    config: Json
    entry: Json | None

    @property
    def name(self) -> str:
        """For messages."""
        return self.document.name

    @property
    def platform(self) -> Json:
        """As an index states it."""
        stated = (self.entry or {}).get("platform")
        return stated if isinstance(stated, dict) else with_platform(self.config)


@dataclass(frozen=True, slots=True)
class Selection:
    """What is to be converted.

    Attributes:
        index: The index that the source is; None if it is a single image, or a single one was asked for.
    """

    images: tuple[SourceImage, ...]
    index: Document | None


class Origin:
    """An image source, opened.

    Args:
        reference: A registry's, a layout's, or an archive's.
    """

    def __init__(self, reference: OrdinaryReference, settings: SourceSettings) -> None:
        self._reference = reference
        self._settings = settings
        self._source: RegistryBackend | LayoutBackend | DockerArchiveBackend
        match reference:
            case RegistryReference():
                self._source = RegistryBackend(reference, settings)
            case LayoutReference(path):
                self._source = LayoutBackend(path)
            case ArchiveReference():
                self._source = open_archive(reference)
        self.backend = RetryBackend(self._source, settings.attempts)
        self._opened: list[MeasuredBackend] = []

    async def aclose(self) -> None:
        """Close all connections."""
        for backend in (self.backend, *self._opened):
            await backend.aclose()

    # --- which ---

    async def select(self, platforms: Sequence[str]) -> Selection:
        """The images to convert.

        Args:
            platforms: ``os/arch[/variant]``; none: all for Linux.

        Raises:
            UnsupportedImage: Nothing in it can be converted; says why.
            SourceError: As ImageSource.
        """
        for platform in platforms:
            if not platform.startswith("linux/"):
                raise UnsupportedImage(f"--platform {platform}: only Linux images can be converted")
        reference = self._reference
        selector = reference.selector if isinstance(reference, RegistryReference) else reference.tag
        document = await self._fetch(selector)
        parsed = parse_document(document)
        if isinstance(parsed, Manifest):
            image = await self._image(document, parsed, None)
            self._check_asked(image, platforms)
            return Selection((image,), None)
        images = [
            await self._member(descriptor, entry)
            for descriptor, entry in self._chosen(document, parsed, platforms)
        ]
        return Selection(tuple(images), None if len(platforms) == 1 and len(images) == 1 else document)

    def _check_asked(self, image: SourceImage, platforms: Sequence[str]) -> None:
        stated = image.platform
        mine = "/".join(stated[k] for k in ("os", "architecture", "variant") if stated.get(k))
        if platforms and not any(mine == p or mine.startswith(p + "/") for p in platforms):
            raise UnsupportedImage(f"{image.name}: made for {mine or 'no platform'}, not {platforms[0]}")

    def _chosen(
        self, document: Document, index: Index, platforms: Sequence[str]
    ) -> list[tuple[Descriptor, Json]]:
        """The entries of *index* to convert, in its order."""
        entries: list[Json] = parse_json(document.body, document.name)["manifests"]
        known = list(zip(index.manifests, entries, strict=True))
        images = [(d, entry) for d, entry in known if not _is_attestation(d)]
        ordinary = [(d, entry) for d, entry in images if not is_nydus(d)]
        if images and not ordinary:
            raise UnsupportedImage(f"{document.name}: these are Nydus images already")
        linux = [(d, e) for d, e in ordinary if d.platform is None or d.platform.os in ("", "linux")]
        shown = ", ".join(sorted({str(d.platform) for d, _ in ordinary if d.platform})) or "nothing"
        if not linux:
            raise UnsupportedImage(f"{document.name}: only Linux images can be converted; it has {shown}")
        for platform in platforms:
            if not any(fits(d, platform) for d, _ in linux):
                raise UnsupportedImage(f"{document.name}: not made for {platform}, but for {shown}")
        return [(d, e) for d, e in linux if not platforms or any(fits(d, p) for p in platforms)]

    async def _member(self, descriptor: Descriptor, entry: Json) -> SourceImage:
        document = await self._fetch(descriptor.digest)
        return await self._image(document, single(document), entry)

    async def _image(self, document: Document, manifest: Manifest, entry: Json | None) -> SourceImage:
        name = document.name
        if manifest.config is None:
            raise UnsupportedImage(f"{name}: an image without a config")
        if any(layer.annotation(NYDUS_BOOTSTRAP) is not None for layer in manifest.layers):
            raise UnsupportedImage(f"{name}: a Nydus image already", hint="back again: convert --to oci")
        for layer in manifest.layers:
            _check_layer(layer, name)
        body = await fetch_whole(self.backend, manifest.config, CONFIG_MAX, f"{name}: config")
        config = parse_json(body, f"{name}: config")
        if config.get("os") not in (None, "", "linux"):
            raise UnsupportedImage(f"{name}: an image for {config['os']}; only Linux images can be converted")
        return SourceImage(document, manifest, config, entry)

    async def _fetch(self, selector: str | None) -> Document:
        return await self.backend.call(lambda: self._source.fetch_document(selector))

    # --- where ---

    def place(self, layer: Descriptor) -> Place | None:
        """Where *layer* lies on this machine; None if it does not."""
        if isinstance(self._source, RegistryBackend):
            return None
        try:
            return self._source.place(layer.blob_id)
        except BlobNotFound:
            if layer.urls:
                return None
            raise

    def holders(self, layer: Descriptor) -> list[MeasuredBackend]:
        """Who may have *layer*: for a foreign one the places that it names, and this source."""
        found: list[MeasuredBackend] = []
        for url in layer.urls or ():
            if url.startswith(("http://", "https://")):
                place = HttpBackend(HttpClient(HttpLimits.of(self._settings)), objects={layer.blob_id: url})
                self._opened.append(place)
                found.append(RetryBackend(place, self._settings.locate_attempts))
        return [*found, self.backend]


async def open_origin(reference: Reference, settings: SourceSettings) -> Origin:
    """The source of what is to be converted.

    Raises:
        UsageError: *reference* names no image with layers.
        SourceError, CorruptImage, UnsupportedImage: An archive cannot be read.
    """
    if not isinstance(reference, RegistryReference | LayoutReference | ArchiveReference):
        raise UsageError(
            f"{reference}: not an image with layers",
            hint="a directory or a tar is built, not converted: erofsd build DIR|TAR DEST",
        )
    return await asyncio.to_thread(Origin, reference, settings)


def _is_attestation(descriptor: Descriptor) -> bool:
    unknown = descriptor.platform is not None and descriptor.platform.os == "unknown"
    return unknown or descriptor.annotation(_ATTESTATION) is not None


def _check_layer(layer: Descriptor, name: str) -> None:
    kind = layer.media_type
    if kind.endswith("+encrypted"):
        raise UnsupportedImage(f"{name}: an encrypted image", hint="decrypt it first, as with skopeo")
    if not any(kind == base + packed for base in _LAYER_TYPES for packed in _PACKED):
        raise UnsupportedImage(f"{name}: layer {layer.digest} is of type {kind or 'none'}, not a file system")
