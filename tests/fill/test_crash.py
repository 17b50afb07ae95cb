"""The whole path, killed or out of room at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from erofsd.blobs.store import BlobStore
from erofsd.errors import CacheFull
from ondemand.errors import FillError
from tests.fill.images import MemorySource, Rig, simple

FILLER = """
import asyncio, sys
from pathlib import Path
from erofsd.fill.provider import FillProvider
from tests.fill.images import MemorySource, Rig, simple

async def main():
    built = simple(120, 150_000, batch=2)
    provider = FillProvider(workers=2)
    async with asyncio.TaskGroup() as group:
        runner = group.create_task(provider.run())
        source = MemorySource()
        binding = Rig(Path(sys.argv[1]), provider).bind(built, source)
        print("ready", flush=True)
        await provider.prefetch(binding)
        runner.cancel()

asyncio.run(main())
"""


async def test_killed_while_it_fills_it_goes_on_where_it_was(rig: Rig) -> None:
    built = simple(120, 150_000, batch=2)
    directory = rig.store.directory / "killed"
    seen = []
    for round_ in range(8):
        filler = subprocess.Popen([sys.executable, "-c", FILLER, directory], stdout=subprocess.PIPE)
        assert filler.stdout is not None
        assert filler.stdout.readline() == b"ready\n"
        time.sleep(0.002 * round_)  # not a wait: the moment of the kill is what varies
        filler.send_signal(signal.SIGKILL)
        filler.wait()
        filler.stdout.close()
        binding = BlobStore(directory).bind(built.layout)
        chunks = [chunk for chunk in range(120) if binding.blob.map.present[chunk]]
        for chunk in chunks:
            expected = built.chunks[chunk]
            assert os.pread(binding.blob.fd, len(expected), built.layout.chunk_offset[chunk]) == expected
        binding.blob.close()
        seen.append(len(chunks))
    assert seen == sorted(seen)
    assert seen[-1] > 0
    rig.store = BlobStore(directory)
    binding = rig.bind(built, MemorySource())
    await rig.provider.prefetch(binding)
    assert os.pread(binding.blob.fd, len(built.decoded), 0) == built.decoded


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "small", path], capture_output=True)
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


async def test_a_full_disk_fails_reads_and_room_cures_them(rig: Rig, small_disk: Path) -> None:
    built = simple(64, 128 << 10)
    source = MemorySource()
    rig.store = BlobStore(small_disk / "blobs")
    binding = rig.bind(built, source)
    with pytest.raises(CacheFull, match="No space"):
        await rig.provider.prefetch(binding)
    with pytest.raises(FillError):
        await rig.read(binding, 0, len(built.decoded))
    present = [chunk for chunk in range(64) if binding.blob.map.present[chunk]]
    assert 0 < len(present) < 20
    for chunk in present:
        expected = built.chunks[chunk]
        assert os.pread(binding.blob.fd, len(expected), built.layout.chunk_offset[chunk]) == expected
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert await rig.read(binding, 0, len(built.decoded)) == built.decoded
    binding.blob.close()
