"""Chunk numbers by digest, for millions of chunks."""

from __future__ import annotations

from array import array

DIGEST_SIZE = 32
_PREFIX_SIZE = 8
_FIRST_SIZE = 1 << 10


class DigestIndex:
    """Finds the number of a chunk by its digest. Numbers are never removed.

    A table with open addressing: 6 to 12 bytes a chunk beside the column of digests, which is there anyway.
    A dictionary of bytes would take 160, a third of what a small file costs in all.

    Args:
        digests: The column that the numbers count in; it may grow meanwhile.
    """

    def __init__(self, digests: bytearray) -> None:
        self._digests = digests
        self._slots = array("I", bytes(4 * _FIRST_SIZE))  # number + 1; 0 is free
        self._count = 0

    def find(self, digest: bytes) -> int | None:
        """The number that was added with *digest*."""
        slots, digests = self._slots, self._digests
        mask = len(slots) - 1
        at = int.from_bytes(digest[:_PREFIX_SIZE], "little") & mask
        while number := slots[at]:
            if digests[DIGEST_SIZE * (number - 1) : DIGEST_SIZE * number] == digest:
                return number - 1
            at = (at + 1) & mask
        return None

    def add(self, number: int) -> None:
        """Enter chunk *number*, whose digest is in the column and has not been added."""
        if 3 * self._count >= 2 * len(self._slots):
            old, self._slots = self._slots, array("I", bytes(4 * 2 * len(self._slots)))
            for known in old:
                if known:
                    self._enter(known)
        self._enter(number + 1)
        self._count += 1

    def _enter(self, value: int) -> None:
        slots = self._slots
        mask = len(slots) - 1
        start = DIGEST_SIZE * (value - 1)
        at = int.from_bytes(self._digests[start : start + _PREFIX_SIZE], "little") & mask
        while slots[at]:
            at = (at + 1) & mask
        slots[at] = value
