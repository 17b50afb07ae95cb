"""Joins a bootstrap and the chunk information of its blobs to what the fill path works with."""

from __future__ import annotations

from collections.abc import Sequence

from erofsd.blobs.layout import DIGEST_SIZE, BlobLayout
from erofsd.images.rafs6 import format as fmt
from erofsd.images.rafs6.blobmeta import ChunkColumns
from erofsd.images.rafs6.bootstrap import Bootstrap
from erofsd.images.source import corrupt


def build_layouts(bootstrap: Bootstrap, metas: Sequence[ChunkColumns]) -> tuple[BlobLayout, ...]:
    """One layout a blob, in the order of device slots.

    The chunk table is the only place with digests that belong to the image (a blob carries its own, but the
    blob is what has to be verified). It is joined by (blob, chunk index); its order means nothing.

    Args:
        metas: One a blob.

    Raises:
        CorruptImage: The chunk table contradicts a blob, or itself.
    """
    name = bootstrap.name
    stated = [bytearray(blob.chunk_count) for blob in bootstrap.blobs]
    digests = [bytearray(DIGEST_SIZE * blob.chunk_count) for blob in bootstrap.blobs]
    places = [(m.chunk_offset, m.chunk_size) for m in metas]
    # fmt: off
    for i, (digest, blob, _flags, _stored, size, _stored_at, offset, _file_at, chunk, _crc) in enumerate(
        fmt.CHUNK.iter_unpack(bootstrap.chunk_table)
    ):
        # fmt: on
        at = bootstrap.chunk_table_offset + i * fmt.CHUNK.size
        if blob >= len(stated) or chunk >= len(stated[blob]):
            raise corrupt(name, at + 32, "chunk table", f"chunk {chunk} of blob {blob} does not exist")
        offsets, sizes = places[blob]
        if offsets[chunk] != offset or sizes[chunk] != size:
            problem = f"chunk {chunk} of blob {blob} is {size} bytes at {offset}, but the blob says otherwise"
            raise corrupt(name, at + 40, "chunk table", problem)
        place = slice(chunk * DIGEST_SIZE, (chunk + 1) * DIGEST_SIZE)
        if stated[blob][chunk] and digests[blob][place] != digest:
            raise corrupt(name, at, "chunk table", f"two digests for chunk {chunk} of blob {blob}")
        stated[blob][chunk] = 1
        digests[blob][place] = digest
    return tuple(
        BlobLayout(
            blob_id=blob.blob_id,
            size=blob.uncompressed_size,
            stored_size=blob.stored_size,
            codec=blob.codec,
            digester=fmt.DIGESTERS[blob.digester],
            chunk_offset=meta.chunk_offset,
            chunk_size=meta.chunk_size,
            chunk_unit=meta.chunk_unit,
            chunk_at=meta.chunk_at,
            stated=bytes(stated[i]),
            digests=bytes(digests[i]),
            unit_offset=meta.unit_offset,
            unit_stored=meta.unit_stored,
            unit_size=meta.unit_size,
            unit_packed=bytes(meta.unit_packed),
        )
        for i, (blob, meta) in enumerate(zip(bootstrap.blobs, metas, strict=True))
    )
