"""What the kernel does with the device: claims that the engine, and the scripted device, are built on."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from ondemand import culling, fscache, syscalls
from ondemand.binding import Limits, holders, open_device
from ondemand.canary import image, pattern
from ondemand.engines import probe
from ondemand.engines.cachefiles import BLOCK_SIZE, CachefilesEngine, Device
from ondemand.errors import EngineUnavailable, FillError
from ondemand.provider import ObjectKey, Sink
from ondemand.ranges import Range, RangeSet
from ondemand.wire import cachefiles as wire
from tests.ondemand.cachefiles_rigs import ContentProvider, patterned, wait_for

pytestmark = pytest.mark.kernel

SIZE = 1 << 20
IMAGE = image([SIZE])


def primary(fsid: str) -> ObjectKey:
    return ObjectKey(fsid.encode(), b"erofs," + fsid.encode())


def contents(fsid: str, *cookies: bytes) -> dict:
    """An image, and its device under several names."""
    found = {primary(fsid): (len(IMAGE), lambda offset, length: IMAGE[offset : offset + length])}
    volume = b"erofs," + fsid.encode()
    return found | {ObjectKey(cookie, volume): (SIZE, patterned(n)) for n, cookie in enumerate(cookies, 1)}


class Noting(ContentProvider):
    """Notes what its sinks show when they come, and keeps them."""

    def __init__(self, contents: dict) -> None:
        super().__init__(contents, enlarge=1 << 16)
        self.seen: list[tuple[ObjectKey, RangeSet]] = []
        self.sinks: dict[ObjectKey, Sink] = {}
        self.refusal: FillError | None = None

    async def open(self, key: ObjectKey, sink: Sink) -> int:
        self.seen.append((key, sink.data()))
        self.sinks[key] = sink
        if self.refusal:
            raise self.refusal
        return await super().open(key, sink)


class Bench:
    """A bound cache, an engine, and a place to mount at."""

    def __init__(self, device_fd: int, cache: Path, target: Path, provider: Noting) -> None:
        self.device_fd = device_fd
        self.device = Device(device_fd)
        self.cache = cache
        self.target = target
        self.provider = provider
        self.engine = CachefilesEngine(device_fd, deadline_s=20.0)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            task = group.create_task(self.engine.serve(self.provider))
            try:
                yield
            finally:
                task.cancel()

    @asynccontextmanager
    async def mounted(self, options: str) -> AsyncIterator[Path]:
        await fscache.mount(str(self.target), options)
        try:
            yield self.target / "0"
        finally:
            syscalls.umount2(str(self.target))
            await wait_for(lambda: not self.provider.opens)

    async def read(self, path: Path, offset: int = 0, length: int = BLOCK_SIZE) -> bytes:
        def read() -> bytes:
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return os.pread(file.fileno(), length, offset)

        return await asyncio.to_thread(read)


@asynccontextmanager
async def bench_on(directory: Path, limits: Limits | None = None) -> AsyncIterator[Bench]:
    cache, target = directory / "cache", directory / "target"
    cache.mkdir(exist_ok=True)
    target.mkdir(exist_ok=True)
    async with AsyncExitStack() as stack:
        device_fd = open_device(cache, limits=limits)
        stack.callback(os.close, device_fd)
        bench = Bench(device_fd, cache, target, Noting(contents("img", b"blob")))
        stack.callback(lambda: bench.engine.close())
        yield bench


@pytest.fixture
async def bench(cachefiles_directory: Path) -> AsyncIterator[Bench]:
    fds = set(os.listdir("/proc/self/fd"))
    async with bench_on(cachefiles_directory) as bench:
        yield bench
    assert set(os.listdir("/proc/self/fd")) == fds


OPTIONS = fscache.mount_options("img", devices=["blob"])
BLOB = ObjectKey(b"blob", b"erofs,img")


async def test_a_new_object_has_no_file_before_it_is_answered_and_a_reopened_one_has(bench: Bench) -> None:
    everything = RangeSet([Range(0, wire.POSITION_MAX)])
    async with bench.serving():
        await fscache.mount(str(bench.target), OPTIONS)
        assert await bench.read(bench.target / "0") == pattern(0, BLOCK_SIZE, 1)
        assert dict(bench.provider.seen) == {primary("img"): everything, BLOB: everything}
        assert bench.provider.sinks[BLOB].data() == RangeSet([Range(0, 1 << 16)])
    bench.engine.close()
    bench.engine = CachefilesEngine(bench.device_fd, deadline_s=20.0)
    bench.engine.restore()
    bench.provider.seen.clear()
    async with bench.serving():
        assert await bench.read(bench.target / "0", 1 << 19) == pattern(1 << 19, BLOCK_SIZE, 1)
        assert bench.provider.seen == [(BLOB, RangeSet([Range(0, 1 << 16)]))]
        syscalls.umount2(str(bench.target))
        await wait_for(lambda: BLOB not in [about.key for about in bench.engine._protocol.objects()])


async def test_complete_data_makes_no_request_with_the_cache_dropped_and_after_a_remount(
    bench: Bench,
) -> None:
    async with bench.serving():
        async with bench.mounted(OPTIONS) as file:
            assert await bench.read(file, 0, SIZE) == pattern(0, SIZE, 1)
            bench.provider.fills.clear()
            assert await bench.read(file, 0, SIZE) == pattern(0, SIZE, 1)
        async with bench.mounted(OPTIONS) as file:
            assert await bench.read(file, 0, SIZE) == pattern(0, SIZE, 1)
        assert bench.provider.fills == []


async def test_a_refused_object_fails_its_mount_at_once(bench: Bench) -> None:
    bench.provider.refusal = FillError("not registered", errno.ENOENT)
    async with bench.serving():
        with pytest.raises(OSError, match="mounting") as failed:
            await fscache.mount(str(bench.target), OPTIONS)
        assert failed.value.errno in (errno.EIO, errno.ENOBUFS)
        bench.provider.refusal = None
        async with bench.mounted(OPTIONS) as file:
            assert await bench.read(file) == pattern(0, BLOCK_SIZE, 1)


async def test_keys_that_share_a_file_are_refused_and_the_longest_good_ones_are_right(bench: Bench) -> None:
    common = b"x" * 199
    cookies = [common + b"1", common + b"2", b"x" * 186 + b"a b", b"x" * 186 + b"c d"]
    bench.provider.contents = contents("img", *cookies)
    async with bench.serving():
        for n, cookie in enumerate(cookies, 1):
            async with bench.mounted(f"fsid=img,device={cookie.decode()}") as file:
                assert await bench.read(file) == pattern(0, BLOCK_SIZE, n)
        for cookie in (common + b"12", b"x" * 187 + b"a b"):
            async with bench.mounted(f"fsid=img,device={cookie.decode()}") as file:
                with pytest.raises(OSError):
                    await bench.read(file)
    assert {key.cookie for key, _ in bench.provider.seen} == {*cookies, b"img"}


async def test_mounts_of_one_domain_share_objects(bench: Bench, tmp_path: Path) -> None:
    volume = b"erofs,dom"
    bench.provider.contents = {
        ObjectKey(fsid, volume): (len(IMAGE), lambda offset, length: IMAGE[offset : offset + length])
        for fsid in (b"one", b"two")
    } | {ObjectKey(b"blob", volume): (SIZE, patterned(1))}
    async with bench.serving():
        await fscache.mount(str(tmp_path), fscache.mount_options("one", domain_id="dom", devices=["blob"]))
        try:
            assert await bench.read(tmp_path / "0", 0, SIZE) == pattern(0, SIZE, 1)
            bench.provider.fills.clear()
            options = fscache.mount_options("two", domain_id="dom", devices=["blob"])
            await fscache.mount(str(bench.target), options)
            assert await bench.read(bench.target / "0", 0, SIZE) == pattern(0, SIZE, 1)
            assert {key.cookie for key, _ in bench.provider.fills} == {b"two"}
            assert [key.cookie for key in bench.provider.opens].count(b"blob") == 1
            syscalls.umount2(str(bench.target))
        finally:
            syscalls.umount2(str(tmp_path))
        await wait_for(lambda: not bench.provider.opens)


async def test_a_full_disk_is_eio_and_told_until_there_is_room(cachefiles_directory: Path) -> None:
    free = os.statvfs(cachefiles_directory)
    percent = 100 * free.f_bavail // free.f_blocks
    if not 5 < percent < 98:
        pytest.skip(f"{percent}% of the file system are free")
    ballast = cachefiles_directory / "ballast"
    limits = Limits(percent + 1, percent, percent - 1)
    async with (
        bench_on(cachefiles_directory, limits) as bench,
        bench.serving(),
        bench.mounted(OPTIONS) as file,
    ):
        assert await bench.read(file) == pattern(0, BLOCK_SIZE, 1)
        with ballast.open("wb") as out:
            os.posix_fallocate(out.fileno(), 0, free.f_blocks * free.f_frsize * 3 // 100)
        with pytest.raises(OSError) as refused:
            await bench.read(file, 1 << 19)
        assert refused.value.errno == errno.EIO
        assert culling.is_wanted(bench.device)
        assert await bench.read(file) == pattern(0, BLOCK_SIZE, 1), "what is cached stays"
        with pytest.raises(OSError) as failed:
            bench.provider.sinks[BLOB].write(0, memoryview(bytes(BLOCK_SIZE)))
        assert failed.value.errno == errno.ENOSPC
        ballast.unlink()
        assert await bench.read(file, 1 << 19) == pattern(1 << 19, BLOCK_SIZE, 1)


async def test_a_disk_that_is_full_already_is_refused(cachefiles_directory: Path) -> None:
    with pytest.raises(EngineUnavailable) as refused:
        async with bench_on(cachefiles_directory, Limits(99, 98, 97)):
            pytest.skip("the file system is too empty")
    assert "room" in refused.value.hint


async def test_objects_in_use_are_not_culled_and_others_are(bench: Bench) -> None:
    before = os.getcwd()
    async with bench.serving():
        async with bench.mounted(OPTIONS) as file:
            await bench.read(file)
            assert list(culling.files(bench.cache)) == [], "a new object has no name yet"
        async with bench.mounted(OPTIONS) as file:
            await wait_for(lambda: BLOB in dict(culling.files(bench.cache)))
            path = dict(culling.files(bench.cache))[BLOB]
            assert culling.is_in_use(bench.device, path)
            assert not culling.cull(bench.device, path)
        bench.provider.fills.clear()
        await wait_for(lambda: not culling.is_in_use(bench.device, path))
        assert culling.cull(bench.device, path)
        assert not path.exists()
        with pytest.raises(FileNotFoundError):
            culling.cull(bench.device, path)
        async with bench.mounted(OPTIONS) as file:
            assert await bench.read(file) == pattern(0, BLOCK_SIZE, 1)
        assert {key for key, _ in bench.provider.fills} == {BLOB}
        assert not culling.is_wanted(bench.device)
    assert os.getcwd() == before


async def test_a_hole_punched_into_a_live_object_is_filled_again(bench: Bench) -> None:
    async with bench.serving():
        async with bench.mounted(OPTIONS) as file:
            await bench.read(file, 0, SIZE)
        async with bench.mounted(OPTIONS) as file:
            with dict(culling.files(bench.cache))[BLOB].open("rb+") as cached:
                syscalls.punch_hole(cached.fileno(), Range(1 << 18, 1 << 19))
            bench.provider.fills.clear()
            assert await bench.read(file, 0, SIZE) == pattern(0, SIZE, 1)
            assert bench.provider.fills


async def test_a_second_opener_learns_who_is_first(bench: Bench) -> None:
    with pytest.raises(EngineUnavailable) as refused:
        open_device(bench.cache)
    assert f"({os.getpid()})" in refused.value.reason
    assert [holder for holder in holders() if f"({os.getpid()})" in holder]
    assert not probe("cachefiles", str(bench.cache.parent)).works


@pytest.mark.parametrize("limits", [Limits(3, 2, 0), Limits(60, 50, 40)])
async def test_limits_are_accepted(cachefiles_directory: Path, limits: Limits) -> None:
    async with bench_on(cachefiles_directory, limits):
        pass


async def test_an_unfit_directory_is_refused(cachefiles_directory: Path) -> None:
    with pytest.raises(EngineUnavailable) as refused:
        open_device(Path("/dev/shm"))
    assert "ext4" in refused.value.hint
    assert probe("cachefiles", str(cachefiles_directory)).works, "the device is free again"


async def test_an_end_with_mounts_hangs_nobody(bench: Bench) -> None:
    """Reader and mount wait when the engine ends; both fail, and the mount point can be unmounted."""

    async def hang(key: ObjectKey, want: Range, sink: Sink) -> None:
        if key == BLOB:
            await asyncio.Event().wait()
        await ContentProvider.fill(bench.provider, key, want, sink)

    bench.provider.fill = hang  # type: ignore[method-assign]
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        async with bench.serving():
            await fscache.mount(str(bench.target), OPTIONS)
            reader = group.create_task(_refused(bench.read(bench.target / "0")))
            await wait_for(lambda: bench.engine.statistics.in_flight > 0)
        mount = group.create_task(_refused(fscache.mount(str(bench.target), "fsid=other,device=blob")))
        while not (reader.done() and mount.done()):
            await bench.engine.aclose(deny=True)
            await asyncio.sleep(0.001)
    syscalls.umount2(str(bench.target))


async def _refused(attempt) -> None:
    with pytest.raises(OSError):
        await attempt
