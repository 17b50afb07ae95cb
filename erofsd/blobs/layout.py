"""What an image states of one blob: where each chunk lies, decoded and packed, and its digest.

Three words, kept apart everywhere:

- a **chunk** is the unit of presence and verification: a decoded range of the blob with a digest;
- a **unit** is what must be fetched and decompressed as a whole. One chunk is one unit, but for batches
  (rafs-v6: many small chunks compressed together), where a unit holds several chunks;
- the **blob** decoded is what the kernel sees as a device: chunks at 4096-aligned offsets, zeros between.

Columns instead of objects: an image may have hundreds of thousands of chunks.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from erofsd.errors import CorruptImage
from ondemand.ranges import Range

DIGEST_SIZE = 32


@dataclass(frozen=True, slots=True)
class BlobLayout:
    """The layout of one blob, as one image states it.

    Chunk columns have one entry a chunk, in ascending ``offset``; unit columns one a unit, in ascending
    ``unit_offset``. The reader that makes a layout has checked all of it: offsets ascend without overlap,
    nothing reaches past ``size`` or ``stored_size``, no chunk is over 16 MiB.

    Attributes:
        blob_id: The blob's name in its backend: only a name, see ``erofsd.blobs.store``.
        size: Decoded size in bytes: the size of the device that the kernel sees.
        stored_size: Size of the object in the backend, or an upper bound where the image states none.
        codec: Name in ``erofsd.codecs.base.CODECS`` for units that are compressed.
        digester: ``"blake3"``, ``"sha256"``, or None where the image carries no digests (plain EROFS).
        pin: What stands for content where there are no digests: a layer digest, or size and ETag. Two layouts
            without digests describe the same bytes only if their pins are equal. Empty with digests.
        chunk_offset: Decoded offset in the blob, bytes.
        chunk_size: Decoded bytes of the chunk, without padding.
        chunk_unit: Index of the unit that holds the chunk.
        chunk_at: Offset of the chunk in the decoded unit.
        stated: 1 where this image states (references) the chunk, else 0. Others are never fetched for it.
        digests: 32 bytes a chunk, meaningless where ``stated`` is 0; empty without digester.
        unit_offset: Offset in the stored object, bytes.
        unit_stored: Stored length, bytes.
        unit_size: Decoded length, bytes.
        unit_packed: 1 where the unit is compressed, 0 where it is stored as it is.
    """

    blob_id: str
    size: int
    stored_size: int
    codec: str
    digester: str | None
    chunk_offset: array[int]  # "Q"
    chunk_size: array[int]  # "I"
    chunk_unit: array[int]  # "I"
    chunk_at: array[int]  # "I"
    stated: bytes
    digests: bytes
    unit_offset: array[int]  # "Q"
    unit_stored: array[int]  # "Q"
    unit_size: array[int]  # "Q"
    unit_packed: bytes
    pin: str = ""
    _unit_first: array[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        first = array("I", bytes(4 * (len(self.unit_offset) + 1)))
        seen = -1
        for chunk, unit in enumerate(self.chunk_unit):
            while seen < unit:
                seen += 1
                first[seen] = chunk
        for unit in range(seen + 1, len(first)):
            first[unit] = len(self.chunk_unit)
        object.__setattr__(self, "_unit_first", first)

    @property
    def chunk_count(self) -> int:
        """Number of chunks in the blob, stated or not."""
        return len(self.chunk_offset)

    @property
    def unit_count(self) -> int:
        """Number of units in the blob."""
        return len(self.unit_offset)

    def digest(self, chunk: int) -> bytes:
        """The 32 bytes that chunk *chunk* must hash to; empty without digester."""
        return self.digests[chunk * DIGEST_SIZE : (chunk + 1) * DIGEST_SIZE]

    def chunks_of(self, unit: int) -> range:
        """The chunks that unit *unit* holds."""
        return range(self._unit_first[unit], self._unit_first[unit + 1])

    def chunk_range(self, chunk: int) -> Range:
        """Decoded bytes of *chunk* in the blob, without padding."""
        return Range.of(self.chunk_offset[chunk], self.chunk_size[chunk])

    def chunks_in(self, want: Range) -> range:
        """The chunks that share at least one byte with *want*; padding belongs to no chunk."""
        want = want.clamp(self.size)
        if not want:
            return range(0)
        first = bisect_right(self.chunk_offset, want.start) - 1
        if first < 0 or self.chunk_offset[first] + self.chunk_size[first] <= want.start:
            first += 1
        last = bisect_right(self.chunk_offset, want.stop - 1)
        return range(first, max(first, last))


def decoded_bytes(layout: BlobLayout, want: Range, unit: Callable[[int], memoryview]) -> bytes:
    """The bytes of *want* as the kernel sees them; zeros between chunks.

    Args:
        unit: Gives the decoded, verified bytes of a unit.

    Raises:
        CorruptImage: *want* reaches past the blob's end, or touches a chunk that is not stated.
    """
    if want.stop > layout.size:
        raise CorruptImage(f"blob {layout.blob_id}: {want} reaches past its end at {layout.size}")
    found = bytearray(len(want))
    for chunk in layout.chunks_in(want):
        if not layout.stated[chunk]:
            problem = f"a file uses chunk {chunk}, which the image does not state"
            raise CorruptImage(f"blob {layout.blob_id}: {problem}")
        decoded = unit(layout.chunk_unit[chunk])
        here = layout.chunk_range(chunk)
        start, stop = max(here.start, want.start), min(here.stop, want.stop)
        at = layout.chunk_at[chunk] + start - here.start
        found[start - want.start : stop - want.start] = decoded[at : at + stop - start]
    return bytes(found)


def uniform_layout(
    blob_id: str, size: int, *, pin: str, piece_size: int = 64 << 10, stored_size: int | None = None
) -> BlobLayout:
    """A layout without compression and digests: equal pieces, stored where they lie (plain EROFS)."""
    count = -(-size // piece_size)
    offsets = array("Q", range(0, count * piece_size, piece_size))
    sizes = array("I", [piece_size]) * count
    if count and size % piece_size:
        sizes[-1] = size % piece_size
    return BlobLayout(
        blob_id=blob_id,
        size=size,
        stored_size=size if stored_size is None else stored_size,
        codec="none",
        digester=None,
        chunk_offset=offsets,
        chunk_size=sizes,
        chunk_unit=array("I", range(count)),
        chunk_at=array("I", bytes(4 * count)),
        stated=b"\1" * count,
        digests=b"",
        unit_offset=offsets,
        unit_stored=array("Q", sizes),
        unit_size=array("Q", sizes),
        unit_packed=bytes(count),
        pin=pin,
    )
