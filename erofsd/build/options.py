"""What a build is asked for, checked before anything is read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from erofsd.errors import UsageError
from erofsd.images.rafs6 import format as rafs

COMPRESSIONS = ("zstd", "lz4_block", "gzip", "none")
DIGESTS = ("blake3", "sha256")
#: What each codec takes as a level: lowest, highest, default. lz4_block: 0 is the fast mode, more is HC.
LEVELS = {"zstd": (-7, 22, 3), "lz4_block": (0, 12, 0), "gzip": (1, 9, 6), "none": (0, 0, 0)}
#: V2 chunk information stores sizes in 24 bits and stored sizes as they are: a raw chunk of 16 MiB does not
#: fit (rafs-v6, 6.1). Batches and gzip need V2.
V2_CHUNK_SIZE_MAX = 8 << 20
JOBS_MAX = 256

_SIZE = re.compile(r"(0x[0-9a-f]+|[0-9]+)([kmg]?)(i?b)?", re.IGNORECASE)
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30}


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How file content becomes a blob. Sizes in bytes.

    Attributes:
        chunk_size: A power of two, 4 KiB to 16 MiB.
        compression: One of ``COMPRESSIONS``.
        level: As the codec counts; None takes the codec's default.
        digest: One of ``DIGESTS``.
        batch_size: Small chunks are compressed together up to this size; 0 keeps every chunk for itself.
        jobs: Threads that compress. The blob is the same whatever their number.
        holes: Chunks of zeros become ``HOLE`` and are not stored (plain EROFS). RAFS has no holes: there all
            of them share one stored chunk.
        inline_max: Files up to this size are kept in ``Node.inline`` as well as in the blob's order: they get
            no chunk (plain EROFS). 0 for RAFS.

    Raises:
        UsageError: A value that cannot be, or not together with another; names both.
    """

    chunk_size: int = 1 << 20
    compression: str = "zstd"
    level: int | None = None
    digest: str = "blake3"
    batch_size: int = 0
    jobs: int = 0
    holes: bool = False
    inline_max: int = 0

    def __post_init__(self) -> None:
        _check_power_of_two("chunk size", self.chunk_size, rafs.CHUNK_SIZE_MIN, rafs.CHUNK_SIZE_MAX)
        _check_choice("compression", self.compression, COMPRESSIONS)
        _check_choice("digest", self.digest, DIGESTS)
        lowest, highest, default = LEVELS[self.compression]
        if self.level is None:
            object.__setattr__(self, "level", default)
        elif not lowest <= self.level <= highest:
            raise UsageError(f"level {self.level}: {self.compression} has {lowest} to {highest}")
        if self.batch_size:
            _check_power_of_two("batch size", self.batch_size, rafs.CHUNK_SIZE_MIN, V2_CHUNK_SIZE_MAX)
        if self.chunk_info_v2 and self.chunk_size > V2_CHUNK_SIZE_MAX:
            why = f"batch size {self.batch_size}" if self.batch_size else "gzip"
            raise UsageError(
                f"chunk size {self.chunk_size}: with {why} at most {V2_CHUNK_SIZE_MAX}",
                hint="The chunk records that batches and gzip need cannot hold larger ones.",
            )
        if not 0 <= self.jobs <= JOBS_MAX:
            raise UsageError(f"{self.jobs} jobs: 1 to {JOBS_MAX}, or 0 for one a processor")
        if not self.jobs:
            object.__setattr__(self, "jobs", min(len(os.sched_getaffinity(0)), JOBS_MAX))
        if not 0 <= self.inline_max <= rafs.BLOCK_SIZE:
            raise UsageError(f"inline files of {self.inline_max} bytes: 0 to {rafs.BLOCK_SIZE}")

    @property
    def chunk_info_v2(self) -> bool:
        """True if the blob needs the large chunk records: batches do, and gzip (V1 means legacy eStargz)."""
        return bool(self.batch_size) or self.compression == "gzip"

    @property
    def fingerprint(self) -> str:
        """What of the options a layer's blob and entries depend on, as one line."""
        return (
            f"chunk={self.chunk_size} {self.compression}:{self.level} {self.digest} batch={self.batch_size}"
            f" holes={int(self.holes)} inline={self.inline_max}"
        )


def parse_size(text: str) -> int:
    """Bytes from ``1M``, ``64K``, ``0x100000`` or ``4096``; units are powers of 1024.

    Raises:
        UsageError: It is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{text!r} is no size", hint="A number of bytes, with K, M or G if you like: 64K, 1M."
        )
    return int(match[1], 16 if match[1][:2].lower() == "0x" else 10) << _UNITS[match[2].lower()]


def _check_power_of_two(what: str, value: int, lowest: int, highest: int) -> None:
    if value & (value - 1) or not lowest <= value <= highest:
        raise UsageError(f"{what} {value}: a power of two, {lowest} to {highest}")


def _check_choice(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{what} {value!r}: one of {', '.join(known)}")
