"""LZ4 blocks: no frame, no size prefix; the image says how many bytes come out."""

from __future__ import annotations

import lz4.block  # type: ignore[import-untyped]

from erofsd.errors import CodecError


class Lz4BlockCodec:
    """One raw LZ4 block a unit (rafs-v6.md, section 5.1)."""

    name = "lz4_block"

    def decompress_into(self, source: memoryview, target: memoryview) -> None:
        """See `erofsd.codecs.base.Codec`."""
        try:
            # The library decodes only into bytes of its own, of exactly the size we state: that is the bound.
            data = lz4.block.decompress(source, uncompressed_size=len(target))
        except (lz4.block.LZ4BlockError, ValueError) as exc:
            raise CodecError(f"lz4_block: {exc}") from exc
        if len(data) != len(target):
            raise CodecError(f"lz4_block: {len(data)} bytes came out, {len(target)} expected")
        target[:] = data
