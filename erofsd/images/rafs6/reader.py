"""Reads the tree of a RAFS v6 image: EROFS, with a chunk index that means more than EROFS knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import iter_unpack

from erofsd.blobs.layout import BlobLayout
from erofsd.errors import CorruptImage
from erofsd.images.erofs import format as erofs
from erofsd.images.erofs.format import Inode
from erofsd.images.erofs.reader import ErofsReader, Extent, ReadDevice, joined
from erofsd.images.rafs6 import format as fmt
from erofsd.images.rafs6.bootstrap import Bootstrap
from erofsd.images.source import BytesSource, corrupt


class RafsReader(ErofsReader):
    """A RAFS v6 bootstrap.

    Nydus and the kernel read the same chunk index differently: Nydus takes one entry a RAFS chunk and finds
    the chunk by its index, the kernel takes one entry a format-word chunk and finds the block. This reader
    demands that both see the same.

    Args:
        layouts: The blobs, to check chunk indexes against; None leaves that check out.
        read_device: Gives decoded bytes of blobs.
    """

    def __init__(
        self,
        bootstrap: Bootstrap,
        layouts: Sequence[BlobLayout] | None = None,
        read_device: ReadDevice | None = None,
    ) -> None:
        super().__init__(BytesSource(bootstrap.name, bootstrap.data), read_device)
        self.bootstrap = bootstrap
        self._layouts = layouts

    def chunk_extents(self, inode: Inode) -> Iterator[Extent]:
        """Where a file lies, one RAFS chunk after the other; neighbours are joined. Source: rafs-v6 1.7."""
        return joined(self._chunks(inode))

    def _chunks(self, inode: Inode) -> Iterator[Extent]:
        chunk_size = self.bootstrap.chunk_size
        bits, first, unit = self.chunk_indexes(inode)
        count = -(-inode.size // chunk_size)
        if unit != 8 or inode.word & erofs.CHUNK_48BIT:
            raise self._bad(inode, f"chunk format {inode.word:#x} is not one of RAFS")
        if 1 << bits != chunk_size and inode.size > 1 << bits:
            raise self._bad(inode, f"chunks of {1 << bits} bytes to the kernel, but of {chunk_size} to RAFS")
        one_extent = 1 << bits > chunk_size  # the kernel looks at the first entry only
        start: tuple[int, int] | None = None
        entries = iter_unpack("<HHI", self.source.pread(first, 8 * count))
        for k, (low, middle, block) in enumerate(entries):
            device, chunk = middle & 0xFF, low | (middle >> 8) << 16
            length = min(chunk_size, inode.size - k * chunk_size)
            start = start or (device, block)
            if one_extent and (device, block) != (start[0], start[1] + k * (chunk_size // self.block_size)):
                raise self._bad(inode, f"entry {k} does not follow the first, but the kernel takes it to")
            if block == 0xFFFFFFFF:
                yield Extent(0, None, length)
                continue
            if not device:
                raise self._bad(inode, f"entry {k} points into the bootstrap")
            extent = self.locate(inode, device, block * fmt.BLOCK_SIZE, length)
            self._check_chunk(inode, k, device, chunk, extent)
            yield extent

    def _check_chunk(self, inode: Inode, k: int, device: int, chunk: int, extent: Extent) -> None:
        if self._layouts is None:
            return
        layout = self._layouts[device - 1]
        if chunk >= layout.chunk_count or not layout.stated[chunk]:
            raise self._bad(inode, f"entry {k}: the chunk table has no chunk {chunk} of blob {device - 1}")
        if layout.chunk_offset[chunk] != extent.offset or layout.chunk_size[chunk] < extent.length:
            raise self._bad(inode, f"entry {k}: chunk {chunk} of blob {device - 1} lies elsewhere")

    def _bad(self, inode: Inode, problem: str) -> CorruptImage:
        return corrupt(self.name, inode.tail, f"chunk index of nid {inode.nid}", problem)
