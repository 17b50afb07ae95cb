"""What commands print: JSON for scripts, tables for people, colour and progress on terminals only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import resources
from types import TracebackType
from typing import Protocol, Self

import msgspec


class Bar(Protocol):
    """The part of a tqdm bar that is used here."""

    n: int
    total: int | None

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def refresh(self) -> object: ...

    def update(self, n: float) -> object: ...


_COLOURS = {"red": 31, "green": 32, "yellow": 33, "bold": 1, "dim": 2}


def print_json(value: object, *, lines: bool = False) -> None:
    """*value* as JSON: indented, or with *lines* as one line of a stream."""
    text = msgspec.json.encode(value)
    if not lines:
        text = msgspec.json.format(text, indent=2)
    sys.stdout.write(text.decode() + "\n")


def colour(text: str, name: str) -> str:
    """*text* in a colour, if standard output is a terminal that may have some."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_COLOURS[name]}m{text}\x1b[0m"


def human(size: float) -> str:
    """A number of bytes for people: ``17.3 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def printable(text: str | bytes) -> str:
    """*text* without anything that could move a terminal's cursor."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell; those in *right* are aligned right."""
    cells = [tuple(header), *(tuple(printable(c) for c in row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([colour(lines[0], "bold"), *lines[1:]])


def progress_bar(label: str, total: int | None = None) -> Bar:
    """A bar of bytes on stderr that shows itself on terminals only."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    bar: Bar = tqdm(
        desc=label,
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None,  # tqdm's word for: unless stderr is a terminal
        leave=True,
        dynamic_ncols=True,
    )
    return bar


def show_manual() -> int:
    """Show the manual page with man(1), or its source where there is none; returns an exit code."""
    page = resources.files("erofsd.resources").joinpath("erofsd.1")
    with resources.as_file(page) as path:
        if man := shutil.which("man"):
            return subprocess.run([man, "-l", str(path)], check=False).returncode
        sys.stdout.write(path.read_text("utf-8"))
    return 0
