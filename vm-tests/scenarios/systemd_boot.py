"""The unit is active and the image mounted when the machine is up, without any network.

kernels: fanotify uml-6.12 uml-6.1
root: systemd
boots: 2
time limit: 600 s under emulation, 150 s else
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from service_rig import Image, is_mounted, prop, serving, status, wait_for


def main() -> None:
    source = Path("/var/lib/erofsd/source")
    if not source.exists():
        wait_for(serving, "the unit to be active")
        source.mkdir()
        Image(str(source / "blobs"), source).mount()
        os.sync()  # the source's files; the daemon has seen to its own
        print("mounted, first boot")
        return
    assert serving(), prop("ActiveState")
    assert is_mounted()
    Image(str(source / "blobs"), source.with_name("again")).start_readers().check()
    assert status()["errors"] == 0
    print("mounted again by the second boot")


main()
