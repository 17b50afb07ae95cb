"""64 mounts of 20 images that share two blobs, made and taken down over and over: nothing leaks anywhere.

Through the API, and every fourth by hand: registered, mount(8), umount(8), taken back.
``EROFSD_LOOP_S`` says for how long; by default two minutes on uml-6.12, half a minute elsewhere.

kernels: on-demand
time limit: 900 s under emulation, 240 s else
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from daemon_rig import (
    HOME,
    Daemon,
    daemon_counts,
    drop_caches,
    guest,
    mount_by_hand,
    rafs,
    resident_kib,
    wait_for,
)

from erofsd.api import MountRequest
from erofsd.client import Client

LOOP_S = float(os.environ.get("EROFSD_LOOP_S", 120 if os.environ.get("VM_KERNEL") == "uml-6.12" else 30))
FAMILIES, MEMBERS, MOUNTS, AT_ONCE = 2, 10, 64, 8
BY_HAND = 4  # one of so many
WARM_ROUNDS = 2
GROWTH_MAX_KIB = 2048  # of each process, from the warm state to the end
SLABS = {"erofs_inode", "fscache_cookie_jar", "cachefiles_object_jar", "open files"}  # counted by the page
SLAB_SLACK = 200


class Image:
    """One image: what it is called, and what is in it."""

    def __init__(self, bootstrap: Path, files: dict[str, bytes]) -> None:
        self.ref = f"file:{bootstrap}"
        self.blobs = [str(bootstrap.parent / "blobs")]
        self.files = files


def make_images() -> list[Image]:
    dice = random.Random(4)
    images = []
    for family in range(FAMILIES):
        files = {f"file{k:02d}": dice.randbytes(dice.randrange(1, 200_000)) for k in range(40)}
        selections = [dice.sample(sorted(files), 15) for _ in range(MEMBERS)]
        for member, image in enumerate(rafs.make_family(files, selections)):
            images.append(
                Image(
                    rafs.write_files(image, HOME / f"images/{family}-{member}"),
                    {n: files[n] for n in image.files},
                )
            )
    return images


def read_some(directory: Path, files: dict[str, bytes], dice: random.Random) -> None:
    for name in dice.sample(sorted(files), 3):
        assert (directory / name).read_bytes() == files[name], f"{directory}/{name}: wrong bytes"


class Loop:
    """Mounts all, reads, and unmounts all."""

    def __init__(self, client: Client, images: Sequence[Image], number: int) -> None:
        self._client = client
        self._dice = random.Random(number)
        self._images = [images[k % len(images)] for k in range(MOUNTS)]
        self._directories = [HOME / f"mounts/{k:02d}" for k in range(MOUNTS)]

    async def run(self) -> None:
        await self._each(range(MOUNTS), self._mount)
        live = guest()["superblocks"]
        assert live == MOUNTS, f"{live} superblocks"
        await self._each(range(MOUNTS), self._unmount)
        hand_made = {self._images[k].ref for k in range(0, MOUNTS, BY_HAND)}
        await self._each(sorted(hand_made), self._client.unmount)  # takes the registrations back

    async def _each(self, items: Iterable, work: Callable[..., Awaitable[None]]) -> None:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(item: object) -> None:
            async with gate:
                await work(item)

        async with asyncio.TaskGroup() as group:
            for item in items:
                group.create_task(one(item))

    async def _mount(self, k: int) -> None:
        image, directory = self._images[k], self._directories[k]
        directory.mkdir(parents=True, exist_ok=True)
        by_hand = k % BY_HAND == 0
        request = MountRequest(
            ref=image.ref, dir="" if by_hand else str(directory), blobs=image.blobs, prepare=by_hand
        )
        told = await self._client.mount(request)
        if by_hand:
            await asyncio.to_thread(mount_by_hand, told.command, directory)
        await asyncio.to_thread(read_some, directory, image.files, self._dice)

    async def _unmount(self, k: int) -> None:
        directory = self._directories[k]
        if k % BY_HAND in (0, 1):
            await asyncio.to_thread(subprocess.run, ["umount", directory], check=True, timeout=30)
        else:
            await self._client.unmount(str(directory))


def settled(daemon: Daemon) -> dict[str, int]:
    """What is there when everything that ends by itself has ended."""

    def is_over() -> bool:
        counts = daemon_counts(daemon)
        return counts["rows"] == 0 and counts["files in cache"] == FAMILIES and guest()["superblocks"] == 0

    wait_for(is_over, "the end of all that was mounted", 60)
    drop_caches()
    memory = {f"{who} KiB": resident_kib(daemon.pid(who)) for who in ("keeper", "worker")}
    return daemon_counts(daemon) | guest() | memory


def compare(warm: dict[str, int], end: dict[str, int]) -> list[str]:
    slack = dict.fromkeys(SLABS, SLAB_SLACK) | {
        "worker KiB": GROWTH_MAX_KIB,
        "keeper KiB": GROWTH_MAX_KIB,
    }
    slack |= {
        "worker threads": 8,
        "worker descriptors": 2,
    }  # pools grow to their bound; one logs, one answers
    return [
        f"{name}: {warm.get(name)} -> {end.get(name)}"
        for name in sorted(warm.keys() | end.keys())
        if end.get(name, 0) - warm.get(name, 0) > slack.get(name, 0)
    ]


async def loop(daemon: Daemon, images: Sequence[Image]) -> None:
    began = time.monotonic()
    rounds = 0
    warm: dict[str, int] = {}
    async with Client(daemon.socket) as client:
        while rounds <= WARM_ROUNDS or time.monotonic() - began < LOOP_S:
            await Loop(client, images, rounds).run()
            rounds += 1
            now = await asyncio.to_thread(settled, daemon)
            print(f"round {rounds}, {time.monotonic() - began:.1f} s: {now}", flush=True)
            if rounds == WARM_ROUNDS or time.monotonic() - began < LOOP_S / 3:
                warm = now
    grown = compare(warm, now)
    assert not grown, "; ".join(grown)
    assert not [line for line in daemon.log().splitlines() if '"level": "error"' in line], daemon.log()[
        -4000:
    ]
    print(f"{rounds * MOUNTS} mounts in {rounds} rounds, {time.monotonic() - began:.0f} s: {warm} -> {now}")


def main() -> None:
    images = make_images()
    (HOME / "daemon").mkdir()
    daemon = Daemon(HOME / "daemon", log_level="warning", deadline=30)
    daemon.start()
    try:
        asyncio.run(loop(daemon, images))
        assert daemon.stop() == 0
    finally:
        daemon.destroy()


main()
