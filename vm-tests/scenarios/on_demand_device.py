"""/dev/cachefiles opens, takes `bind ondemand` on the state directory, and is exclusive.

kernels: on-demand
time limit: 120 s under emulation, 30 s else
"""

import errno
import os
from pathlib import Path

import pytest

CACHE = Path("/var/lib/erofsd/on-demand-device")


def main() -> None:
    CACHE.mkdir()
    device = os.open("/dev/cachefiles", os.O_RDWR | os.O_CLOEXEC)
    for command in (f"dir {CACHE}", "tag scenario", "bind ondemand"):
        assert os.write(device, command.encode()) == len(command), command
    assert sorted(path.name for path in CACHE.iterdir()) == ["cache", "graveyard"]
    assert os.read(device, 1024) == b"", "nothing was mounted, nothing can be asked"
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        os.open("/dev/cachefiles", os.O_RDWR)
    print("bound, exclusive")


main()
