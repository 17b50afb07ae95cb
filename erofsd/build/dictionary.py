"""``--chunk-dict``: images whose chunks need not be stored again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path

from erofsd.backends.located import Located, locate
from erofsd.backends.measured import MeasuredBackend, streaming
from erofsd.backends.places import FirstOf
from erofsd.backends.reference import RegistryReference, parse_reference
from erofsd.backends.settings import SourceSettings
from erofsd.build.chunks import Dictionary
from erofsd.build.options import BuildOptions
from erofsd.errors import BlobCorrupt, UsageError
from erofsd.images.open import fetch_blob_metas
from erofsd.images.rafs6.bootstrap import Bootstrap, parse_bootstrap
from ondemand.ranges import Range


class Dictionaries:
    """Chunk dictionaries that are open. Those named first are preferred.

    Attributes:
        chunks: What a packer looks its chunks up in; None if there are no dictionaries.
        fingerprint: Changes whenever a layer may become another one because of them.
    """

    def __init__(self, options: BuildOptions) -> None:
        self._options = options
        self._located: list[tuple[Located, Bootstrap]] = []
        self.chunks: Dictionary | None = None
        self.fingerprint = ""

    async def open(self, references: Sequence[str], settings: SourceSettings) -> None:
        """Find all of *references*.

        Raises:
            UsageError: One has other chunks or digests than the image that is built, or is no RAFS image.
            ImageRefused, SourceError: One cannot be read.
        """
        for text in references:
            located = await locate(parse_reference(text), settings=settings)
            if located.bootstrap is None:
                await located.backend.aclose()
                raise UsageError(f"{text}: a plain EROFS image has no chunk digests: it is no dictionary")
            metas = await fetch_blob_metas(located)
            bootstrap = await asyncio.to_thread(
                parse_bootstrap, f"{text}: bootstrap", located.bootstrap, located.primary
            )
            self._located.append((located, bootstrap))
            self.chunks = self.chunks or Dictionary(self._options.chunk_size, self._options.digest)
            await asyncio.to_thread(self.chunks.add_image, bootstrap, metas)
            digest = hashlib.sha256(located.bootstrap).hexdigest()
            self.fingerprint = f"{self.fingerprint} dict={digest}"

    @property
    def blobs(self) -> MeasuredBackend | None:
        """All of their blobs; None if there are no dictionaries."""
        backends = [located.backend for located, _ in self._located]
        return FirstOf(backends) if backends else None

    def has(self, blob_id: str) -> bool:
        """True if *blob_id* is one of theirs."""
        return any(blob.blob_id == blob_id for _, bootstrap in self._located for blob in bootstrap.blobs)

    def repositories(self, host: str, blob_id: str) -> list[str]:
        """Repositories of the registry *host* that have the blob."""
        found = []
        for located, bootstrap in self._located:
            reference = parse_reference(located.ref)
            mine = isinstance(reference, RegistryReference) and reference.host == host
            if mine and any(blob.blob_id == blob_id for blob in bootstrap.blobs):
                assert isinstance(reference, RegistryReference)  # mine says so
                found.append(reference.repository)
        return found

    def all_repositories(self, host: str) -> list[str]:
        """Repositories of the registry *host* that dictionaries are in."""
        references = (parse_reference(located.ref) for located, _ in self._located)
        return [r.repository for r in references if isinstance(r, RegistryReference) and r.host == host]

    async def size(self, blob_id: str) -> int:
        """Stored size of one of their blobs, which its bootstrap need not know."""
        assert self.blobs is not None  # it has one
        return await self.blobs.size(blob_id)

    async def fetch(self, blob_id: str, path: Path) -> None:
        """Write one of their blobs to *path*.

        Raises:
            BlobCorrupt: It has not the digest that is its name.
            SourceError: It cannot be had.
        """
        assert self.blobs is not None  # it has one
        size = await self.blobs.size(blob_id)
        hasher = hashlib.sha256()
        with path.open("wb") as file:
            async with streaming(self.blobs, blob_id, Range(0, size)) as pieces:
                async for piece in pieces:
                    hasher.update(piece)
                    file.write(piece)
        if hasher.hexdigest() != blob_id:
            raise BlobCorrupt(f"{self.blobs.name}: blob {blob_id} has digest sha256:{hasher.hexdigest()}")

    async def aclose(self) -> None:
        """Close all connections."""
        for located, _ in self._located:
            await located.backend.aclose()
