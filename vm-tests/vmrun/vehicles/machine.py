"""What a guest is given, whatever carries it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Machine:
    """The guest's hardware and boot words."""

    memory_mib: int = 2048  # taken from the host only as the guest touches it
    cpus: int = 1  # more than one for QEMU only; under emulation two are slower than one
    append: str = ""  # more words for the kernel's command line
