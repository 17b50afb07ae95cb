"""Reading and watching the mount table."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from erofsd.daemon.mountinfo import MountWatch, mount_points


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
async def test_mounts_with_awkward_names_are_seen_come_and_go(tmp_path: Path) -> None:
    target = tmp_path / "a b\tc"
    target.mkdir()
    changes: asyncio.Queue[None] = asyncio.Queue()
    watch = MountWatch(asyncio.get_running_loop(), lambda: changes.put_nowait(None))
    while not changes.empty():
        changes.get_nowait()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(target)], check=True)
    try:
        await asyncio.wait_for(changes.get(), 5)
        found = [p for p in mount_points() if p.directory == str(target)]
        assert [p.fstype for p in found] == ["tmpfs"]
    finally:
        subprocess.run(["umount", str(target)], check=True)
    await asyncio.wait_for(changes.get(), 5)
    assert all(p.directory != str(target) for p in mount_points())
    watch.close()
