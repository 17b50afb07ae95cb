"""Eight readers in random order see no error while the worker is killed every half second.

kernels: on-demand
time limit: 400 s under emulation, 90 s else
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fscache_rig import SLOW, Keeper, images

from ondemand.canary import pattern

SIZE = 256 << 20
READERS = 8
KILLS = 40
LIFE_S = 0.5
COUNTERS = struct.Struct("=QQQ")  # reads, wrong, errors


def read_on(number: int, target: Path, stop: mmap.mmap, counters: mmap.mmap) -> None:
    dice = random.Random(number)
    files = [os.open(target / str(n), os.O_RDONLY) for n in range(2)]
    reads = wrong = errors = 0
    while not stop[0]:
        n = dice.randrange(2)
        length = dice.choice((100, 4096, 20000, 131072))
        offset = dice.randrange(SIZE - length)
        try:
            wrong += os.pread(files[n], length, offset) != pattern(offset, length, n + 1)
        except OSError:
            errors += 1
        reads += 1
        COUNTERS.pack_into(counters, number * COUNTERS.size, reads, wrong, errors)


def main() -> None:
    with Keeper(images({"img": [SIZE, SIZE]})) as keeper:
        keeper.shared["behaviour"] = SLOW
        target = keeper.mount("img", "fsid=img,device=img-0,device=img-1")
        stop, counters = mmap.mmap(-1, 1), mmap.mmap(-1, READERS * COUNTERS.size)
        readers = [
            keeper.start_reader(lambda n=n: read_on(n, target, stop, counters)) for n in range(READERS)
        ]
        for _ in range(KILLS):
            time.sleep(LIFE_S)  # the point: a kill at any instant
            keeper.replace_worker()
        stop[0] = 1
        statuses = [keeper.wait_reader(pid) for pid in readers]
        reads, wrong, errors = (sum(column) for column in zip(*COUNTERS.iter_unpack(counters), strict=True))
        shared = keeper.shared
        told = f"{KILLS} kills, {reads} reads, {wrong} wrong, {errors} errors, {shared['reads']} READs"
        assert statuses == [0] * READERS, statuses
        assert (wrong, errors) == (0, 0), told
        print(f"{told}, {shared['stale']} taken over, {shared['opens']} OPENs")


main()
