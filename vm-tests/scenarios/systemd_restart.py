"""``systemctl restart`` under readers: they wait, then get right bytes; nothing is mounted anew.

kernels: fanotify uml-6.12 uml-6.1
root: systemd
time limit: 600 s under emulation, 150 s else
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from service_rig import MOUNT_POINT, ROUNDS, prop, slow_image, status, systemctl, wait_for


def main() -> None:
    with slow_image() as image:
        device = os.stat(MOUNT_POINT).st_dev
        gaps = []
        image.going.clear()
        readers = image.start_readers()
        wait_for(readers.waiting, "all readers to wait")
        for _ in range(ROUNDS):
            main_pid = prop("MainPID")
            started = time.monotonic()
            systemctl("restart", "erofsd")
            gaps.append(time.monotonic() - started)
            assert prop("MainPID") != main_pid
            assert readers.waiting()
        image.going.set()
        readers.check()
        for _ in range(ROUNDS):
            readers = image.start_readers()
            systemctl("daemon-reexec")  # the store outlives the manager's own upgrade
            systemctl("restart", "erofsd")
            readers.check()
        assert os.stat(MOUNT_POINT).st_dev == device
        assert status()["errors"] == 0
        assert prop("NRestarts") == "0"
        print(f"restarted: {', '.join(f'{gap:.2f}' for gap in gaps)} s each under waiting readers")


main()
