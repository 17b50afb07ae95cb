"""What is done with the stored bytes of one unit, wherever they come from: decompress, compare digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache

from blake3 import blake3

from erofsd.blobs.layout import BlobLayout
from erofsd.codecs.base import CODECS, Codec
from erofsd.errors import BlobCorrupt, UnsupportedImage

# Chunks are 16 MiB at most and batches are made of small ones: a unit beyond this is a claim, not data.
UNIT_SIZE_MAX = 64 << 20

DIGESTERS: dict[str, Callable[[memoryview], bytes]] = {
    "blake3": lambda data: blake3(data).digest(),
    "sha256": lambda data: hashlib.sha256(data).digest(),
}


@cache
def codec_named(name: str) -> Codec:
    """The one instance of a codec.

    Raises:
        UnsupportedImage: There is none of that name here.
    """
    try:
        return CODECS[name]()
    except KeyError:
        raise UnsupportedImage(f"codec {name} is not known") from None


def decode_unit(layout: BlobLayout, unit: int, stored: memoryview) -> memoryview:
    """Decompress one unit.

    Raises:
        BlobCorrupt: It does not give what the image says.
    """
    size = layout.unit_size[unit]
    if size > UNIT_SIZE_MAX:
        raise BlobCorrupt(f"a unit of {size} bytes is larger than any that is made")
    if not layout.unit_packed[unit]:
        if len(stored) != size:
            raise BlobCorrupt(f"{len(stored)} bytes stored as they are, not {size}")
        return stored
    decoded = memoryview(bytearray(size))
    codec_named(layout.codec).decompress_into(stored, decoded)
    return decoded


def verify_chunk(layout: BlobLayout, chunk: int, decoded: memoryview) -> None:
    """Compare *chunk*, in its decoded unit, with the digest that the image states.

    Raises:
        BlobCorrupt: It is another one.
    """
    start, size = layout.chunk_at[chunk], layout.chunk_size[chunk]
    data = decoded[start : start + size]
    if len(data) != size:
        raise BlobCorrupt(f"its unit ends {size - len(data)} bytes before it does")
    if layout.digester is None:
        return
    found, stated = DIGESTERS[layout.digester](data), layout.digest(chunk)
    if found != stated:
        raise BlobCorrupt(f"{layout.digester} is {found.hex()}, the image says {stated.hex()}")
