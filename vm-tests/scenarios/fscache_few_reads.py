"""64 MiB read 4 KiB at a time, in order and at random, take under 100 READs when fills are enlarged.

kernels: on-demand
time limit: 400 s under emulation, 60 s else
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fscache_rig import Keeper, images

from ondemand.canary import pattern

SIZE = 64 << 20
BLOCK = 4096


def main() -> None:
    told = []
    with Keeper(images({"ordered": [SIZE], "shuffled": [SIZE]}), enlarge=1 << 20) as keeper:
        for name in ("ordered", "shuffled"):
            file = os.open(keeper.mount(name, f"fsid={name},device={name}-0") / "0", os.O_RDONLY)
            offsets = list(range(0, SIZE, BLOCK))
            if name == "shuffled":
                random.Random(1).shuffle(offsets)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            before, start = keeper.shared["reads"], time.monotonic()
            for offset in offsets:
                if os.pread(file, BLOCK, offset) != pattern(offset, BLOCK):
                    raise AssertionError(f"{name}: wrong at {offset}")
            count = keeper.shared["reads"] - before
            assert count < 100, f"{name}: {count} READs"
            told.append(f"{name}: {count} READs, {time.monotonic() - start:.1f} s")
            os.close(file)
    print("; ".join(told))


main()
