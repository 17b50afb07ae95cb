"""What can go wrong between a kernel that lacks bytes and the one who supplies them."""

from __future__ import annotations

import errno as _errno


class OndemandError(Exception):
    """Base of everything this package raises on purpose."""


class MalformedMessage(OndemandError):
    """The kernel said something we do not understand: stop loudly, never guess."""


class AnswerMisuse(OndemandError):
    """A request was answered twice, or an answer went to nobody: a bug of ours."""


class EngineUnavailable(OndemandError):
    """An engine does not work here.

    Args:
        reason: What was tried and how the kernel refused it.
        hint: What an operator can do about it; empty if nothing.
    """

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class DeviceLost(OndemandError):
    """The kernel closed or broke the descriptor that requests come from."""


class FillError(OndemandError):
    """A range cannot be filled; *errno* is what the reader should see."""

    def __init__(self, message: str, errno: int = _errno.EIO) -> None:
        super().__init__(message)
        self.errno = errno


class NobodyReads(FillError):
    """Part of a range belongs to nothing that anybody can read. The rest of it is filled."""
