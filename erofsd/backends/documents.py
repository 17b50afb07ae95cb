"""OCI's JSON documents, as far as finding an image needs them.

Sources: opencontainers/image-spec descriptor.md, manifest.md, image-index.md, config.md;
distribution's schema 2 and docker's media types are the same in all that is read here.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec

from erofsd.backends.base import Backend
from erofsd.errors import BlobCorrupt, CorruptImage, UnsupportedImage
from ondemand.ranges import Range

MANIFEST_MAX = 4 << 20  # distribution-spec, "Pushing Manifests": registries should take that much
INDEX_MAX = 8 << 20
CONFIG_MAX = 8 << 20

MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
SCHEMA1_TYPES = (
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
)
REF_NAME = "org.opencontainers.image.ref.name"

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
T = TypeVar("T")


class Platform(msgspec.Struct, frozen=True):
    """What a manifest is for."""

    os: str = ""
    architecture: str = ""
    variant: str | None = None
    features: list[str] | None = msgspec.field(default=None, name="os.features")

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Names content by digest and says of what kind and size it is.

    Attributes:
        digest: ``sha256:…`` or ``sha512:…``; checked.
        size: In bytes; not negative.
        urls: Where else the content is, for layers that registries may not hand out.
    """

    media_type: str = ""
    digest: str
    size: int
    annotations: dict[str, str] | None = None
    platform: Platform | None = None
    artifact_type: str | None = None
    urls: list[str] | None = None

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.digest):
            raise ValueError(f"not a digest: {self.digest[:80]!r}")
        if self.size < 0:
            raise ValueError(f"negative size {self.size}")

    @property
    def blob_id(self) -> str:
        """The name of the blob in a backend: hexadecimal digits alone where the digest is sha256."""
        return self.digest.removeprefix("sha256:")

    def annotation(self, key: str) -> str | None:
        """The value of annotation *key*."""
        return (self.annotations or {}).get(key)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An image manifest."""

    media_type: str = ""
    artifact_type: str | None = None
    config: Descriptor | None = None
    layers: list[Descriptor]
    annotations: dict[str, str] | None = None


class Index(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An image index, or the ``index.json`` of a layout."""

    media_type: str = ""
    manifests: list[Descriptor]


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: list[str] | None = None


class ImageConfig(msgspec.Struct, frozen=True):
    """The one part of an image's config that says something about layers."""

    rootfs: _RootFs = _RootFs()


class _Kind(msgspec.Struct, rename="camel"):
    schema_version: int | None = None
    media_type: str = ""
    manifests: msgspec.Raw = msgspec.Raw(b"")
    layers: msgspec.Raw = msgspec.Raw(b"")


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index as a source gave it.

    Attributes:
        body: Its digest is *digest*: checked.
        media_type: As the source states it; may be empty.
        name: For messages.
    """

    body: bytes
    media_type: str
    digest: str
    name: str


class ImageSource(Backend, Protocol):
    """A backend that also knows manifests."""

    async def fetch_document(self, selector: str | None) -> Document:
        """A manifest or index.

        Args:
            selector: A tag or a digest; None: the only one there is.

        Raises:
            BlobNotFound: There is none of that name.
            BlobCorrupt: It does not have the digest it should have.
            UnsupportedImage: It is larger than MANIFEST_MAX or INDEX_MAX.
        """
        ...


def digest_of(body: bytes, like: str = "sha256:") -> str:
    """The digest of *body* with the algorithm that the digest *like* has."""
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}"


def checked_document(body: bytes, media_type: str, digest: str | None, name: str) -> Document:
    """A Document of *body*.

    Args:
        digest: What it must have, where that is known.

    Raises:
        BlobCorrupt, UnsupportedImage: As ImageSource.fetch_document.
    """
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise BlobCorrupt(f"{name}: not a digest: {digest[:80]!r}")
    real = digest_of(body, digest or "sha256:")
    if digest is not None and real != digest:
        raise BlobCorrupt(f"{name}: has digest {real}, not {digest}")
    limit = INDEX_MAX if media_type in INDEX_TYPES else MANIFEST_MAX
    if len(body) > limit:
        raise UnsupportedImage(f"{name}: {len(body)} bytes are too many for a manifest")
    return Document(body, media_type, real, name)


def parse_document(document: Document) -> Manifest | Index:
    """What *document* says.

    Raises:
        UnsupportedImage: It is of a kind that we do not read, among them schema 1.
        CorruptImage: It is not what it says it is.
    """
    kind = _decode(document.body, _Kind, document.name)
    media_type = kind.media_type or document.media_type
    if media_type in SCHEMA1_TYPES or kind.schema_version == 1:
        raise UnsupportedImage(
            f"{document.name}: a docker schema 1 image", hint="push it again with a docker of this decade"
        )
    if media_type in INDEX_TYPES or (media_type not in MANIFEST_TYPES and kind.manifests and not kind.layers):
        return _decode(document.body, Index, document.name)
    if media_type in MANIFEST_TYPES or kind.layers:
        return _decode(document.body, Manifest, document.name)
    raise UnsupportedImage(
        f"{document.name}: neither a manifest nor an index: {media_type or 'no media type'}"
    )


def parse_config(body: bytes, name: str) -> ImageConfig:
    """The config in *body*.

    Raises:
        CorruptImage: It is not one.
    """
    return _decode(body, ImageConfig, name)


def parse_index(body: bytes, name: str) -> Index:
    """The ``index.json`` in *body*.

    Raises:
        CorruptImage: It is not one.
    """
    return _decode(body, Index, name)


def _decode(body: bytes, type_: type[T], name: str) -> T:
    try:
        return msgspec.json.decode(body, type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise CorruptImage(f"{name}: {exc}") from exc


async def fetch_whole(backend: Backend, descriptor: Descriptor, limit: int, name: str) -> bytes:
    """The content that *descriptor* names, verified.

    Raises:
        UnsupportedImage: It is larger than *limit* bytes.
        BlobCorrupt: It does not have the digest that the descriptor states.
        SourceError: As Backend.stream.
    """
    if descriptor.size > limit:
        raise UnsupportedImage(f"{name}: {descriptor.size} bytes are too many, {limit} the most")
    pieces = [piece async for piece in backend.stream(descriptor.blob_id, Range(0, descriptor.size))]
    body = b"".join(pieces)
    if (digest := digest_of(body, descriptor.digest)) != descriptor.digest:
        raise BlobCorrupt(f"{name}: has digest {digest}, not {descriptor.digest}")
    return body
