"""From converted layers to a finished image: merged tree, bootstrap, and the proof that nothing was lost."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from erofsd.backends.measured import MeasuredBackend
from erofsd.build import compare
from erofsd.build.chunks import ImageChunks, shifted
from erofsd.build.expected import Expected
from erofsd.build.layers import Layer, merge
from erofsd.build.options import BuildOptions
from erofsd.build.readback import read_back
from erofsd.build.record import LayerRecord
from erofsd.build.source import Warn, show
from erofsd.errors import ErofsdError, ImageRefused
from erofsd.images.rafs6.writer import write_bootstrap
from erofsd.images.tree import ChunkSet, Node, PackedBlob, walk

SHOWN = 10
_COLUMNS = ("index", "offset", "size", "stored_offset", "stored_size", "flags", "crc")


class NotTheSame(ImageRefused):
    """The finished image has another tree than its source: a fault of ours, or of the disk."""


@dataclass(slots=True)
class Assembly:
    """A tree with the chunks that its files have.

    Attributes:
        entries: Names in it.
        content_bytes: Sizes of all regular files, by name.
    """

    root: Node
    chunks: ChunkSet
    entries: int
    content_bytes: int


@dataclass(frozen=True, slots=True)
class WrittenBootstrap:
    """A bootstrap in a file.

    Attributes:
        blobs: What it refers to, in the order of device slots.
    """

    path: Path
    size: int
    blobs: tuple[PackedBlob, ...]

    @property
    def blob_metas(self) -> dict[str, bytes]:
        """Chunk information of all blobs, by blob id."""
        return {blob.blob_id: blob.blob_meta for blob in self.blobs}


def assemble(records: Iterable[LayerRecord], warn: Warn) -> Assembly:
    """Merge layers, lowest first. The nodes of the records become the tree's. Blocks.

    Raises:
        CorruptImage: A layer does not fit those below it.
    """
    image = ImageChunks()
    layers: list[Layer] = []
    for record in records:
        base = len(image.chunks)
        _append(image, record.chunks)
        if base:
            for entry in record.layer.entries:
                if entry.node.chunks:
                    entry.node.chunks = shifted(entry.node.chunks, base)
        layers.append(record.layer)
    root = merge(layers, warn=warn)
    entries = content = 0
    for _, node in walk(root):
        entries += 1
        content += node.size
    return Assembly(root, image.chunks, entries, content)


def _append(image: ImageChunks, other: ChunkSet) -> None:
    """Put all chunks of *other* behind those of *image*; what both have is there twice, and meant so."""
    numbers = [image.blob(blob) for blob in other.blobs]
    image.chunks.blob.extend(array("H", [numbers[blob] for blob in other.blob]))
    for name in _COLUMNS:
        getattr(image.chunks, name).extend(getattr(other, name))
    image.chunks.digests += other.digests


def write(
    assembly: Assembly, path: Path, options: BuildOptions, prefetch: Sequence[bytes], warn: Warn
) -> WrittenBootstrap:
    """Write the RAFS bootstrap of *assembly* to *path*. Blocks.

    Args:
        prefetch: Paths in the image, most urgent first.

    Raises:
        UnsupportedImage: More than RAFS v6 can hold.
    """
    with path.open("wb") as out:
        written = write_bootstrap(
            assembly.root,
            assembly.chunks,
            out,
            chunk_size=options.chunk_size,
            prefetch=_nodes(assembly.root, prefetch, warn),
            codec=options.compression,
            digester=options.digest,
        )
    return WrittenBootstrap(path, written.size, written.blobs)


def _nodes(root: Node, paths: Sequence[bytes], warn: Warn) -> list[Node]:
    found: list[Node] = []
    for path in paths:
        node: Node | None = root
        for name in filter(None, path.split(b"/")):
            node = node.children.get(name) if node is not None else None
        if node is None:
            warn(f"prefetch list: {show(path)} is not in the image")
        else:
            found.append(node)
    return found


async def prove(
    name: str,
    expected: Expected,
    bootstrap: WrittenBootstrap,
    files: Mapping[str, Path],
    others: MeasuredBackend | None,
    threads: int,
    tell: Callable[[int], None],
) -> compare.Comparison:
    """Read the image back and compare it with the source's tree.

    Args:
        expected: The source's tree.
        files: Blobs of this machine, by blob id.
        others: Has all others.

    Raises:
        NotTheSame: The message names the first differences.
        ImageRefused, SourceError: It cannot be read back.
    """
    body = await asyncio.to_thread(bootstrap.path.read_bytes)
    found = await read_back(name, body, bootstrap.blob_metas, files, others)
    del body
    try:
        items = compare.image_items(found.tree)
        result = await asyncio.to_thread(compare.compare, expected.items(), items, threads=threads, tell=tell)
    finally:
        found.close()
    if not result.same:
        raise not_the_same(name, result)
    return result


def not_the_same(name: str, result: compare.Comparison) -> ErofsdError:
    """The error for a comparison that found something."""
    shown = "; ".join(str(difference) for difference in result.differences[:SHOWN])
    more = f"; and {result.count - SHOWN} more" if result.count > SHOWN else ""
    return NotTheSame(
        f"{name}: its tree is not that of its source: {shown}{more}",
        hint="nothing was published; please report it, with the source if that is possible",
    )
