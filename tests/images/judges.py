"""Who judges images that we write: fsck.erofs, and the kernel, each with data devices as files."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from ondemand.syscalls import mount_erofs


def fsck(image: Path, devices: Sequence[str] = ()) -> None:
    """Let fsck.erofs read all metadata and data, where it is installed."""
    if shutil.which("fsck.erofs") is None:
        return
    command = ["fsck.erofs", "--extract", *(f"--device={path}" for path in devices), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


@contextmanager
def mounted(image: Path, directory: Path, devices: Sequence[str] = ()) -> Iterator[Path]:
    """*image* mounted on *directory*, file-backed; skips where that is not possible."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    directory.mkdir(exist_ok=True)
    try:
        mount_erofs(str(image), str(directory), devices)
    except OSError as exc:
        if exc.errno in (errno.ENODEV, errno.ENOTBLK):
            pytest.skip(f"no file-backed EROFS mounts here: {exc}")
        raise
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)
