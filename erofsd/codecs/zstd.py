"""Zstandard frames, one a unit.

Streams into the caller's buffer: a ``bytes`` of 1 MiB for each chunk costs two threads half of their speed
(page faults and munmap contend for the address space), measured as 1.4-2.2 against 0.9-1.25 ms a MiB.
"""

from __future__ import annotations

import threading

import zstandard

from erofsd.errors import CodecError

# The window is the only memory a frame can ask for beyond the target. RFC 8878 section 3.1.1.1.2 recommends
# support for 8 MiB; a frame with its content size never needs more than that size.
_WINDOW_SIZE_MIN_LIMIT = 8 << 20
_WINDOW_SIZE_MAX = 1 << 27
_RAW_BLOCK, _RLE_BLOCK, _COMPRESSED_BLOCK = range(3)


def _frame_length(source: memoryview, header_size: int, has_checksum: bool) -> int:
    """Where the frame that begins *source* ends; past the end of *source* if it is cut off.

    Source: RFC 8878, section 3.1.1.2 "Blocks".
    """
    at = header_size
    while at + 3 <= len(source):
        header = source[at] | source[at + 1] << 8 | source[at + 2] << 16
        at += 3 + (1 if (header >> 1) & 3 == _RLE_BLOCK else header >> 3)
        if header & 1:
            return at + (4 if has_checksum else 0)
    return len(source) + 1


class ZstdCodec:
    """Exactly one frame, without dictionary."""

    name = "zstd"

    def __init__(self) -> None:
        self._thread = threading.local()  # a decompressor serves one thread at a time

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        decompressor: zstandard.ZstdDecompressor | None = getattr(self._thread, "decompressor", None)
        if decompressor is None:
            decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_SIZE_MAX)
            self._thread.decompressor = decompressor
        return decompressor

    def decompress_into(self, source: memoryview, target: memoryview) -> None:
        """See `erofsd.codecs.base.Codec`."""
        try:
            self._check(source, len(target))
            reader = self._decompressor().stream_reader(source, read_size=max(len(source), 1))
            done = 0
            while done < len(target):
                count = reader.readinto(target[done:])
                if count == 0:
                    raise CodecError(f"zstd: {done} bytes came out, {len(target)} expected")
                done += count
            # Also has the library check the frame's checksum, which stands after the last byte of content.
            if reader.read(1):
                raise CodecError(f"zstd: more than {len(target)} bytes come out")
        except zstandard.ZstdError as exc:
            raise CodecError(f"zstd: {exc}") from exc

    @staticmethod
    def _check(source: memoryview, size: int) -> None:
        if not source:
            raise CodecError("zstd: no bytes stored")
        frame = zstandard.get_frame_parameters(source)
        if frame.content_size not in (size, zstandard.CONTENTSIZE_UNKNOWN):
            raise CodecError(f"zstd: frame holds {frame.content_size} bytes, {size} expected")
        if frame.window_size > max(size, _WINDOW_SIZE_MIN_LIMIT):
            raise CodecError(
                f"zstd: frame wants a window of {frame.window_size} bytes for {size} bytes of content"
            )
        if frame.dict_id:
            raise CodecError(f"zstd: frame wants dictionary {frame.dict_id}")
        end = _frame_length(source, zstandard.frame_header_size(source), frame.has_checksum)
        if end != len(source):
            what = "is cut off" if end > len(source) else "is followed by other bytes"
            raise CodecError(f"zstd: frame {what} ({len(source)} bytes stored)")
