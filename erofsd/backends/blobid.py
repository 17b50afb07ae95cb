"""Names of blobs, which come out of images and end up in paths and URLs."""

from __future__ import annotations

import re

from erofsd.errors import BlobNotFound

_BLOB_ID = re.compile(r"(?:([a-z0-9]+):)?([\w+-][\w.+-]*)", re.ASCII)


def split_blob_id(blob_id: str, source: str) -> tuple[str | None, str]:
    """Algorithm, where one is stated, and the rest of *blob_id*: neither can leave a directory.

    Args:
        source: For the message.

    Raises:
        BlobNotFound: No blob has such a name.
    """
    match = _BLOB_ID.fullmatch(blob_id)
    if match is None:
        raise BlobNotFound(f"{source}: there is no blob {blob_id[:80]!r}")
    return match[1], match[2]
