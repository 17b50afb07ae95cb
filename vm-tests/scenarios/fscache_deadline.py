"""A fill that never ends is EIO within the deadline, a failed one at once; both are right afterwards.

kernels: on-demand
time limit: 200 s under emulation, 40 s else
"""

from __future__ import annotations

import errno
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fscache_rig import FAILING, HANGING, NORMAL, Keeper, images, read_error

from ondemand.canary import pattern

DEADLINE_S = 3.0
SIZE = 4 << 20


def main() -> None:
    with Keeper(images({"img": [SIZE]}), deadline_s=DEADLINE_S) as keeper:
        file = keeper.mount("img", "fsid=img,device=img-0") / "0"
        file.stat()  # the metadata are there from here on
        elapsed = {}
        for behaviour, length in ((HANGING, 4096), (HANGING, 1 << 20), (FAILING, 4096), (FAILING, 1 << 20)):
            keeper.shared["behaviour"] = behaviour
            start = time.monotonic()
            assert read_error(file, 1 << 20, length) == errno.EIO
            elapsed[behaviour, length] = time.monotonic() - start
            limit_s = DEADLINE_S if behaviour == HANGING else 1.0
            assert elapsed[behaviour, length] < limit_s, elapsed
        keeper.shared["behaviour"] = NORMAL
        assert file.read_bytes() == pattern(0, SIZE), "wrong after recovery"
    print("EIO after " + ", ".join(f"{each:.2f} s" for each in elapsed.values()) + "; then right")


main()
