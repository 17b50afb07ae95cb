"""An OCI image layout, a directory of blobs with an index, as a source.

Source: opencontainers/image-spec, image-layout.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from erofsd.backends.documents import (
    INDEX_MAX,
    INDEX_TYPES,
    REF_NAME,
    Descriptor,
    Document,
    Index,
    checked_document,
    parse_document,
    parse_index,
)
from erofsd.backends.localfs import LocalBackend, translate
from erofsd.errors import BlobNotFound, UnsupportedImage, UsageError

_NESTING_MAX = 4


class LayoutBackend(LocalBackend):
    """The images of one layout; an ImageSource."""

    def __init__(self, path: Path) -> None:
        super().__init__((path,))
        self._path = path

    @property
    def name(self) -> str:
        """``oci:DIR``."""
        return f"oci:{self._path}"

    async def fetch_document(self, selector: str | None) -> Document:
        """See ImageSource."""
        return await asyncio.to_thread(self._fetch_document, selector)

    def _fetch_document(self, selector: str | None) -> Document:
        if selector is not None and ":" in selector:
            return self._read_document(selector, "")
        index = parse_index(self._read("index.json"), f"{self.name}: index.json")
        if selector is None:
            chosen = self._only(index)
        else:
            named = (d for d in self._walk(index, 0) if d.annotation(REF_NAME) == selector)
            found = next(named, None)
            if found is None:
                raise BlobNotFound(f"{self.name}: has no {selector}", hint=_tags(index))
            chosen = found
        return self._read_document(chosen.digest, chosen.media_type)

    def _only(self, index: Index) -> Descriptor:
        if len(index.manifests) != 1:
            raise UsageError(
                f"{self.name}: holds {len(index.manifests)} images: say which", hint=_tags(index)
            )
        return index.manifests[0]

    def _walk(self, index: Index, depth: int) -> Iterator[Descriptor]:
        """All descriptors, those of nested indexes last."""
        yield from index.manifests
        if depth < _NESTING_MAX:
            for descriptor in index.manifests:
                if descriptor.media_type in INDEX_TYPES:
                    inner = parse_document(self._read_document(descriptor.digest, descriptor.media_type))
                    if isinstance(inner, Index):
                        yield from self._walk(inner, depth + 1)

    def _read_document(self, digest: str, media_type: str) -> Document:
        algorithm, _, name = digest.partition(":")
        body = self._read(f"blobs/{algorithm}/{name}")
        return checked_document(body, media_type, digest, f"{self.name}@{digest}")

    def _read(self, name: str) -> bytes:
        path = self._path / name
        try:
            with path.open("rb") as file:
                body = file.read(INDEX_MAX + 1)
        except OSError as exc:
            raise translate(exc, str(path)) from exc
        self.requests += 1
        self.transferred_bytes += len(body)
        if len(body) > INDEX_MAX:
            raise UnsupportedImage(f"{path}: more than {INDEX_MAX} bytes are too many for a manifest")
        return body


def _tags(index: Index) -> str:
    tags = [tag for d in index.manifests if (tag := d.annotation(REF_NAME))]
    return f"it has: {', '.join(tags)}" if tags else ""
