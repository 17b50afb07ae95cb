"""How a long run tells what it does: to a terminal, to a log, or to nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import BinaryIO, Protocol

Tell = Callable[[int], None]
"""Hears how many more bytes are done; negative where they have to be done again. From any thread."""


class Reporter(Protocol):
    """Hears what happens."""

    def warn(self, text: str) -> None:
        """Something was left out, or is not as it was asked for."""
        ...

    def phase(self, label: str, total: int | None) -> AbstractContextManager[Tell]:
        """A part of the work begins, of *total* bytes where that is known."""
        ...


class Silent:
    """A Reporter that only keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        """See Reporter."""
        self.warnings.append(text)

    @contextmanager
    def phase(self, label: str, total: int | None) -> Iterator[Tell]:
        """See Reporter."""
        yield lambda size: None


class Told:
    """A file that tells how much of it was read."""

    def __init__(self, file: BinaryIO, tell: Tell) -> None:
        self._file = file
        self._tell = tell

    def read(self, size: int, /) -> bytes:
        """At most *size* bytes."""
        data = self._file.read(size)
        self._tell(len(data))
        return data
