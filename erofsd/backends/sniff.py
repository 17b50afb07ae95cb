"""What kind of image begins with these bytes: just enough to know whom to ask.

Sources: fs/erofs/erofs_fs.h, struct erofs_super_block; rafs-v6 1.1 for the RAFS marker; nydus
rafs/src/metadata/layout/v5.rs, RAFSV5_SUPER_MAGIC.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

HEAD_SIZE = 4096  # bytes that `sniff` wants to see
EROFS_MAGIC = 0xE0F5E1E2
RAFS_MARKER = 0x40000000  # in feature_compat; the kernel ignores it
RAFS5_MAGIC = 0x52414653

_SUPERBLOCK_OFFSET = 1024
_SUPERBLOCK = struct.Struct("<III74xH")  # magic, checksum, feature_compat, …, extra_devices at 86


@dataclass(frozen=True, slots=True)
class Sniffed:
    """The kind of an image.

    Attributes:
        extra_devices: Devices beside the primary one, as the superblock states; 0 for rafs5.
    """

    kind: Literal["erofs", "rafs", "rafs5"]
    extra_devices: int


def sniff(head: bytes) -> Sniffed | None:
    """The kind of the image that begins with *head*; None if it is none that we know."""
    if len(head) >= 4 and int.from_bytes(head[:4], "little") == RAFS5_MAGIC:
        return Sniffed("rafs5", 0)
    if len(head) < _SUPERBLOCK_OFFSET + _SUPERBLOCK.size:
        return None
    magic, _, compat, extra_devices = _SUPERBLOCK.unpack_from(head, _SUPERBLOCK_OFFSET)
    if magic != EROFS_MAGIC:
        return None
    return Sniffed("rafs" if compat & RAFS_MARKER else "erofs", extra_devices)
