"""Where the kernel's part of the tests can run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ondemand.engines import probe


@pytest.fixture
def fanotify_directory() -> Iterator[Path]:
    """A new directory in which this kernel's fanotify serves files; skips where there is none."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        result = probe("fanotify", directory)
        if not result.works:
            pytest.skip(f"no fanotify here: {result.reason}; {result.hint}")
        yield Path(directory)


@pytest.fixture
def cachefiles_directory() -> Iterator[Path]:
    """A new directory in which this kernel's cachefiles serves objects; skips where there is none."""
    home = "/var/lib/erofsd" if Path("/var/lib/erofsd").is_dir() else "/var/tmp"
    with tempfile.TemporaryDirectory(dir=home) as directory:
        result = probe("cachefiles", directory)
        if not result.works:
            pytest.skip(f"no cachefiles on demand here: {result.reason}; {result.hint}")
        yield Path(directory)
