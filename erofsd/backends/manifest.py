"""From a tag to the one manifest that can be mounted lazily, and what its layers are.

Source: rafs-v6 7, which cites nydus-snapshotter and nydusify.
"""

from __future__ import annotations

import platform as _platform
from collections.abc import Sequence
from dataclasses import dataclass

from erofsd.backends.documents import Descriptor, Document, Index, Manifest, parse_document
from erofsd.errors import CorruptImage, UnsupportedImage

NYDUS_ARTIFACT = "application/vnd.nydus.image.manifest.v1+json"
NYDUS_FEATURE = "nydus.remoteimage.v1"
NYDUS_BOOTSTRAP = "containerd.io/snapshot/nydus-bootstrap"
NYDUS_BLOB = "containerd.io/snapshot/nydus-blob"
NYDUS_FS_VERSION = "containerd.io/snapshot/nydus-fs-version"
NYDUS_REF = "containerd.io/snapshot/nydus-ref"
NYDUS_ENCRYPTED = "containerd.io/snapshot/nydus-encrypted-blob"
NYDUS_BLOB_TYPE = "application/vnd.oci.image.layer.nydus.blob.v1"

CONVERT_HINT = "convert it once: erofsd convert SRC DEST"

# uname's names -> Go's, which OCI platforms use.
_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i686": "386",
    "i386": "386",
    "loongarch64": "loong64",
}


@dataclass(frozen=True, slots=True)
class NydusLayers:
    """Layers of a Nydus image: *data* in manifest order, which need not be the device table's."""

    data: tuple[Descriptor, ...]
    bootstrap: Descriptor


@dataclass(frozen=True, slots=True)
class OpaqueLayers:
    """Layers that may be EROFS images and devices: not tars, by media type.

    Attributes:
        stated: Some media type says EROFS; otherwise only the bytes can tell.
    """

    layers: tuple[Descriptor, ...]
    stated: bool


class OrdinaryImage(UnsupportedImage):
    """An image of ordinary layers: sound, but to be converted first."""


def this_platform() -> str:
    """``linux/ARCH`` of this machine, in OCI's words."""
    machine = _platform.machine()
    return f"linux/{_ARCHITECTURES.get(machine, machine)}"


def choose(index: Index, platform: str, name: str) -> Descriptor:
    """The manifest in *index* for *platform*: the Nydus one if there is one.

    Raises:
        UnsupportedImage: There is none; says for what there are.
    """
    images = [d for d in index.manifests if not (d.platform and d.platform.os == "unknown")]  # attestations
    fitting = [d for d in images if fits(d, platform)]
    if not fitting:
        known = ", ".join(sorted({str(d.platform) for d in images if d.platform})) or "nothing"
        raise UnsupportedImage(f"{name}: not made for {platform}, but for {known}")
    return next((d for d in fitting if is_nydus(d)), fitting[0])


def is_nydus(descriptor: Descriptor) -> bool:
    """True if *descriptor*, of an index, says that it is a Nydus image's."""
    features = descriptor.platform.features if descriptor.platform else None
    return descriptor.artifact_type == NYDUS_ARTIFACT or NYDUS_FEATURE in (features or ())


def fits(descriptor: Descriptor, platform: str) -> bool:
    """True if *descriptor*, of an index, is for *platform* (``os/arch[/variant]``), or does not say."""
    stated = descriptor.platform
    if stated is None or not (stated.os or stated.architecture):
        return True
    os, _, rest = platform.partition("/")
    architecture, _, variant = rest.partition("/")
    return (stated.os, stated.architecture) == (os, architecture) and variant in ("", stated.variant or "")


def classify(document: Document, manifest: Manifest) -> NydusLayers | OpaqueLayers:
    """What the layers of *manifest* are.

    Raises:
        UnsupportedImage: A kind that is not mounted lazily; names it.
        CorruptImage: No layers at all.
    """
    name, layers = document.name, manifest.layers
    if not layers:
        raise CorruptImage(f"{name}: has no layers")
    _refuse_encrypted(layers, name)
    if layers[-1].annotation(NYDUS_BOOTSTRAP) == "true":
        return _nydus(layers, name)
    opaque = [d for d in layers if not _is_tar(d)]
    if not opaque or len(opaque) != len(layers):
        if any(d.annotation(NYDUS_BOOTSTRAP) or d.annotation(NYDUS_BLOB) for d in layers):
            raise CorruptImage(f"{name}: a Nydus image whose last layer is not the bootstrap")
        raise OrdinaryImage(f"{name}: an ordinary OCI image, not lazily mountable", hint=CONVERT_HINT)
    stated = any(says_erofs(d) for d in layers)
    if packed := [d.media_type for d in layers if _is_compressed(d)]:
        raise UnsupportedImage(f"{name}: {packed[0]} is compressed as a whole and cannot be read in parts")
    if not stated and len(layers) > 1:
        raise UnsupportedImage(
            f"{name}: layers of type {layers[0].media_type or 'none'} are not lazily mountable"
        )
    return OpaqueLayers(tuple(layers), stated)


def _nydus(layers: Sequence[Descriptor], name: str) -> NydusLayers:
    version = layers[-1].annotation(NYDUS_FS_VERSION)
    if version is not None and version != "6":
        raise UnsupportedImage(f"{name}: RAFS v{version}; erofsd reads v6", hint=CONVERT_HINT)
    if any(d.annotation(NYDUS_REF) for d in layers):
        raise UnsupportedImage(
            f"{name}: a zran image (nydus-ref): its data are in gzip layers of another image",
            hint="convert that image without --oci-ref",
        )
    return NydusLayers(tuple(layers[:-1]), layers[-1])


def _refuse_encrypted(layers: Sequence[Descriptor], name: str) -> None:
    for layer in layers:
        if layer.annotation(NYDUS_ENCRYPTED) == "true" or layer.media_type.endswith("+encrypted"):
            raise UnsupportedImage(f"{name}: an encrypted image")


def says_erofs(descriptor: Descriptor) -> bool:
    """True if the media type names EROFS, as ``application/vnd.erofs.layer.v1`` does."""
    return "erofs" in descriptor.media_type.lower()


def _is_tar(descriptor: Descriptor) -> bool:
    base = descriptor.media_type.partition("+")[0]
    return base.endswith((".tar", ".tar.gzip", ".tar.gz", ".tar.zstd")) or base.startswith(
        ("application/vnd.docker.image.rootfs", "application/vnd.oci.image.layer.v1")
    )


def _is_compressed(descriptor: Descriptor) -> bool:
    return descriptor.media_type.rpartition("+")[2] in ("gzip", "zstd", "gz", "zst")


def single(document: Document) -> Manifest:
    """The manifest in *document*, which an index named.

    Raises:
        UnsupportedImage: It is another index.
    """
    parsed = parse_document(document)
    if isinstance(parsed, Index):
        raise UnsupportedImage(f"{document.name}: indexes nested too deep")
    return parsed
