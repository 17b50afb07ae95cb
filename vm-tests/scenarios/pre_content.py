"""A FAN_PRE_ACCESS mark is accepted on the state directory's ext4.

kernels: fanotify
time limit: 120 s under emulation, 30 s else
"""

import ctypes
import os
from pathlib import Path

# include/uapi/linux/fanotify.h
FAN_CLASS_PRE_CONTENT = 0x08
FAN_UNLIMITED_QUEUE = 0x10
FAN_MARK_ADD = 0x01
FAN_PRE_ACCESS = 0x00100000
AT_FDCWD = -100

LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    blob = Path("/var/lib/erofsd/blob")
    blob.write_bytes(bytes(4096))
    group = LIBC.fanotify_init(FAN_CLASS_PRE_CONTENT | FAN_UNLIMITED_QUEUE, os.O_RDWR | os.O_LARGEFILE)
    assert group >= 0, os.strerror(ctypes.get_errno())
    mask = ctypes.c_uint64(FAN_PRE_ACCESS)
    marked = LIBC.fanotify_mark(group, FAN_MARK_ADD, mask, AT_FDCWD, os.fsencode(blob))
    assert marked == 0, os.strerror(ctypes.get_errno())
    assert "erofs" in Path("/proc/filesystems").read_text()
    print("marked")


main()
