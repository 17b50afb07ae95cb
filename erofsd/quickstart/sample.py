"""A sample image of real files that every machine with Python has: Python's own library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from erofsd.errors import ErofsdError

TAG = "sample"

#: Not part of the library itself, or of no use to a program that only imports.
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test")


@dataclass(frozen=True, slots=True)
class Sample:
    """The sample image in an OCI layout.

    Attributes:
        tree: What the image was made from.
        layout: The OCI layout directory; the image's tag is `TAG`.
        image_size: Size of the image in the registry, bytes.
        content_size: Size of all files in it, bytes.
        files: Regular files in it.
    """

    tree: Path
    layout: Path
    image_size: int
    content_size: int
    files: int


def make_sample(directory: Path) -> Sample:
    """Make the sample image below *directory*. Blocks.

    Raises:
        ErofsdError: It cannot be made.
    """
    tree, layout = directory / "tree", directory / "layout"
    files = copy_library(Path(sysconfig.get_path("stdlib")), tree / "python")
    build(tree, f"oci:{layout}:{TAG}", directory)
    stored = sum(path.stat().st_size for path in (layout / "blobs" / "sha256").iterdir())
    content = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    return Sample(tree, layout, stored, content, files)


def copy_library(source: Path, target: Path) -> int:
    """Copy the Python library in *source*; returns the number of regular files."""

    def left_out(directory: str, names: list[str]) -> list[str]:
        return [n for n in names if n in LEFT_OUT or os.path.islink(os.path.join(directory, n))]

    shutil.copytree(source, target, ignore=left_out)
    return sum(len(names) for _, _, names in os.walk(target))


def build(tree: Path, dest: str, work: Path) -> None:
    """Run ``erofsd build``, as anybody would.

    Args:
        work: Where it may keep what it is working on.

    Raises:
        ErofsdError: It fails.
    """
    command = [sys.executable, "-m", "erofsd", "build", "--config", os.devnull, str(tree), dest]
    environment = {**os.environ, "XDG_CACHE_HOME": str(work)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ErofsdError(f"erofsd build ended with {done.returncode}: {done.stderr.strip()[-300:]}")
