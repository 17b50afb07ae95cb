"""DEST: where a finished image goes, and in which form.

A registry and a layout take manifests, which name everything else. A loose image is a file, with its blobs in
a directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from erofsd.backends.documents import Document
from erofsd.backends.push import ImageTarget, open_target
from erofsd.backends.reference import (
    FileReference,
    LayoutReference,
    Reference,
    RegistryReference,
    parse_reference,
)
from erofsd.backends.settings import SourceSettings
from erofsd.build.publish import Json
from erofsd.errors import UsageError

DestinationReference = RegistryReference | LayoutReference | FileReference


@dataclass(frozen=True, slots=True)
class Destination:
    """Where to, as it was asked for.

    Attributes:
        blobs: Directory for the blobs of a loose image.
        tag: What the image is to be called; None: nothing, it is found by digest.
    """

    reference: DestinationReference
    blobs: Path | None
    tag: str | None

    @property
    def loose(self) -> bool:
        """True if the image becomes files without manifests."""
        return isinstance(self.reference, FileReference)

    def open(
        self, settings: SourceSettings, mounts: Sequence[str] = (), *, uploads: Path | None = None
    ) -> ImageTarget:
        """The target of an image with a manifest; see `open_target`."""
        assert not isinstance(self.reference, FileReference)  # see loose
        return open_target(self.reference, settings, mounts=mounts, uploads=uploads)

    def named(self, digest: str) -> str:
        """The reference of the image that was stored there."""
        reference = self.reference
        if self.tag is not None or isinstance(reference, FileReference):
            return str(reference)
        if isinstance(reference, RegistryReference):
            return str(replace(reference, tag=None, digest=digest))
        return str(replace(reference, tag=digest))

    def __str__(self) -> str:
        return str(self.reference)


def parse_destination(
    text: str,
    blobs: Path | None,
    *,
    format_: str = "rafs",
    source: Reference | None = None,
    referrer: bool = False,
) -> Destination:
    """DEST and ``--blobs`` of the command line.

    Args:
        format_: Of the image.
        source: What is converted.
        referrer: The image is to be found from its source.

    Raises:
        UsageError: Nothing can be written there.
    """
    reference = parse_reference(text)
    if not isinstance(reference, RegistryReference | LayoutReference | FileReference):
        raise UsageError(
            f"{text}: no image can be written there",
            hint="docker://host/repo:tag, oci:DIR[:TAG], or file:BOOTSTRAP with --blobs DIR",
        )
    if isinstance(reference, FileReference):
        if referrer:
            raise UsageError(f"{text}: --referrer needs a registry or a layout")
        if blobs is None and format_ == "rafs":
            raise UsageError(f"{text}: its data need a place", hint="name a directory: --blobs DIR")
        return Destination(reference, blobs, None)
    if blobs is not None:
        raise UsageError(f"{text}: --blobs goes with file:BOOTSTRAP; here blobs are layers")
    if reference == source:
        raise UsageError(f"{text}: is the source itself", hint="give the converted image another tag")
    if isinstance(reference, LayoutReference):
        if referrer and not (isinstance(source, LayoutReference) and source.path == reference.path):
            raise UsageError(f"{text}: --referrer: DEST has to be in the layout of SRC")
        return Destination(reference, None, reference.tag or ("latest" if not referrer else None))
    if reference.digest is not None:
        raise UsageError(f"{text}: a digest cannot be chosen", hint="name a tag")
    if referrer and not (
        isinstance(source, RegistryReference)
        and (source.host, source.repository) == (reference.host, reference.repository)
    ):
        raise UsageError(f"{text}: --referrer: DEST has to be in the repository of SRC")
    return Destination(reference, None, reference.tag if _has_tag(text) or not referrer else None)


def _has_tag(text: str) -> bool:
    return ":" in text.rpartition("/")[2]


def subject_of(document: Document, media_type: str) -> Json:
    """The descriptor that a referrer names its subject by."""
    return {"mediaType": media_type, "digest": document.digest, "size": len(document.body)}
