"""How units are compressed: one function a build, called by many threads."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import lz4.block  # type: ignore[import-untyped]
import zstandard

from erofsd.build.options import BuildOptions

#: Compresses units, each by itself; None for one that would not become smaller and is stored as it is.
Compress = Callable[[Sequence[memoryview]], list[memoryview | None]]

_GZIP_WBITS = 31  # zlib.h, deflateInit2: 15 for the window, plus 16 for a gzip header without time and name


def make_compress(options: BuildOptions) -> Compress:
    """The function for *options*. What it makes depends on its input only, whichever thread calls it."""
    level = options.level or 0
    match options.compression:
        case "zstd":
            compress = _zstd(level)
        case "lz4_block":
            compress = _each(_lz4(level))
        case "gzip":
            compress = _each(_gzip(level))
        case _:
            return lambda units: [None] * len(units)

    def smaller(units: Sequence[memoryview]) -> list[memoryview | None]:
        packed = compress(units)
        return [new if len(new) < len(old) else None for new, old in zip(packed, units, strict=True)]

    return smaller


def _each(compress: Callable[[memoryview], bytes]) -> Callable[[Sequence[memoryview]], list[memoryview]]:
    return lambda units: [memoryview(compress(unit)) for unit in units]


def _zstd(level: int) -> Callable[[Sequence[memoryview]], list[memoryview]]:
    threads = threading.local()  # a compressor serves one thread at a time, and is worth keeping

    def compress(units: Sequence[memoryview]) -> list[memoryview]:
        compressor: zstandard.ZstdCompressor | None = getattr(threads, "compressor", None)
        if compressor is None:
            # One frame, its content size in it, no checksum, no dictionary: rafs-v6 5.1.
            compressor = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
            threads.compressor = compressor
        if len(units) == 1 or not hasattr(compressor, "multi_compress_to_buffer"):
            return [memoryview(compressor.compress(unit)) for unit in units]
        # One call for all: with a call each the threads hand the GIL to and fro, at half of the speed.
        packed: Any = compressor.multi_compress_to_buffer(list(units), threads=1)
        return [memoryview(packed[i]) for i in range(len(packed))]

    return compress


def _lz4(level: int) -> Callable[[memoryview], bytes]:
    mode = "high_compression" if level else "default"

    def compress(data: memoryview) -> bytes:
        packed: bytes = lz4.block.compress(data, mode=mode, compression=level, store_size=False)
        return packed

    return compress


def _gzip(level: int) -> Callable[[memoryview], bytes]:
    return lambda data: zlib.compress(data, level, _GZIP_WBITS)
