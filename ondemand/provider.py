"""The seam between an engine and its owner.

An engine hears from the kernel "this object lacks these bytes, and a reader waits". It asks its owner,
the Provider, to put the bytes into a Sink, and then lets the reader go on. Two kernel interfaces fit
behind this seam, and they differ in who brings the object into being:

- **fanotify**: the owner makes a sparse file and has the engine guard it, before the file is mounted. The
  object's key is a name the owner chose; its sink writes through a descriptor opened before the mark.
- **cachefiles**: the kernel opens the object when an image is mounted and names it by volume and cookie
  key. The engine asks the provider for its size and hands it a sink; the object may close and open again.

What both share: a miss is a page-aligned byte range that may reach past the object's end; the provider may
fill more than was asked, at any time; what it fills must have been verified, because nothing below verifies
it; and a range that cannot be filled is a FillError, never a silent hole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ondemand.ranges import Range, RangeSet


@dataclass(frozen=True, slots=True)
class ObjectKey:
    """What names an object for good, across openings, workers and reboots.

    Attributes:
        cookie: cachefiles: the cookie key, as the kernel sent it. fanotify: the name its owner gave it.
        volume: cachefiles: the volume key without its NUL. fanotify: empty.
    """

    cookie: bytes
    volume: bytes = b""

    def __str__(self) -> str:
        name = self.cookie.decode("ascii", "backslashreplace")
        return f"{self.volume.decode('ascii', 'backslashreplace')}/{name}" if self.volume else name


class Sink(Protocol):
    """Where the bytes of one object go. Usable from any thread.

    Attributes:
        block_size: Offsets and lengths of writes are multiples of this many bytes.
    """

    @property
    def block_size(self) -> int: ...

    def write(self, offset: int, data: memoryview) -> None:
        """Put *data* at *offset*, all of it. Blocks; runs in a thread or for small data inline.

        The last block of an object is padded with zeros by the caller. Engines that need page-aligned
        memory copy when *data* is not.

        Raises:
            OSError: ENOSPC and its kin; some of the bytes may have been written.
        """
        ...

    def data(self) -> RangeSet:
        """What the file system says is allocated (SEEK_DATA): an upper bound of what was ever filled."""
        ...


class Provider(Protocol):
    """Knows which bytes belong into an object. Called on the event loop's thread only."""

    def present(self, key: ObjectKey, want: Range) -> bool:
        """True if all of *want* below the object's end is filled. Never waits.

        An engine asks this first for every request, so the answer to a hit costs no task; it is also how
        the owner sees which way a reader is going.
        """
        ...

    async def fill(self, key: ObjectKey, want: Range, sink: Sink) -> None:
        """Put the bytes of *want* into *sink*; return when all of them are there.

        Args:
            want: Bytes of the object as the kernel sees it. May be empty or reach past the object's end;
                bytes past the end are nobody's business. Filling more than *want* is welcome.

        Raises:
            FillError: Carries the errno the reader should see. What was filled until then stays filled.
                NobodyReads, where it is certain that whoever waits does not wait for this.
        """
        ...

    async def open(self, key: ObjectKey, sink: Sink) -> int:
        """The kernel opens *key*; returns its size in bytes, the same for ever (kernel-bound engines only).

        Raises:
            FillError: Refuse the object, with this errno.

        Source: Documentation/filesystems/caching/cachefiles.rst, "The OPEN Request".
        """
        ...

    def closed(self, key: ObjectKey) -> None:
        """The kernel has let go of *key*: its sink is dead (kernel-bound engines only)."""
        ...
