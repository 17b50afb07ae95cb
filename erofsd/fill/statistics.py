"""What happened, counted."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

RECENT_WAITS = 256
NEWEST_WEIGHT = 0.2  # of the newest sample in a smoothed figure


@dataclass(frozen=True, slots=True)
class Wait:
    """One miss that is over.

    Attributes:
        at: When it began, seconds since 1970.
        elapsed_s: How long the reader waited.
        error: Why it failed; empty if it did not.
    """

    image: str
    blob: str
    offset: int
    length: int
    at: float
    elapsed_s: float
    source: str
    error: str


@dataclass(slots=True)
class ImageStatistics:
    """One image's fills since the worker started.

    Attributes:
        waits: Misses.
        errors: Misses that ended in an error.
        wait_s: Seconds that readers waited, in all.
        requests: Range requests to its source.
        transferred_bytes: Stored bytes that these brought.
        last_error: The newest error's text.
        recent: The newest waits.
    """

    waits: int = 0
    errors: int = 0
    wait_s: float = 0.0
    requests: int = 0
    transferred_bytes: int = 0
    last_error: str = ""
    recent: deque[Wait] = field(default_factory=lambda: deque(maxlen=RECENT_WAITS))


@dataclass(slots=True)
class FillStatistics:
    """All fills since the worker started. Seconds are those of the threads that did the work."""

    decoded_bytes: int = 0
    decode_s: float = 0.0
    digest_s: float = 0.0
    write_s: float = 0.0
    corrupt_chunks: int = 0
    in_flight: int = 0


@dataclass(slots=True)
class SourceGauge:
    """How far away a source is: smoothed, so that it follows a change within some ten requests.

    Attributes:
        latency_s: From asking to the first byte.
        bytes_per_s: From the first byte on, of one request.
    """

    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    samples: int = 0

    def saw(self, latency_s: float, byte_count: int, elapsed_s: float) -> None:
        """One request's first byte came after *latency_s*, *byte_count* more bytes within *elapsed_s*."""
        weight = NEWEST_WEIGHT if self.samples else 1.0
        self.samples += 1
        self.latency_s += weight * (latency_s - self.latency_s)
        if byte_count >= 64 << 10 and elapsed_s > 0:
            rate = byte_count / elapsed_s
            self.bytes_per_s += (weight if self.bytes_per_s else 1.0) * (rate - self.bytes_per_s)
