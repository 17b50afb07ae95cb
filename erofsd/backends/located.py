"""Finds the image behind a reference: its bootstrap if it has one, what its blobs are, what pins them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, assert_never

from erofsd.backends.base import Backend
from erofsd.backends.bootstraplayer import UNPACKED_MAX, unpack_bootstrap_layer
from erofsd.backends.documents import (
    CONFIG_MAX,
    Document,
    ImageSource,
    Manifest,
    fetch_whole,
    parse_config,
    parse_document,
)
from erofsd.backends.http import HttpBackend, url_id
from erofsd.backends.localfs import LocalBackend, path_id
from erofsd.backends.manifest import (
    NydusLayers,
    OpaqueLayers,
    choose,
    classify,
    says_erofs,
    single,
    this_platform,
)
from erofsd.backends.measured import MeasuredBackend
from erofsd.backends.ocilayout import LayoutBackend
from erofsd.backends.places import FirstOf, is_url, listed_files
from erofsd.backends.reference import (
    ArchiveReference,
    FileReference,
    HttpReference,
    LayoutReference,
    PathReference,
    Reference,
    RegistryReference,
    S3Reference,
    parse_reference,
)
from erofsd.backends.registry import RegistryBackend
from erofsd.backends.retry import RetryBackend
from erofsd.backends.settings import SourceSettings
from erofsd.backends.sniff import HEAD_SIZE, Sniffed, sniff
from erofsd.backends.sources import digest_pin, listed, open_image_source, open_source, unmountable
from erofsd.errors import BlobCorrupt, BlobNotFound, CorruptImage, UnsupportedImage, UsageError
from ondemand.ranges import Range
from ondemand.registry import Registry

__all__ = ["EXTRACTORS", "Located", "locate", "open_source"]

BOOTSTRAP_MAX = UNPACKED_MAX

T = TypeVar("T", bound=MeasuredBackend)


class Bytes(Protocol):
    """What an extractor reads from; erofsd.images.base.ByteSource, which lies above this package."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def pread(self, offset: int, length: int) -> bytes: ...


Extractor = Callable[[Bytes], bytes]
# Take the bootstrap out of a blob that holds one. By name, since formats are read above the backends.
EXTRACTORS: Registry[Extractor] = Registry(
    "erofsd.extractors", {"nydus": "erofsd.images.rafs6.toc:extract_bootstrap"}
)


@dataclass(frozen=True, slots=True)
class Located:
    """An image that was found.

    Attributes:
        ref: Canonical reference.
        kind: ``"rafs"``: pure metadata in *bootstrap*; ``"erofs"``: a plain EROFS image, blob *primary*.
        digest: Of the manifest, where there is one.
        bootstrap: Verified as far as the source allows; None for plain EROFS.
        blob_metas: ``.blob.meta`` files that came with the bootstrap, by blob id.
        backend: Gives the data blobs; to be closed by whoever has this object.
        primary: Blob id of the plain EROFS image. For RAFS the id of the blob that held the bootstrap, which
            that bootstrap cannot know; else None.
        devices: Blob ids of device slots 1, 2, … of plain EROFS, where the source says so.
        pins: What stands for the content of plain EROFS blobs, by blob id: a digest, or size and ETag, or
            size, time and inode.
    """

    ref: str
    kind: str
    digest: str | None
    bootstrap: bytes | None
    blob_metas: Mapping[str, bytes]
    backend: RetryBackend
    primary: str | None
    devices: tuple[str, ...]
    pins: Mapping[str, str]


async def locate(
    reference: Reference | str,
    *,
    settings: SourceSettings,
    blobs: str | Sequence[str] | None = None,
    platform: str | None = None,
) -> Located:
    """Find the image behind *reference*.

    Args:
        blobs: Where its data blobs are, if not where it is itself: directories, files, URL prefixes.
        platform: ``os/arch[/variant]``; None: this machine's.

    Raises:
        UsageError: The reference cannot be mounted as it stands.
        ImageRefused, SourceError: See erofsd.errors; the message names the object.
    """
    if isinstance(reference, str):
        reference = parse_reference(reference)
    places = listed(blobs)
    _check_places(places)
    backend = open_source(reference, settings=settings, blobs=places)
    backend.attempts = settings.locate_attempts
    try:
        match reference:
            case RegistryReference() | LayoutReference():
                found = await _locate_manifest(
                    reference, settings, backend, bool(places), platform or this_platform()
                )
            case HttpReference():
                found = await _locate_url(reference, backend, places)
            case FileReference() | PathReference():
                found = await _locate_file(reference, backend, places)
            case ArchiveReference() | S3Reference():
                raise unmountable(reference)
            case _:
                assert_never(reference)
    except BaseException:
        await backend.aclose()
        raise
    backend.attempts = settings.attempts
    return found


