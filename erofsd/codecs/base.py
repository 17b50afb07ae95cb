"""How chunks are packed: the seam every codec implements."""

from __future__ import annotations

from typing import Protocol

from ondemand.registry import Registry


class Codec(Protocol):
    """Decompresses one unit at a time. Thread-safe; releases the GIL for large inputs."""

    @property
    def name(self) -> str: ...

    def decompress_into(self, source: memoryview, target: memoryview) -> None:
        """Decompress *source* so that it fills *target* exactly.

        Raises:
            CodecError: *source* is damaged, or does not give exactly ``len(target)`` bytes. Memory used is
                bounded by ``len(target)``, whatever *source* says.
        """
        ...


CODECS: Registry[type[Codec]] = Registry(
    "erofsd.codecs",
    {
        "none": "erofsd.codecs.none:NoneCodec",
        "lz4_block": "erofsd.codecs.lz4:Lz4BlockCodec",
        "gzip": "erofsd.codecs.deflate:GzipCodec",
        "zstd": "erofsd.codecs.zstd:ZstdCodec",
    },
)
