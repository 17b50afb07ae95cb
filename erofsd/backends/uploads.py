"""Where uploads that are under way go on: kept in a directory, so that a rerun sends only what is missing.

Source: opencontainers/distribution-spec, "Resuming an upload".
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from yarl import URL

from erofsd.backends.localfs import translate

_URL_MAX = 16 << 10


class Uploads:
    """Locations of uploads, by target and digest.

    Args:
        directory: Exists; None: nothing is remembered.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    def load(self, target: str, digest: str) -> URL | None:
        """Where the upload of a blob was going on; None if none is known."""
        path = self._path(target, digest)
        if path is None:
            return None
        try:
            location = URL(path.read_text()[:_URL_MAX], encoded=True)
        except (OSError, ValueError):
            return None
        return location if location.scheme in ("http", "https") and location.host else None

    def save(self, target: str, digest: str, location: URL) -> None:
        """Remember where an upload goes on.

        Raises:
            SourceError: The directory cannot be written to.
        """
        path = self._path(target, digest)
        if path is None:
            return
        try:
            # Locations may be signed: nobody else reads them, and mkstemp sees to that.
            fd, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
            with os.fdopen(fd, "w") as file:
                file.write(str(location))
            os.replace(temporary, path)
        except OSError as exc:
            raise translate(exc, str(path)) from exc

    def forget(self, target: str, digest: str) -> None:
        """The blob is there."""
        if (path := self._path(target, digest)) is not None:
            path.unlink(missing_ok=True)

    def _path(self, target: str, digest: str) -> Path | None:
        if self._directory is None:
            return None
        return self._directory / hashlib.sha256(f"{target} {digest}".encode()).hexdigest()