# --- images with a manifest ---


async def _locate_manifest(
    reference: RegistryReference | LayoutReference,
    settings: SourceSettings,
    backend: RetryBackend,
    elsewhere: bool,
    platform: str,
) -> Located:
    selector = reference.selector if isinstance(reference, RegistryReference) else reference.tag
    if not elsewhere:
        assert isinstance(backend.inner, RegistryBackend | LayoutBackend)
        return await _read_manifest(str(reference), backend.inner, backend, selector, platform, backend)
    # With --blobs the manifest still comes from the reference; that source has then done its work.
    source = open_image_source(reference, settings)
    caller = RetryBackend(source, settings.locate_attempts)
    try:
        return await _read_manifest(str(reference), source, caller, selector, platform, backend)
    finally:
        await caller.aclose()


async def _read_manifest(
    ref: str,
    source: RegistryBackend | LayoutBackend,
    caller: RetryBackend,
    selector: str | None,
    platform: str,
    backend: RetryBackend,
) -> Located:
    document, manifest = await _resolve(source, caller, selector, platform)
    layers = classify(document, manifest)
    for layer in manifest.layers:
        source.expect(layer.blob_id, layer.size)
    match layers:
        case NydusLayers():
            return await _nydus(ref, document, manifest, layers, caller, backend)
        case OpaqueLayers():
            return await _erofs(ref, document, layers, backend)
        case _:
            assert_never(layers)


async def _resolve(
    source: ImageSource, caller: RetryBackend, selector: str | None, platform: str
) -> tuple[Document, Manifest]:
    document = await caller.call(lambda: source.fetch_document(selector))
    parsed = parse_document(document)
    if isinstance(parsed, Manifest):
        return document, parsed
    digest = choose(parsed, platform, document.name).digest
    document = await caller.call(lambda: source.fetch_document(digest))
    return document, single(document)


async def _nydus(
    ref: str,
    document: Document,
    manifest: Manifest,
    layers: NydusLayers,
    caller: Backend,
    backend: RetryBackend,
) -> Located:
    name = f"{ref}: bootstrap layer"
    try:
        # Together: each may be a round trip around the world.
        async with asyncio.TaskGroup() as group:
            layer = group.create_task(fetch_whole(caller, layers.bootstrap, BOOTSTRAP_MAX, name))
            diff_id = group.create_task(_last_diff_id(caller, manifest, ref))
    except BaseExceptionGroup as exc:
        raise exc.exceptions[0] from exc
    unpacked = await asyncio.to_thread(unpack_bootstrap_layer, layer.result(), name)
    stated = diff_id.result()
    if stated is not None and stated != unpacked.diff_id:
        raise BlobCorrupt(f"{name}: unpacks to {unpacked.diff_id}, and the config says {stated}")
    _known(sniff(unpacked.bootstrap), name, "rafs")
    return Located(
        ref, "rafs", document.digest, unpacked.bootstrap, unpacked.blob_metas, backend, None, (), {}
    )


async def _last_diff_id(backend: Backend, manifest: Manifest, ref: str) -> str | None:
    """The last of the config's diff_ids, if there is one for each layer."""
    if manifest.config is None:
        return None
    name = f"{ref}: config"
    config = parse_config(await fetch_whole(backend, manifest.config, CONFIG_MAX, name), name)
    diff_ids = config.rootfs.diff_ids or []
    return diff_ids[-1] if len(diff_ids) == len(manifest.layers) else None


async def _erofs(ref: str, document: Document, layers: OpaqueLayers, backend: RetryBackend) -> Located:
    others = len(layers.layers) - 1
    for layer in layers.layers:
        if layers.stated and not says_erofs(layer):
            continue
        found = sniff(await _head(backend, layer.blob_id, layer.size))
        if found and found.kind == "erofs" and found.extra_devices == others:
            devices = tuple(d.blob_id for d in layers.layers if d is not layer)
            pins = {d.blob_id: digest_pin(d.digest, d.size) for d in layers.layers}
            return Located(ref, "erofs", document.digest, None, {}, backend, layer.blob_id, devices, pins)
    if not layers.stated:
        media_type = layers.layers[0].media_type or "without a media type"
        raise UnsupportedImage(f"{ref}: its only layer ({media_type}) is no EROFS image")
    raise UnsupportedImage(
        f"{ref}: none of its {others + 1} layers is an EROFS image with the {others} others as its devices",
        hint="layers that are file systems of their own would have to be stacked",
    )


# --- single images ---


