"""An object that is refused fails its mount at once, as does a mount that nobody serves; a key too long, too.

A mount that waits while the worker is killed is answered by the next.

kernels: on-demand
time limit: 200 s under emulation, 40 s else
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fscache_rig import HOME, Keeper, constant, fork, images, patterned, read_error, wait_ended

from ondemand import fscache, syscalls
from ondemand.canary import image, pattern

SIZE = 1 << 20
LONG = "x" * 200


def mount_error(keeper: Keeper, name: str, options: str) -> tuple[int, float]:
    start = time.monotonic()
    try:
        keeper.unmount(keeper.mount(name, options))
    except OSError as exc:
        return exc.errno or -1, time.monotonic() - start
    return 0, time.monotonic() - start


def main() -> None:
    contents = images({"img": [SIZE]})
    contents[LONG.encode()] = constant(image([SIZE]))
    contents[(LONG[1:] + "1").encode()] = patterned(SIZE, 7)
    told = []
    with Keeper(contents) as keeper:
        for options in ("fsid=unknown", f"fsid={LONG}y"):
            error, elapsed = mount_error(keeper, "refused", options)
            assert error in (errno.EIO, errno.ENOBUFS), f"{options}: {error}"
            assert elapsed < 5, f"{options}: {elapsed:.1f} s"
            told.append(f"{errno.errorcode[error]} after {elapsed:.2f} s")

        target = keeper.mount("long", f"fsid={LONG},device={LONG[1:]}1")
        assert (target / "0").read_bytes() == pattern(0, SIZE, 7)
        keeper.unmount(target)
        target = keeper.mount("longer", f"fsid={LONG},device={LONG}1")
        assert read_error(target / "0", 0), "a device whose key is too long was served"
        keeper.unmount(target)

        keeper.kill_worker()
        target = HOME / "img"
        target.mkdir()
        options = "fsid=img,device=img-0"
        pid = syscalls.fork_mount(fscache.SOURCE, str(target), "erofs", syscalls.MS_RDONLY, options)
        keeper.start_worker()
        keeper.replace_worker()
        wait_ended(pid, "a mount during which workers were killed")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        pid = keeper.start_reader(lambda: os._exit((target / "0").read_bytes() != pattern(0, SIZE)))
        assert keeper.wait_reader(pid) == 0
        syscalls.umount2(str(target))
    pid = fork(lambda: os._exit(_mount_unserved()))
    wait_ended(pid, "a mount that nobody serves")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    print("refused with " + ", ".join(told) + "; 200 bytes of key are right, more are refused")


def _mount_unserved() -> int:
    pid = syscalls.fork_mount(fscache.SOURCE, str(HOME / "img"), "erofs", syscalls.MS_RDONLY, "fsid=img")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


main()
