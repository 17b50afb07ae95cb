"""Images as the daemon has them: opened from their source once, from the state directory ever after."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec

from erofsd.api import MountRequest
from erofsd.backends.located import Located, locate, open_source
from erofsd.backends.measured import MeasuredBackend
from erofsd.backends.settings import SourceSettings, settings_for_deadline
from erofsd.blobs.layout import BlobLayout, uniform_layout
from erofsd.config import Config
from erofsd.daemon.state import ImageFiles, MountRecord, SavedImage
from erofsd.errors import CorruptImage
from erofsd.images.base import Image
from erofsd.images.open import fetch_blob_metas, open_image
from ondemand.ranges import Range, RangeSet


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """An image ready to be bound.

    Attributes:
        key: Its name in the state directory; stands for content.
        digest: Of the manifest, or empty.
        source: To be closed with the mount.
    """

    key: str
    image: Image
    digest: str
    source: MeasuredBackend


class ImageLoader:
    """Opens images.

    Args:
        files: Where they are stored.
    """

    def __init__(self, files: ImageFiles, config: Config) -> None:
        self.files = files
        self._used: Counter[str] = Counter()
        self._settings = settings_for_deadline(config.deadline, config.registry)

    def _settings_for(self, *, plain_http: bool) -> SourceSettings:
        return msgspec.structs.replace(self._settings, plain_http=plain_http)

    async def fetch(self, request: MountRequest) -> OpenedImage:
        """Find, open and store what *request* names.

        Raises:
            ErofsdError: ImageRefused, SourceError or UsageError.
        """
        settings = self._settings_for(plain_http=request.plain_http)
        located = await locate(request.ref, settings=settings, blobs=request.blobs or None)
        try:
            if located.kind == "rafs":
                located = replace(located, blob_metas=await fetch_blob_metas(located))
            image = await open_image(located)
            saved = _describe(located, image)
            key = _key(saved, located.bootstrap, located.blob_metas)
            self.files.save(key, saved, located.bootstrap, dict(located.blob_metas))
            self._used[key] += 1
        except BaseException:
            await located.backend.aclose()
            raise
        return OpenedImage(key, image, located.digest or "", located.backend)

    async def load(self, record: MountRecord) -> OpenedImage:
        """Open a stored image without asking anybody.

        Raises:
            CorruptImage: What is stored is not what was stored.
        """
        saved, bootstrap, metas = self.files.load(record.image)
        if _key(saved, bootstrap, metas) != record.image:
            raise CorruptImage(
                f"stored image {self.files.path(record.image)}: damaged",
                hint=f"erofsd umount {record.dir}, and mount {record.ref} again",
            )
        blobs = [saved.primary, *saved.devices] if saved.primary else list(saved.devices)
        source = open_source(
            record.ref,
            settings=self._settings_for(plain_http=record.plain_http),
            blobs=record.blobs or None,
            pins={blob_id: pin for blob_id, _, pin in blobs},
        )
        if saved.primary is None:
            located = Located(
                saved.ref, saved.kind, saved.digest, bootstrap, metas, source, saved.holder, (), {}
            )
            image = await open_image(located)
        else:
            image = Image(
                format="erofs",
                bootstrap=None,
                primary=_layout(saved.primary),
                metadata=RangeSet(Range(start, stop) for start, stop in saved.metadata),
                devices=tuple(_layout(device) for device in saved.devices),
                block_size=saved.block_size,
                compressed=saved.compressed,
            )
        self._used[record.image] += 1
        return OpenedImage(record.image, image, saved.digest or "", source)

    def release(self, key: str, *, keep: set[str]) -> None:
        """Whoever opened *key* is done with it; it is deleted when nobody uses it and it is not in *keep*."""
        self._used[key] -= 1
        if not self._used[key] and key not in keep:
            self.files.remove(key)


def _layout(blob: tuple[str, int, str]) -> BlobLayout:
    blob_id, size, pin = blob
    return uniform_layout(blob_id, size, pin=pin)


def _describe(located: Located, image: Image) -> SavedImage:
    def blob(layout: BlobLayout) -> tuple[str, int, str]:
        return layout.blob_id, layout.size, layout.pin

    plain = image.primary is not None
    return SavedImage(
        ref=located.ref,
        kind=located.kind,
        digest=located.digest,
        holder=None if plain else located.primary,
        block_size=image.block_size,
        compressed=image.compressed,
        primary=blob(image.primary) if image.primary is not None else None,
        devices=tuple(blob(layout) for layout in image.devices) if plain else (),
        metadata=tuple((part.start, part.stop) for part in image.metadata),
        blob_ids=tuple(located.blob_metas) if not plain else (),
    )


def _key(saved: SavedImage, bootstrap: bytes | None, metas: Mapping[str, bytes]) -> str:
    """Stands for all that is stored: two images with one key are the same image from the same place."""
    hasher = hashlib.sha256(msgspec.json.encode(saved))
    for part in (bootstrap or b"", *(metas[blob_id] for blob_id in saved.blob_ids)):
        hasher.update(hashlib.sha256(part).digest())
    return hasher.hexdigest()