async def _locate_url(reference: HttpReference, backend: RetryBackend, places: Sequence[str]) -> Located:
    ref, key = str(reference), url_id(reference.url)
    http = _only(backend, HttpBackend)
    pin = await backend.call(lambda: http.pin(key))
    size = await backend.size(key)
    sniffed = _known(sniff(await _head(backend, key, size)), ref)
    if sniffed.kind == "erofs":
        return _single_erofs(ref, backend, key, pin, sniffed, places)
    return await _single_bootstrap(ref, backend, key, size, places)


async def _locate_file(
    reference: FileReference | PathReference, backend: RetryBackend, places: Sequence[str]
) -> Located:
    ref, path, key = str(reference), reference.path, path_id(reference.path)
    if path.is_dir():
        raise UsageError(f"{ref}: a directory, not an image", hint=f"an OCI layout is oci:{path}")
    size = await backend.size(key)
    sniffed = sniff(await _head(backend, key, size))
    if sniffed is None:
        return await _embedded(ref, path, backend)
    _known(sniffed, ref)
    if sniffed.kind == "erofs":
        pin = _only(backend, LocalBackend).pin(key)
        return _single_erofs(ref, backend, key, pin, sniffed, places)
    return await _single_bootstrap(ref, backend, key, size, places)


async def _single_bootstrap(
    ref: str, backend: RetryBackend, key: str, size: int, places: Sequence[str]
) -> Located:
    if not places:
        raise UsageError(f"{ref}: a bootstrap without its blobs", hint="say where they are: --blobs DIR|URL")
    if size > BOOTSTRAP_MAX:
        raise UnsupportedImage(f"{ref}: {size} bytes are too many for a bootstrap")
    pieces = [piece async for piece in backend.stream(key, Range(0, size))]
    return Located(ref, "rafs", None, b"".join(pieces), {}, backend, None, (), {})


def _single_erofs(
    ref: str, backend: RetryBackend, primary: str, pin: str, sniffed: Sniffed, places: Sequence[str]
) -> Located:
    devices = tuple(listed_files(places))
    if sniffed.extra_devices and not places:
        raise UsageError(
            f"{ref}: has {sniffed.extra_devices} devices beside this one", hint="name them: --blobs FILE…"
        )
    if devices and len(devices) != sniffed.extra_devices:
        raise UsageError(f"{ref}: has {sniffed.extra_devices} more devices, and --blobs names {len(devices)}")
    pins = {primary: pin}
    if devices:
        local = _only(backend, LocalBackend)
        pins |= {device: local.pin(device) for device in devices}
    return Located(ref, "erofs", None, None, {}, backend, primary, devices, pins)


async def _embedded(ref: str, path: Path, backend: RetryBackend) -> Located:
    bootstrap = await asyncio.to_thread(_extract, path)
    _known(sniff(bootstrap), ref, "rafs")
    return Located(ref, "rafs", None, bootstrap, {}, backend, path.name.partition(".")[0], (), {})


def _extract(path: Path) -> bytes:
    with path.open("rb") as file:
        source = _FileBytes(str(path), os.fstat(file.fileno()).st_size, file.fileno())
        return EXTRACTORS["nydus"](source)


@dataclass(frozen=True, slots=True)
class _FileBytes:
    name: str
    size: int
    fd: int

    def pread(self, offset: int, length: int) -> bytes:
        data = os.pread(self.fd, length, offset)
        if len(data) != length:
            raise CorruptImage(f"{self.name}: at byte {offset}: {length} bytes reach past the end")
        return data


# --- shared ---


def _check_places(places: Sequence[str]) -> None:
    for place in places:
        if not is_url(place) and not os.path.exists(place):
            raise BlobNotFound(f"--blobs {place}: does not exist")


async def _head(backend: Backend, blob_id: str, size: int) -> bytes:
    want = Range(0, min(HEAD_SIZE, size))
    return b"".join([piece async for piece in backend.stream(blob_id, want)])


def _known(sniffed: Sniffed | None, ref: str, kind: str | None = None) -> Sniffed:
    """*sniffed*, if it can be mounted, and is of kind *kind* where one is given."""
    if sniffed is not None and sniffed.kind == "rafs5":
        raise UnsupportedImage(f"{ref}: RAFS v5; erofsd reads v6", hint="build it again with --fs-version 6")
    if sniffed is None or kind not in (None, sniffed.kind):
        raise UnsupportedImage(f"{ref}: neither an EROFS image nor a RAFS v6 bootstrap")
    return sniffed


def _only(backend: RetryBackend, kind: type[T]) -> T:
    parts = backend.inner.sources if isinstance(backend.inner, FirstOf) else (backend.inner,)
    return next(part for part in parts if isinstance(part, kind))
