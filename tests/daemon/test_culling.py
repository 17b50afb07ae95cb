"""Which of the kernel's cache files go, and in which order; the kernel's part is played by a directory."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from pathlib import Path

import pytest

from erofsd.blobs.layout import BlobLayout, uniform_layout
from erofsd.blobs.store import BlobStore, StoredBlob
from erofsd.daemon import culling as daemon_culling
from erofsd.daemon.cookies import VOLUME, cookie_of, name_of
from erofsd.daemon.culling import CacheFiles
from ondemand.binding import Limits
from ondemand.cachefiles import Device
from ondemand.wire import cachefiles as wire
from tests.ondemand.cachefiles_rigs import wait_for

DIGEST = "ab" * 32


class FileDevice(Device):
    """Culls files of the working directory, as the kernel does, but for those that are in use."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.in_use: set[bytes] = set()

    def command(self, command: wire.Command) -> None:
        assert isinstance(command, wire.Cull | wire.InUse)
        if not os.path.exists(command.name):
            raise FileNotFoundError(errno.ENOENT, "none")
        if command.name in self.in_use:
            raise OSError(errno.EBUSY, "in use")
        if isinstance(command, wire.Cull):
            os.unlink(command.name)


class Bench:
    """A cache directory, a store of maps, and how full the disk is said to be."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = FileDevice()
        self.volume = directory / "cache" / ("I" + VOLUME.decode())
        self.maps = BlobStore(directory / "maps", keeps_data=False)
        self.cache = CacheFiles(
            self.device,
            directory,
            VOLUME,
            self.maps,
            name_of=name_of,
            cookie_of=cookie_of,
            limits=Limits(60, 50, 10),
        )
        self.gone: list[str] = []
        self.looks = 0
        look = self.cache._let_leave

        def counted() -> None:
            look()
            self.looks += 1

        monkeypatch.setattr(self.cache, "_let_leave", counted)
        self.cache.on_gone = self.gone.append
        # Each file takes ten percent of the disk.
        monkeypatch.setattr(self.cache, "_free_percent", lambda: 100 - 10 * len(self.files()))
        monkeypatch.setattr(daemon_culling, "LEAVE_FIRST_S", 0.001)

    def file(self, name: str, fan: int = 7) -> Path:
        path = self.volume / f"@{fan:02x}" / f"D{cookie_of(name)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"data")
        return path

    def files(self) -> set[str]:
        return {path.name[1:] for path in self.volume.glob("@*/D*")}

    def bind(self, blob_id: str, size: int = 8192, name: str | None = None) -> StoredBlob:
        return self.maps.bind(layout(blob_id, size), name=name).blob

    def unbind(self, blob: StoredBlob, used_at: float) -> None:
        for binding in list(blob.bindings):
            binding.release()
        os.utime(blob.fd, (used_at, used_at))
        blob.close()


def layout(blob_id: str, size: int) -> BlobLayout:
    return uniform_layout(blob_id, size, pin="pin")


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_no_two_stored_blobs_have_one_cookie() -> None:
    names = [f"{DIGEST}.0", f"{DIGEST}.1", f"{DIGEST}.1.0", "abc.0", "abc.0.0", "abc.1", "e-1", "p-1-0"]
    cookies = [cookie_of(name) for name in names]
    assert len(set(cookies)) == len(names)
    assert [name_of(cookie) for cookie in cookies] == names
    assert cookies[0] == DIGEST


async def test_nothing_goes_while_there_is_room(bench: Bench) -> None:
    for k in range(5):
        bench.file(bench.bind(f"blob{k}").name)
    assert bench.cache.make_room()
    assert len(bench.files()) == 5


async def test_what_was_used_longest_ago_goes_first_until_there_is_enough_room(bench: Bench) -> None:
    now = time.time()
    for k in range(6):
        blob = bench.bind(f"blob{k}")
        bench.file(blob.name)
        bench.unbind(blob, now - 100 * k)
    assert bench.cache.make_room()
    assert bench.files() == {f"blob{k}.0" for k in range(4)}
    assert bench.maps.names() == sorted(f"blob{k}.0" for k in range(4))
    await wait_for(lambda: sorted(bench.gone) == ["blob4.0", "blob5.0"])


async def test_what_a_mount_uses_stays_with_its_map(bench: Bench) -> None:
    for k in range(6):
        blob = bench.bind(f"blob{k}")
        bench.device.in_use.add(b"D" + cookie_of(blob.name).encode())
        bench.file(blob.name)
        bench.unbind(blob, time.time())
    assert not bench.cache.make_room()
    assert len(bench.files()) == len(bench.maps.names()) == 6


async def test_what_is_registered_and_not_mounted_goes_last_and_keeps_its_map(bench: Bench) -> None:
    bound = [bench.bind(f"bound{k}") for k in range(5)]
    for blob in bound:
        bench.file(blob.name)
    unbound = bench.bind("unbound")
    bench.file(unbound.name)
    bench.unbind(unbound, time.time())
    assert bench.cache.make_room()
    assert "unbound.0" not in bench.files()
    assert len(bench.files()) == 4
    assert len(bench.maps.names()) == 5
    assert all(bench.maps.opened(blob.name) is blob for blob in bound)


async def test_a_new_map_never_gets_old_data(bench: Bench) -> None:
    bench.file("blob.0")
    assert bench.bind("blob").name == "blob.0"
    assert bench.files() == set()


async def test_where_old_data_are_in_use_another_name_is_taken(bench: Bench) -> None:
    bench.file("blob.0")
    bench.device.in_use.add(b"Dblob.0")
    assert bench.bind("blob").name == "blob.1"
    assert bench.files() == {"blob.0"}


async def test_files_of_nobody_go(bench: Bench) -> None:
    known = bench.bind("known")
    bench.file(known.name)
    bench.unbind(known, time.time())
    bench.file("stranger.0")
    bench.cache.adopt()
    assert bench.files() == {"known.0"}


async def test_a_bootstrap_goes_once_no_mount_uses_it(bench: Bench) -> None:
    blob = bench.bind("e-1", name="e-1")
    bench.unbind(blob, time.time())
    async with asyncio.TaskGroup() as group:
        running = group.create_task(bench.cache._keep_leaving())
        bench.cache.leave("e-1")
        await wait_for(lambda: bench.looks > 1)  # the kernel takes its time to give the file its name
        assert bench.maps.has("e-1")
        bench.device.in_use.add(b"De-1")
        bench.file("e-1")
        seen = bench.looks
        await wait_for(lambda: bench.looks > seen + 1)
        assert bench.maps.has("e-1")
        bench.device.in_use.clear()
        await wait_for(lambda: not bench.files())
        assert not bench.maps.has("e-1")
        running.cancel()


async def test_a_bootstrap_that_never_had_a_file_is_forgotten(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_culling, "UNNAMED_MAX_S", 0.0)
    bench.unbind(bench.bind("e-1", name="e-1"), time.time())
    async with asyncio.TaskGroup() as group:
        running = group.create_task(bench.cache._keep_leaving())
        bench.cache.leave("e-1")
        await wait_for(lambda: not bench.maps.has("e-1"))
        running.cancel()


async def test_a_search_in_vain_is_not_repeated_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(6):
        bench.file(f"blob{k}.0")
        bench.device.in_use.add(f"Dblob{k}.0".encode())
    assert not bench.cache.make_room()
    bench.device.in_use.clear()
    assert not bench.cache.make_room()
    monkeypatch.setattr(daemon_culling, "FUTILE_S", 0.0)
    assert bench.cache.make_room()
