"""What the runner itself can fail with; the command's own failures are exit codes, never exceptions."""

from __future__ import annotations

EXIT_TIME_LIMIT = 124
EXIT_GUEST_LOST = 125


class RunnerError(Exception):
    """The guest could not be built, booted or kept; ends the program with ``EXIT_GUEST_LOST``."""


class NotBuilt(RunnerError):
    """No kernel of that name is in the cache and building was not allowed."""
