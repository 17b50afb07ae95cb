"""A line in /etc/fstab mounts a registered image at boot, and a restart of the service leaves it mounted.

kernels: uml-6.12 uml-6.1
root: systemd
boots: 2
time limit: 600 s under emulation, 150 s else
"""

import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from service_rig import MOUNT_POINT, Image, is_mounted, prop, run, serving, status, systemctl, wait_for

SOURCE = Path("/var/lib/erofsd/source")
FSTAB = Path("/var/lib/erofsd/root/etc/fstab")  # laid over the root by the next boot


def prepare() -> None:
    wait_for(serving, "the unit to be active")
    SOURCE.mkdir()
    image = Image(str(SOURCE / "blobs"), SOURCE)
    printed = run("erofsd", "mount", "--prepare", f"file:{image.boot}", "--blobs", image.url).stdout
    words = shlex.split(printed)
    options = words[words.index("-o") + 1]
    FSTAB.parent.mkdir(parents=True)
    FSTAB.write_text(f"none {MOUNT_POINT} erofs {options},nofail,x-systemd.after=erofsd.service 0 0\n")
    os.sync()
    print(f"registered: {printed.strip()}")


def check() -> None:
    assert serving(), prop("ActiveState")
    assert is_mounted()
    device = os.stat(MOUNT_POINT).st_dev
    image = Image("", SOURCE.with_name("again"))
    readers = image.start_readers()
    systemctl("restart", "erofsd")
    readers.check()
    assert os.stat(MOUNT_POINT).st_dev == device
    assert (status()["errors"], status()["dir"]) == (0, str(MOUNT_POINT))
    print("mounted by its line in fstab")


def main() -> None:
    if SOURCE.exists():
        check()
    else:
        prepare()


main()
