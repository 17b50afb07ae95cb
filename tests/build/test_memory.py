"""How much memory making images takes, by the number of entries: of the program, in all its threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.build import tars
from tests.build.apart import run_apart
from tests.build.debian import Image
from tests.build.ordinary import Layout

FEW, MANY = 20_000, 400_000
MANY_MAX = 400 << 20  # bytes
ENTRY_MAX = 1024  # bytes for each further entry with a chunk of its own


def layer(count: int) -> Iterator[bytes]:
    """A tar of *count* small files that all differ, 200 a directory."""
    for first in range(0, count, 200):
        yield tars.header(b"directory-%05d/" % first, b"5", mode=0o755)
        yield b"".join(
            tars.file(
                b"directory-%05d/a-file-with-a-name-%06d" % (first, n), b"content %d" % n, mtime=n, uid=n % 7
            )
            for n in range(first, first + 200)
        )
    yield tars.END


@pytest.mark.timeout(300)
def test_memory_is_bounded_by_the_number_of_entries(tmp_path: Path) -> None:
    made = Layout(tmp_path / "layout")
    there, back = {}, {}
    for count in (FEW, MANY):
        image = Image(made)
        image.add(layer(count))
        lazy = f"oci:{tmp_path}/out:{count}"
        _, there[count] = run_apart("convert", image.tag(f"{count}"), lazy)
        _, back[count] = run_apart("convert", "--to", "oci", lazy, f"oci:{tmp_path}/back:{count}")
    for peaks in (there, back):
        assert peaks[MANY] < MANY_MAX
        assert peaks[MANY] - peaks[FEW] < ENTRY_MAX * (MANY - FEW)
