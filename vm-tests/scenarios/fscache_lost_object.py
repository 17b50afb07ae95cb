"""A worker that does not know a mounted object answers its readers with EIO, and right as soon as it does.

kernels: on-demand
time limit: 200 s under emulation, 40 s else
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fscache_rig import Keeper, images, read_error

from ondemand.canary import pattern

SIZE = 4 << 20


def main() -> None:
    with Keeper(images({"img": [SIZE]})) as keeper:
        target = keeper.mount("img", "fsid=img,device=img-0")
        file = target / "0"
        assert read_error(file, 0) == 0
        keeper.shared["refusing"] = 1
        keeper.replace_worker()
        before = keeper.shared["opens"]
        for _ in range(3):
            assert read_error(file, 2 << 20) == errno.EIO
        opens = keeper.shared["opens"] - before
        assert opens == 1, f"{opens} OPENs: it is opened again and again"
        keeper.shared["refusing"] = 0
        assert file.read_bytes() == pattern(0, SIZE)
        reads = keeper.shared["reads"]
        keeper.unmount(target)
        target = keeper.mount("img", "fsid=img,device=img-0")
        assert (target / "0").read_bytes() == pattern(0, SIZE)
        assert keeper.shared["reads"] == reads, "what was cached is lost"
    print(f"EIO three times with {opens} OPEN, then right, and kept")


main()
