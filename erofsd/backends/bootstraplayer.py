"""The last layer of a Nydus image: a tar, most often in gzip, with the bootstrap in it.

Source: rafs-v6 7.1; nydus-snapshotter pkg/converter. The layer is foreign bytes: memory is bounded whatever
it claims, and nothing but regular files with expected names is taken out of it.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import zstandard

from erofsd.errors import CorruptImage

UNPACKED_MAX = 1 << 30
# Metadata compress well, empty tables very well; what grows more than this beyond RATIO_FREE is a bomb.
RATIO_MAX = 200
RATIO_FREE = 64 << 20
_PIECE_SIZE = 256 << 10
_WINDOW_MAX = 128 << 20  # of zstd: what `zstd -d` accepts by itself

BOOTSTRAP_NAMES = ("image/image.boot", "image.boot")
_META_SUFFIX = ".blob.meta"


@dataclass(frozen=True, slots=True)
class BootstrapLayer:
    """What the layer held.

    Attributes:
        blob_metas: Contents of the ``.blob.meta`` files by blob id.
        diff_id: Digest of the tar.
    """

    bootstrap: bytes
    blob_metas: Mapping[str, bytes]
    diff_id: str


def unpack_bootstrap_layer(layer: bytes, name: str) -> BootstrapLayer:
    """Take the bootstrap out of *layer*. Blocks; give it a thread.

    Args:
        name: For messages.

    Raises:
        CorruptImage: It is no such layer, is damaged, or grows beyond all measure.
    """
    tar = _Unpacker(layer, name)
    bootstrap: bytes | None = None
    blob_metas: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=tar, mode="r|", bufsize=tarfile.BLOCKSIZE * 128) as archive:
            for member in archive:
                path = member.name.removeprefix("./")
                directory, _, file_name = path.rpartition("/")
                wanted = path in BOOTSTRAP_NAMES
                is_meta = directory in ("image", "") and file_name.endswith(_META_SUFFIX)
                if not (wanted or is_meta):
                    continue
                file = archive.extractfile(member) if member.isreg() else None
                if file is None:
                    raise CorruptImage(f"{name}: {path} in it is no regular file")
                if wanted:
                    bootstrap = file.read()
                else:
                    blob_metas[file_name.removesuffix(_META_SUFFIX)] = file.read()
        tar.drain()
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as exc:
        raise CorruptImage(f"{name}: not a sound tar: {exc}") from exc
    if bootstrap is None:
        raise CorruptImage(f"{name}: holds no {BOOTSTRAP_NAMES[0]}")
    return BootstrapLayer(bootstrap, blob_metas, f"sha256:{tar.sha256.hexdigest()}")


class _Unpacker(io.RawIOBase):
    """The unpacked bytes of a layer, as tarfile wants to read them; hashed and counted."""

    def __init__(self, layer: bytes, name: str) -> None:
        self._name = name
        self._limit = min(UNPACKED_MAX, max(RATIO_FREE, RATIO_MAX * len(layer)))
        self._unpack = _unpacker_of(layer)
        self._rest = memoryview(b"")
        self._count = 0
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """At most *size* bytes; empty only at the end."""
        if not self._rest:
            self._rest = memoryview(self._more())
        piece = bytes(self._rest[:size] if size >= 0 else self._rest)
        self._rest = self._rest[len(piece) :]
        return piece

    def drain(self) -> None:
        """Go on to the end: the digest is of all of it, and damage there is damage too."""
        while self.read(_PIECE_SIZE):
            pass

    def _more(self) -> bytes:
        try:
            piece = self._unpack()
        except (zlib.error, zstandard.ZstdError, EOFError) as exc:
            raise CorruptImage(f"{self._name}: does not decompress: {exc}") from exc
        self._count += len(piece)
        if self._count > self._limit:
            raise CorruptImage(f"{self._name}: grows to more than {self._limit} bytes when decompressed")
        self.sha256.update(piece)
        return piece


def _unpacker_of(layer: bytes) -> Callable[[], bytes]:
    """A function that gives the next unpacked piece with each call, and nothing at the end."""
    if layer.startswith(b"\x1f\x8b"):
        return _Gunzip(layer).more
    if layer.startswith(b"\x28\xb5\x2f\xfd"):
        reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX).stream_reader(
            layer, read_across_frames=True
        )
        return lambda: reader.read(_PIECE_SIZE)
    stream = io.BytesIO(layer)
    return lambda: stream.read(_PIECE_SIZE)


class _Gunzip:
    """gzip, of one or more members, in pieces of bounded size."""

    def __init__(self, layer: bytes) -> None:
        self._input = layer
        self._member = zlib.decompressobj(wbits=31)

    def more(self) -> bytes:
        """The next piece.

        Raises:
            zlib.error, EOFError: The stream is damaged, or ends early.
        """
        while True:
            if self._member.eof:
                self._input = self._member.unused_data.lstrip(b"\0")  # padding, as gzip(1) ignores it
                if not self._input:
                    return b""
                self._member = zlib.decompressobj(wbits=31)
            piece = self._member.decompress(self._input, _PIECE_SIZE)
            self._input = self._member.unconsumed_tail
            if piece:
                return piece
            if not self._member.eof and not self._input:
                raise EOFError("ends early")
