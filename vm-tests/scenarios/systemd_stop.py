"""``systemctl stop`` unmounts and empties the store; the next start brings the mount back.

kernels: fanotify uml-6.12 uml-6.1
root: systemd
time limit: 600 s under emulation, 150 s else
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from service_rig import is_mounted, journal, prop, slow_image, status, systemctl


def main() -> None:
    with slow_image() as image:
        image.start_readers(1).check()
        systemctl("restart", "erofsd")
        assert is_mounted()
        systemctl("stop", "erofsd")
        assert not is_mounted()
        assert prop("NFileDescriptorStore") == "0"
        assert prop("Result") == "success", journal()
        systemctl("start", "erofsd")
        assert is_mounted()
        image.start_readers(1).check()
        assert status()["errors"] == 0
        print("stopped and started")


main()
