from __future__ import annotations

import pytest

from erofsd.build.options import parse_size
from erofsd.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("1M", 1 << 20), ("64k", 65536), ("0x100000", 1 << 20), ("2MiB", 2 << 20), ("0", 0),
     ("1GB", 1 << 30), ("010", 10), ("0x1b", 27)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5M", "1T", "0x", "1 000", "x"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)
