"""A cache smaller than its images: what no mount uses is culled while readers run, and is fetched anew later.

Three readers in random order on one image that stays mounted; the others are mounted, read whole, and
unmounted in turn. The worker is killed once in each round, wherever it is.

kernels: on-demand
time limit: 900 s under emulation, 150 s else
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from daemon_rig import HOME, Daemon, cache_files, call, drop_caches, files_of, rafs, wait_for

from erofsd.api import MountInfo, MountRequest

DISK_SIZE = 96 << 20
IMAGE_SIZE = 12 << 20
IMAGES = 10
ROUNDS = 2
READERS = 3

READER = """
import os, random, sys
path, reference, seed = sys.argv[1:]
dice = random.Random(seed)
file, right = os.open(path, os.O_RDONLY), os.open(reference, os.O_RDONLY)
size = os.fstat(right).st_size
reads = 0
print("reading", flush=True)
while os.path.exists("/var/lib/erofsd/going"):
    length = dice.choice((100, 4096, 65536))
    offset = dice.randrange(size - length)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    found = os.pread(file, length, offset)
    assert found == os.pread(right, length, offset), f"wrong bytes at {offset}"
    reads += 1
print(reads)
"""


def small_disk() -> Path:
    top = HOME / "small"
    top.mkdir()
    with open(HOME / "disk", "wb") as file:
        file.truncate(DISK_SIZE)
    subprocess.run(["mkfs.ext4", "-q", HOME / "disk"], check=True)
    subprocess.run(["mount", "-o", "loop", HOME / "disk", top], check=True)
    return top


def make_images() -> list[Path]:
    """Each with a blob of its own, and its content beside it."""
    dice = random.Random(3)
    boots = []
    for k in range(IMAGES):
        content = dice.randbytes(IMAGE_SIZE)
        directory = HOME / f"images/{k}"
        boots.append(rafs.write_files(rafs.make_image({"data": content}, compressor="none"), directory))
        (directory / "data").write_bytes(content)
    return boots


def mount(daemon: Daemon, boot: Path) -> Path:
    target = HOME / f"mounts/{boot.parent.name}"
    target.mkdir(parents=True, exist_ok=True)
    request = MountRequest(ref=f"file:{boot}", dir=str(target), blobs=[str(boot.parent / "blobs")])
    call(daemon, lambda client: client.mount(request))
    return target


def state_of(daemon: Daemon, target: Path) -> MountInfo:
    mounts = call(daemon, lambda client: client.mounts())
    return next(mount for mount in mounts if mount.dir == str(target))


def unmount(daemon: Daemon, target: Path) -> None:
    call(daemon, lambda client: client.unmount(str(target)))


def assert_same(mounted: Path, boot: Path) -> None:
    subprocess.run(["cmp", mounted / "data", boot.parent / "data"], check=True, timeout=40)


def start_readers(mounted: Path, boot: Path) -> list[subprocess.Popen[str]]:
    (HOME / "going").touch()
    paths = [str(mounted / "data"), str(boot.parent / "data")]
    readers = []
    for seed in range(READERS):
        command = [sys.executable, "-IS", "-c", READER, *paths, str(seed)]
        readers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert readers[-1].stdout is not None
        assert readers[-1].stdout.readline() == "reading\n"
    return readers


def stop_readers(readers: list[subprocess.Popen[str]]) -> int:
    (HOME / "going").unlink()
    told = [reader.communicate(timeout=60)[0] for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * READERS, told
    return sum(map(int, told))


def one_round(daemon: Daemon, boots: list[Path], number: int) -> int:
    """Mount, read and unmount all of *boots*; returns how many had to be fetched."""
    fetched = 0
    for k, boot in enumerate(boots):
        if k == 2 + number:
            daemon.kill_worker()
        mounted = mount(daemon, boot)
        before = state_of(daemon, mounted)
        drop_caches()
        assert_same(mounted, boot)
        after = state_of(daemon, mounted)
        assert (after.errors, after.state) == (0, "complete"), after
        fetched += before.state != "complete"
        unmount(daemon, mounted)
    return fetched


def check_agreement(daemon: Daemon) -> None:
    """Where there is a map there is a file, and the other way round."""

    def agree() -> bool:
        maps = {
            p.name.removesuffix(".map").removesuffix(".0") for p in (daemon.state_dir / "maps").glob("*.map")
        }
        return maps == set(cache_files(daemon.state_dir))

    wait_for(agree, "a file for each map")


def main() -> None:
    boots = make_images()
    (HOME / "daemon").mkdir()
    daemon = Daemon(HOME / "daemon", deadline=30, log_level="info")
    daemon.state_dir = small_disk() / "state"
    daemon.start()
    try:
        kept = mount(daemon, boots[0])
        readers = start_readers(kept, boots[0])
        fetched = [one_round(daemon, boots[1:], number) for number in range(ROUNDS)]
        reads = stop_readers(readers)
        assert_same(kept, boots[0])
        assert state_of(daemon, kept).errors == 0
        unmount(daemon, kept)
        check_agreement(daemon)
        culled = daemon.events("cache.culled")
        assert fetched[0] == IMAGES - 1, "what was never read is not there"
        assert fetched[1], "what was culled is not there"
        assert culled
        assert not daemon.events("cache.full")
        assert daemon.stop() == 0
        print(
            f"{sum(e['count'] for e in culled)} files culled in {len(culled)} goes, {fetched} images fetched"
            f" in {ROUNDS} rounds, {reads} reads meanwhile; left: {dict(files_of(daemon.state_dir))}"
        )
    finally:
        Path(HOME / "going").unlink(missing_ok=True)
        daemon.destroy()


if __name__ == "__main__":
    main()
