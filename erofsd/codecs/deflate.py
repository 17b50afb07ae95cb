"""gzip members (RFC 1952), one a unit."""

from __future__ import annotations

import zlib

from erofsd.errors import CodecError

_GZIP_WBITS = 31  # zlib.h, inflateInit2: 15 for the window, plus 16 for a gzip header and nothing else
_STEP = 256 << 10  # stored bytes a step; the rest of a step's input is copied once for each MAX_OUTPUT
_MAX_OUTPUT = 1 << 20


class GzipCodec:
    """Exactly one gzip member; its CRC and length are checked by zlib, trailing bytes are refused."""

    name = "gzip"

    def decompress_into(self, source: memoryview, target: memoryview) -> None:
        """See `erofsd.codecs.base.Codec`."""
        inflater = zlib.decompressobj(_GZIP_WBITS)
        done = 0
        try:
            for start in range(0, len(source), _STEP):
                pending: memoryview | bytes = source[start : start + _STEP]
                while pending and not inflater.eof:
                    # One byte more than fits: a member that is too long shows, and costs no memory.
                    room = len(target) - done + 1
                    data = inflater.decompress(pending, min(room, _MAX_OUTPUT))
                    if len(data) == room:
                        raise CodecError(f"gzip: more than {len(target)} bytes come out")
                    target[done : done + len(data)] = data
                    done += len(data)
                    pending = inflater.unconsumed_tail
                if inflater.eof and (inflater.unused_data or start + _STEP < len(source)):
                    raise CodecError("gzip: bytes after the member's end")
        except zlib.error as exc:
            raise CodecError(f"gzip: {exc}") from exc
        if not inflater.eof:
            raise CodecError(f"gzip: member is cut off after {len(source)} bytes")
        if done != len(target):
            raise CodecError(f"gzip: {done} bytes came out, {len(target)} expected")
