"""SIGKILL of the keeper, then of the whole service, under readers: they wait, then get right bytes.

kernels: fanotify uml-6.12 uml-6.1
root: systemd
time limit: 600 s under emulation, 150 s else
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from service_rig import MOUNT_POINT, ROUNDS, prop, serving, slow_image, status, systemctl, wait_for


def main() -> None:
    with slow_image() as image:
        device = os.stat(MOUNT_POINT).st_dev
        gaps = []
        for who in ["main", "all"] * ROUNDS:
            image.going.clear()
            readers = image.start_readers()
            if not gaps:  # later on the image may be complete
                wait_for(readers.waiting, "all readers to wait")
            main_pid = prop("MainPID")
            started = time.monotonic()
            systemctl("kill", "--signal", "KILL", "--kill-who", who, "erofsd")
            wait_for(
                lambda main_pid=main_pid: prop("MainPID") not in (main_pid, "0") and serving(),
                "another keeper",
            )
            gaps.append(time.monotonic() - started)
            image.going.set()
            readers.check()
        assert os.stat(MOUNT_POINT).st_dev == device
        assert status()["errors"] == 0
        print(
            f"back after {', '.join(f'{gap:.2f}' for gap in gaps)} s;"
            f" {prop('NRestarts')} of {len(gaps)} by a restart, the others by the worker"
        )


main()
