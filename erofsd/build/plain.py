"""Plain EROFS images: one file with everything in it, written from packed but uncompressed layers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from erofsd.backends.located import locate
from erofsd.backends.reference import FileReference
from erofsd.backends.settings import SourceSettings
from erofsd.build import compare
from erofsd.build.assemble import Assembly, not_the_same
from erofsd.build.expected import Expected
from erofsd.build.options import BuildOptions
from erofsd.build.readback import open_located
from erofsd.errors import SourceError
from erofsd.images.erofs.writer import write_image
from erofsd.images.tree import ChunkSet, Node


def spool_options(options: BuildOptions) -> BuildOptions:
    """How content waits in the work directory until the image is written: as it is, equal chunks once."""
    return replace(options, compression="none", level=None, batch_size=0)


def write(assembly: Assembly, path: Path, options: BuildOptions, blobs: Mapping[str, Path]) -> int:
    """Write the EROFS image of *assembly* to *path*; returns its size. Blocks.

    Args:
        blobs: Where the content waits, by blob id.

    Raises:
        UnsupportedImage: More data than EROFS can address.
    """
    spool = _Spool(assembly.chunks, blobs)
    try:
        with path.open("wb") as out:
            return write_image(assembly.root, out, spool.content, chunk_size=options.chunk_size).size
    finally:
        spool.close()


class _Spool:
    """Gives content back."""

    def __init__(self, chunks: ChunkSet, blobs: Mapping[str, Path]) -> None:
        self._chunks = chunks
        self._fds: list[int] = []
        for packed in chunks.blobs:
            self._fds.append(os.open(blobs[packed.blob_id], os.O_RDONLY | os.O_CLOEXEC))

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)

    def content(self, node: Node) -> Iterator[bytes]:
        chunks = self._chunks
        for chunk in node.chunks:
            size = chunks.size[chunk]
            data = os.pread(self._fds[chunks.blob[chunk]], size, chunks.stored_offset[chunk])
            if len(data) != size:
                raise SourceError(f"blob {chunks.blobs[chunks.blob[chunk]].blob_id}: became shorter")
            yield data


async def prove(
    name: str, expected: Expected, path: Path, settings: SourceSettings, tell: Callable[[int], None]
) -> compare.Comparison:
    """Read the image at *path* back and compare it with the source's tree.

    Raises:
        NotTheSame: The message names the first differences.
        ImageRefused: It cannot be read back.
    """
    located = await locate(FileReference(path), settings=settings)
    assert located.primary is not None  # it is a plain EROFS image
    try:
        image = await open_located(located, {located.primary: path})
        try:
            items = compare.image_items(image.tree)
            # One thread: see ReadBack.
            result = await asyncio.to_thread(compare.compare, expected.items(), items, tell=tell)
        finally:
            image.close()
    finally:
        await located.backend.aclose()
    if not result.same:
        raise not_the_same(name, result)
    return result
