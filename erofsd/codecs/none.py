"""Stored as it is."""

from __future__ import annotations

from erofsd.errors import CodecError


class NoneCodec:
    """Copies."""

    name = "none"

    def decompress_into(self, source: memoryview, target: memoryview) -> None:
        """See `erofsd.codecs.base.Codec`."""
        if len(source) != len(target):
            raise CodecError(f"none: {len(source)} bytes stored for {len(target)}")
        target[:] = source
