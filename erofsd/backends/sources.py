"""From a reference to the backend that has its blobs, without asking anybody for anything.

This is what brings mounts back without the network: reference and pins are all it takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import assert_never

from erofsd.backends.http import HttpBackend, url_id
from erofsd.backends.localfs import LocalBackend, path_id
from erofsd.backends.measured import MeasuredBackend
from erofsd.backends.ocilayout import LayoutBackend
from erofsd.backends.places import FirstOf, open_places
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
from erofsd.backends.transport import HttpClient, HttpLimits
from erofsd.errors import UsageError

_DIGEST_PIN = re.compile(r"sha\d+:[0-9a-f]+ size=(\d+)")


def open_source(
    reference: Reference | str,
    *,
    settings: SourceSettings,
    blobs: str | Sequence[str] | None = None,
    pins: Mapping[str, str] | None = None,
) -> RetryBackend:
    """The backend with the data blobs of *reference*.

    Args:
        blobs: Where they are, if not where the image is: directories, files, URL prefixes.
        pins: ``Located.pins``; the backend refuses what is not that any more.

    Raises:
        UsageError: The reference cannot be mounted.
    """
    if isinstance(reference, str):
        reference = parse_reference(reference)
    return RetryBackend(
        _open(reference, settings, listed(blobs), {k: v for k, v in (pins or {}).items() if v}),
        settings.attempts,
    )


def open_image_source(
    reference: RegistryReference | LayoutReference, settings: SourceSettings
) -> RegistryBackend | LayoutBackend:
    """The ImageSource with the manifest of *reference*."""
    match reference:
        case RegistryReference():
            return RegistryBackend(reference, settings)
        case LayoutReference(path):
            return LayoutBackend(path)


def digest_pin(digest: str, size: int) -> str:
    """What stands for the content of a blob that a manifest names."""
    return f"{digest} size={size}"


def listed(blobs: str | Sequence[str] | None) -> tuple[str, ...]:
    """``--blobs`` as a tuple of places."""
    if blobs is None:
        return ()
    return (blobs,) if isinstance(blobs, str) else tuple(blobs)


def unmountable(reference: ArchiveReference | S3Reference) -> UsageError:
    """Why *reference*, though known, is not mounted."""
    match reference:
        case S3Reference():
            return UsageError(
                f"{reference}: s3:// is not supported yet", hint="an https:// URL of the object may do"
            )
        case ArchiveReference():
            return UsageError(
                f"{reference}: an archive is not mounted lazily",
                hint=f"unpack it: skopeo copy {reference} oci:DIR:TAG",
            )


def _open(
    reference: Reference, settings: SourceSettings, places: Sequence[str], pins: dict[str, str]
) -> MeasuredBackend:
    match reference:
        case RegistryReference() | LayoutReference():
            if places:
                return open_places(places, settings)  # what is there is named by digest, as the pins are
            source = open_image_source(reference, settings)
            for blob_id, pin in pins.items():
                if match := _DIGEST_PIN.fullmatch(pin):
                    source.expect(blob_id, int(match[1]))
            return source
        case HttpReference(url):
            key = url_id(url)
            mine = {key: pins.pop(key)} if key in pins else {}
            image = HttpBackend(HttpClient(HttpLimits.of(settings)), objects={key: url}, pins=mine)
            return FirstOf([image, open_places(places, settings, pins=pins)]) if places else image
        case FileReference(path) | PathReference(path):
            # Also by name: a blob that holds its own bootstrap is named by its file (rafs-v6 2.3).
            files = {path_id(path): path, path.name.partition(".")[0]: path}
            if places:
                return open_places(places, settings, files=files, pins=pins)
            return LocalBackend(files=files, pins=pins)
        case ArchiveReference() | S3Reference():
            raise unmountable(reference)
        case _:
            assert_never(reference)
