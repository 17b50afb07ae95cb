"""How many READs in a second: 4 KiB each, cold, one reader. A figure, and a floor far below it.

kernels: on-demand
time limit: 200 s under emulation, 60 s else
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fscache_rig import Keeper, images

SIZE = 64 << 20
COUNT = 2000


def main() -> None:
    with Keeper(images({"img": [SIZE]})) as keeper:
        file = os.open(keeper.mount("img", "fsid=img,device=img-0") / "0", os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        offsets = random.Random(1).sample(range(0, SIZE, 4096), COUNT)
        start = time.monotonic()
        for offset in offsets:
            os.pread(file, 4096, offset)
        elapsed = time.monotonic() - start
        os.close(file)
        assert keeper.shared["reads"] >= COUNT
        assert COUNT / elapsed > 30
    print(f"{COUNT / elapsed:.0f} READs in a second, {elapsed / COUNT * 1e6:.0f} us each")


main()
