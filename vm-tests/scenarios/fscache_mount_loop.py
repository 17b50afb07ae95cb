"""Mounting and unmounting over and over leaks no descriptor, no object, and no memory worth mentioning.

kernels: on-demand
time limit: 400 s under emulation, 90 s else
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fscache_rig import Keeper, images, wait_for

from ondemand.canary import pattern

SIZE = 1 << 20
IMAGES = 4
ROUNDS = 25


def settled(keeper: Keeper) -> int:
    wait_for(lambda: keeper.shared["objects"] == 0, "closing every object")
    return keeper.shared["fds"]


def main() -> None:
    names = [f"img{n}" for n in range(IMAGES)]
    with Keeper(images({name: [SIZE, SIZE] for name in names})) as keeper:
        counts = []
        for round in range(ROUNDS):
            targets = []
            for name in names:
                domain = ",domain_id=domain" if round % 2 else ""
                options = f"fsid={name}{domain},device={name}-0,device={names[0]}-1"
                targets.append(keeper.mount(name, options))
            for target in targets:
                with (target / "1").open("rb") as file:
                    file.seek(8 * round * 1024)
                    assert file.read(5000) == pattern(8 * round * 1024, 5000, 2)
            for target in targets:
                keeper.unmount(target)
            counts.append(settled(keeper))
        assert counts[1] == counts[-1], f"descriptors of the worker: {counts}"
        opens, closes = keeper.shared["opens"], keeper.shared["closes"]
        assert opens == closes, f"{opens} OPENs, {closes} CLOSEs"
    print(
        f"{ROUNDS * IMAGES} mounts, {opens} OPENs, {closes} CLOSEs, {counts[-1]} descriptors before and after"
    )


main()
