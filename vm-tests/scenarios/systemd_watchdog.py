"""A keeper that hangs is killed by the watchdog and replaced; readers wait, then get right bytes.

kernels: fanotify uml-6.12 uml-6.1
root: systemd
time limit: 600 s under emulation, 150 s else
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from service_rig import EMULATED, prop, serving, slow_image, status, systemctl, wait_for

DROP_IN = Path("/etc/systemd/system/erofsd.service.d/impatient.conf")


def main() -> None:
    DROP_IN.parent.mkdir()
    DROP_IN.write_text(f"[Service]\nWatchdogSec={40 if EMULATED else 6}s\nTimeoutAbortSec=1s\n")
    systemctl("daemon-reload")
    systemctl("restart", "erofsd")
    with slow_image() as image:
        image.going.clear()
        readers = image.start_readers()
        wait_for(readers.waiting, "all readers to wait")
        keeper = int(prop("MainPID"))
        os.kill(keeper, signal.SIGSTOP)
        wait_for(lambda: int(prop("MainPID")) not in (keeper, 0) and serving(), "another keeper")
        assert prop("NRestarts") == "1"
        image.going.set()
        readers.check()
        assert status()["errors"] == 0
        print("the watchdog replaced a stopped keeper")


main()
