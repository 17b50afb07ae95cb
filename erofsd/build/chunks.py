"""The chunks of an image under construction, and those of other images that need not be stored again."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

from erofsd.build.digests import DigestIndex
from erofsd.errors import UsageError
from erofsd.images.rafs6 import format as rafs
from erofsd.images.rafs6.blobmeta import ChunkColumns, cache_form, parse_blob_meta
from erofsd.images.rafs6.bootstrap import Bootstrap
from erofsd.images.rafs6.layout import build_layouts
from erofsd.images.tree import ChunkSet, PackedBlob

CHUNK_COMPRESSED = 0x1  # flags of the chunk table: rafs-v6 2.4
CHUNK_BATCH = 0x8


class Dictionary:
    """Chunks of other images, by digest.

    Args:
        chunk_size, digest: Of the image that is built; see BuildOptions.
    """

    def __init__(self, chunk_size: int, digest: str) -> None:
        self.chunks = ChunkSet()
        self._chunk_size = chunk_size
        self._digest = digest
        self._known = DigestIndex(self.chunks.digests)

    def add_image(self, bootstrap: Bootstrap, metas: Mapping[str, bytes]) -> None:
        """Take the chunks that *bootstrap* states; a digest that is known already keeps its place.

        Args:
            metas: Chunk information by blob id, in either form; see `erofsd.images.open.fetch_blob_metas`.

        Raises:
            UsageError: The image counts in other chunks, or digests.
            CorruptImage: Its tables contradict each other.
        """
        if bootstrap.blobs and bootstrap.chunk_size != self._chunk_size:
            raise UsageError(
                f"{bootstrap.name}: has chunks of {bootstrap.chunk_size} bytes, not of {self._chunk_size}",
                hint="A chunk dictionary needs the chunk size of the image that is built (--chunk-size).",
            )
        columns = [
            parse_blob_meta(f"{bootstrap.name}: blob.meta of {b.blob_id}", b, metas[b.blob_id])
            if b.chunk_count
            else ChunkColumns()
            for b in bootstrap.blobs
        ]
        for blob, layout in zip(bootstrap.blobs, build_layouts(bootstrap, columns), strict=True):
            if rafs.DIGESTERS[blob.digester] != self._digest:
                raise UsageError(
                    f"{bootstrap.name}: has digests of {layout.digester}, not of {self._digest}",
                    hint="A chunk dictionary needs the digests of the image that is built (--digest).",
                )
            number = len(self.chunks.blobs)
            batches = bool(blob.features & rafs.BATCH_CHUNKS)
            used = False
            for chunk in range(layout.chunk_count):
                digest = layout.digest(chunk)
                if not layout.stated[chunk] or self._known.find(digest) is not None:
                    continue
                used = True
                unit = layout.chunk_unit[chunk]
                member = batches and layout.unit_size[unit] != layout.chunk_size[chunk]
                row = add_row(
                    self.chunks,
                    digest,
                    blob=number,
                    index=chunk,
                    offset=layout.chunk_offset[chunk],
                    size=layout.chunk_size[chunk],
                    stored_offset=layout.unit_offset[unit],
                    stored_size=layout.unit_stored[unit],
                    flags=(CHUNK_COMPRESSED if layout.unit_packed[unit] else 0)
                    | (CHUNK_BATCH if member else 0),
                )
                self._known.add(row)
            if used:
                meta = cache_form(bootstrap.name, blob, metas[blob.blob_id])
                self.chunks.blobs.append(_packed(blob, layout.digester or self._digest, meta))

    def find(self, digest: bytes, size: int) -> int | None:
        """The number in ``chunks`` of a chunk with these bytes."""
        number = self._known.find(digest)
        return number if number is not None and self.chunks.size[number] == size else None


def _packed(blob: rafs.BlobEntry, digester: str, meta: bytes) -> PackedBlob:
    return PackedBlob(
        blob_id=blob.blob_id,
        stored_size=blob.compressed_size,
        size=blob.uncompressed_size,
        codec=blob.codec,
        digester=digester,
        features=blob.features,
        ci_offset=blob.ci_offset,
        ci_stored=blob.ci_compressed_size,
        ci_size=blob.ci_uncompressed_size,
        ci_codec=rafs.COMPRESSORS[blob.ci_compressor],
        toc_size=blob.toc_size,
        toc_digest=blob.toc_digest,
        blob_meta=meta,
        chunk_count=blob.chunk_count,
    )


class ImageChunks:
    """The chunk set of one image under construction; a chunk of a foreign blob enters it once.

    Attributes:
        chunks: What the numbers in the image's tree mean.
    """

    def __init__(self, dictionary: Dictionary | None = None) -> None:
        self.chunks = ChunkSet()
        self._dictionary = dictionary
        self._blobs: dict[str, int] = {}  # by blob id
        self._foreign: dict[tuple[int, int], int] = {}  # by blob and index in it

    def find(self, digest: bytes, size: int) -> int | None:
        """The number here of a chunk with these bytes that the dictionary has."""
        if self._dictionary is None:
            return None
        row = self._dictionary.find(digest, size)
        if row is None:
            return None
        return self.adopt(self._dictionary.chunks, row)

    def adopt(self, other: ChunkSet, row: int) -> int:
        """The number here of chunk *row* of another set, whose blob is finished."""
        blob = self.blob(other.blobs[other.blob[row]])
        place = blob, other.index[row]
        number = self._foreign.get(place)
        if number is None:
            number = self._foreign[place] = add_row(
                self.chunks,
                other.digest(row),
                blob=blob,
                index=other.index[row],
                offset=other.offset[row],
                size=other.size[row],
                stored_offset=other.stored_offset[row],
                stored_size=other.stored_size[row],
                flags=other.flags[row],
                crc=other.crc[row],
            )
        return number

    def blob(self, blob: PackedBlob) -> int:
        """The index of *blob* in ``chunks.blobs``, where it is appended if it is new."""
        number = self._blobs.setdefault(blob.blob_id, len(self.chunks.blobs))
        if number == len(self.chunks.blobs):
            self.chunks.blobs.append(blob)
        return number


def add_row(
    chunks: ChunkSet,
    digest: bytes,
    *,
    blob: int = 0,
    index: int = 0,
    offset: int = 0,
    size: int,
    stored_offset: int = 0,
    stored_size: int = 0,
    flags: int = 0,
    crc: int = 0,
) -> int:
    """Append a chunk; returns its number."""
    number = len(chunks.blob)
    chunks.blob.append(blob)
    chunks.index.append(index)
    chunks.offset.append(offset)
    chunks.size.append(size)
    chunks.stored_offset.append(stored_offset)
    chunks.stored_size.append(stored_size)
    chunks.flags.append(flags)
    chunks.crc.append(crc)
    chunks.digests += digest
    return number


def shifted(numbers: array[int], base: int) -> array[int]:
    """Chunk numbers, each moved by *base*; holes stay holes."""
    return array("q", [number + base if number >= 0 else number for number in numbers])
