"""A layer's stored bytes, for a thread to read while they are still arriving; hashed on the way.

What lies in a local file is read in place. What comes from a registry goes to a file of the work directory,
where a rerun finds it and fetches only the rest.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from erofsd.backends.base import Backend
from erofsd.backends.documents import Descriptor
from erofsd.backends.localfs import Place, translate
from erofsd.backends.measured import streaming
from erofsd.errors import BlobCorrupt, BlobNotFound, ErofsdError, SourceError
from ondemand.ranges import Range

_DRAIN_SIZE = 1 << 20


class Arrival:
    """A file that grows until it has *size* bytes. One side writes on the event loop, the other reads.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, path: Path, size: int) -> None:
        path.touch()  # whoever reads may be first
        self.place = Place(path, 0, size)
        self._changed = threading.Condition()
        self._have = 0
        self._error: BaseException | None = None

    async def fill(self, backends: Sequence[Backend], blob_id: str) -> None:
        """Fetch what is missing from the first of *backends* that has it. Errors reach the reader only.

        Raises:
            asyncio.CancelledError: Nothing else.
        """
        try:
            with self.place.path.open("ab") as file:
                failures: list[SourceError] = []
                for backend in backends:
                    try:
                        await self._fill_from(backend, blob_id, file)
                        return
                    except SourceError as exc:
                        failures.append(exc)
                # That somebody does not have it says less than that somebody else broke off.
                raise next((f for f in failures if not isinstance(f, BlobNotFound)), failures[-1])
        except asyncio.CancelledError as exc:
            self._fail(exc)
            raise
        except OSError as exc:
            self._fail(translate(exc, str(self.place.path)))
        except ErofsdError as exc:
            self._fail(exc)

    async def _fill_from(self, backend: Backend, blob_id: str, file: BinaryIO) -> None:
        have = file.tell()
        if have > self.place.size:
            file.truncate(0)
            have = 0
        self._advance(have)
        if have < self.place.size:
            async with streaming(backend, blob_id, Range(have, self.place.size)) as pieces:
                async for piece in pieces:
                    file.write(piece)
                    file.flush()
                    have += len(piece)
                    self._advance(have)

    def wait(self, stop: int) -> int:
        """Block until there are bytes up to *stop*, or all there will be; returns how many there are.

        Raises:
            SourceError: The rest will not come.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._have >= min(stop, self.place.size) or self._error is not None
            )
            if self._error is not None and self._have < min(stop, self.place.size):
                if isinstance(self._error, ErofsdError):
                    raise self._error
                raise SourceError(f"{self.place.path}: given up") from self._error
            return self._have

    def _advance(self, have: int) -> None:
        with self._changed:
            self._have = have
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()


class LayerFile:
    """The stored bytes of one layer, from front to back. A context manager; blocks.

    Args:
        source: Where they are, or will be.
        descriptor: What they must be.
        name: For messages.
        tell: Hears how many more bytes were read.
    """

    def __init__(
        self,
        source: Place | Arrival,
        descriptor: Descriptor,
        name: str,
        tell: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._tell = tell
        self._given_up = False
        self._arrival = source if isinstance(source, Arrival) else None
        self._place = source.place if isinstance(source, Arrival) else source
        self._descriptor = descriptor
        self._name = name
        self._hasher = hashlib.new(descriptor.digest.partition(":")[0])
        self._at = 0
        if self._place.size != descriptor.size:
            raise BlobCorrupt(f"{name}: has {self._place.size} bytes, the manifest says {descriptor.size}")
        try:
            self._file = self._place.path.open("rb", buffering=0)
            self._file.seek(self._place.offset)
        except OSError as exc:
            raise translate(exc, name) from exc

    def __enter__(self) -> LayerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int, /) -> bytes:
        """At most *size* bytes; none at the end.

        Raises:
            SourceError: They cannot be had.
        """
        if self._given_up:
            raise SourceError(f"{self._name}: given up")
        length = min(size, self._place.size - self._at)
        if self._arrival is not None and length:
            length = min(length, self._arrival.wait(self._at + 1) - self._at)
        try:
            data = self._file.read(length)
        except OSError as exc:
            raise translate(exc, self._name) from exc
        if length and not data:
            raise SourceError(f"{self._name}: became shorter while it was read")
        self._hasher.update(data)
        self._at += len(data)
        self._tell(len(data))
        return data

    def give_up(self) -> None:
        """End whoever reads. From any thread."""
        self._given_up = True

    def finish(self) -> None:
        """Read what is left, and compare all with the digest.

        Raises:
            BlobCorrupt: It is not the layer that the manifest names.
            SourceError: As `read`.
        """
        while self.read(_DRAIN_SIZE):
            pass
        algorithm = self._descriptor.digest.partition(":")[0]
        found = f"{algorithm}:{self._hasher.hexdigest()}"
        if found == self._descriptor.digest:
            return
        if self._arrival is not None:
            with suppress(OSError):  # the next try has to fetch it anew
                self._place.path.unlink()
        raise BlobCorrupt(f"{self._name}: its content has digest {found}")
