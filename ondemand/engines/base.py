"""What every engine offers its owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ondemand.provider import Provider


@dataclass(slots=True)
class EngineStatistics:
    """Counts since the engine was made, in this process.

    Attributes:
        events: Requests read from the kernel.
        hits: Answered at once, because all bytes were there.
        fills: Answered after the provider had filled them.
        errors: Denied; a reader sees EIO unless the kernel's second asking goes better.
        stale: Requests taken over from a dead process.
        overflows: Times the kernel dropped requests: readers saw zeros.
        in_flight: Requests that are not answered now.
    """

    events: int = 0
    hits: int = 0
    fills: int = 0
    errors: int = 0
    stale: int = 0
    overflows: int = 0
    in_flight: int = 0


class Engine(Protocol):
    """Turns one kernel interface's requests into calls of a Provider, and its results into answers.

    How an object comes into being is the interface's affair, so each engine has its own methods for that.
    """

    @property
    def name(self) -> str: ...

    @property
    def statistics(self) -> EngineStatistics: ...

    async def serve(self, provider: Provider) -> None:
        """Answer requests until cancelled. What is unanswered then stays so, for a successor.

        Raises:
            DeviceLost: The kernel broke the connection.
            MalformedMessage: The kernel said something that is not understood.
        """
        ...

    async def aclose(self, *, deny: bool) -> None:
        """End for good, after `serve` has ended.

        Args:
            deny: Let those who wait go, with EIO. Otherwise they wait for a successor.
        """
        ...
