"""Errors by three questions: whose fault, is it worth another try, what does the operator do next."""

from __future__ import annotations


class ErofsdError(Exception):
    """Base of everything erofsd raises on purpose.

    Printed as one line without a traceback; *hint* follows on a line of its own.

    Args:
        message: What failed, on which object.
        hint: What to do next; empty if there is nothing to say.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(ErofsdError):
    """The command line contradicts itself or names something that cannot be."""

    exit_code = 2


class ConfigError(ErofsdError):
    """The configuration file is wrong; names the file and the key."""

    exit_code = 2


class NotPossibleHere(ErofsdError):
    """This kernel or machine cannot do it."""

    exit_code = 3


class ImageRefused(ErofsdError):
    """An image or its data is not to be used."""

    exit_code = 4


class CorruptImage(ImageRefused):
    """Bytes that no sound image has; the message names the object, the offset and the field."""


class UnsupportedImage(ImageRefused):
    """A sound image of a kind, or with a feature, that we cannot serve; the message names it."""


class BlobCorrupt(ImageRefused):
    """Data that fails verification. Never cached, never asked for again from the same place by itself."""


class CodecError(BlobCorrupt):
    """Data that does not decompress to what the image says."""


class SourceError(ErofsdError):
    """A source did not give us what we asked for."""

    exit_code = 5


class BlobNotFound(SourceError):
    """The source answered: no such object."""


class BackendDenied(SourceError):
    """The source answered: not for you."""


class BackendTemporary(SourceError):
    """The source failed in a way that another try may cure.

    Args:
        retry_after_s: What the source asked for, if it did.
    """

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class CacheFull(ErofsdError):
    """No room for what has to be stored."""
