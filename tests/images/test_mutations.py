"""Ten thousand damaged images: each is read or refused, in bounded time and memory."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images.sourcetree import mkfs

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "plain": (),
    "lz4": ("-zlz4", "-Eztailpacking"),
    "fragments": ("-zlz4hc", "-C16384", "-Efragments"),
    "legacy": ("-zlz4", "-Elegacy-compress"),
    "chunks": ("--chunksize=4096",),
}


def small_tree(top: Path) -> None:
    rng = random.Random(1)
    for i in range(6):
        directory = top / f"dir{i % 2}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file{i}").write_bytes((b"%d words " % i * 900 + rng.randbytes(300))[: 3000 * i])
        (directory / f"link{i}").symlink_to("x" * (i + 1) ** 3)


@pytest.mark.timeout(120)
def test_ten_thousand_damaged_images_are_read_or_refused(testdata: Path, tmp_path: Path) -> None:
    images = []
    if shutil.which("mkfs.erofs"):
        (tmp_path / "source").mkdir()
        small_tree(tmp_path / "source")
        for name, options in OPTIONS.items():
            images.append(tmp_path / f"{name}.erofs")
            mkfs(images[-1], tmp_path / "source", *options)
    command = [sys.executable, "-m", "tests.images.mutations", str(testdata), *map(str, images)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
