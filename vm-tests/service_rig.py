"""What the systemd scenarios share: the service as an operator sees it, an image, readers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import rafs
from tests.daemon.test_mounts import drop_caches, read_everything, tree
from tests.registry import Exchange, lying_origin

SKIP = 77
NOT_POSSIBLE_HERE = 3
UNIT = "erofsd.service"
MOUNT_POINT = Path("/mnt")
#: Everything takes ten times as long where even the processor is.
EMULATED = not os.environ.get("VM_KERNEL", "").startswith("uml")
ROUNDS = 1 if EMULATED else 3


def wait_for(condition: Callable[[], Any], what: str, limit_s: float = 200.0) -> Any:
    """The first true value of *condition*; the scenario's own limit is the hard one."""
    deadline = time.monotonic() + limit_s
    while True:
        asked = time.monotonic()
        if value := condition():
            return value
        if asked > deadline:
            raise AssertionError(f"{what}: not within {limit_s:g} s\n{journal()}")
        # Starting systemctl again and again would take the emulated processor from whom we wait for.
        time.sleep(max(0.02, 4 * (time.monotonic() - asked)))


def run(*command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A program, with its output."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if check and done.returncode != 0:
        raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}\n{journal()}")
    return done


def systemctl(*words: str) -> str:
    """What it prints."""
    return run("systemctl", *words).stdout.strip()


def prop(name: str) -> str:
    """A property of the unit."""
    return systemctl("show", UNIT, "--property", name, "--value")


def journal() -> str:
    """The service's last words."""
    words = ["journalctl", "--no-pager", "--output", "cat", "--lines", "60", "--unit", UNIT]
    return subprocess.run(words, capture_output=True, text=True).stdout


def serving() -> bool:
    """True when the unit is active; its process may be about to be replaced all the same."""
    return prop("ActiveState") == "active"


def is_mounted() -> bool:
    """Whether the image is there."""
    return os.path.ismount(MOUNT_POINT)


def status() -> dict[str, Any]:
    """The one mount, as ``ls`` shows it."""
    mounts = json.loads(run("erofsd", "ls", "--json").stdout)
    (mount,) = mounts
    found: dict[str, Any] = mount
    return found


class Image:
    """An image that is mounted at MOUNT_POINT; its source answers while *going* is set."""

    def __init__(self, url: str, directory: Path) -> None:
        self.files = tree(1, count=8 * ROUNDS, size=200_000)
        self.image = rafs.make_image(self.files, chunk_size=64 << 10)
        self.boot = rafs.write_files(self.image, directory)
        self.url = url
        self.going = threading.Event()
        self.going.set()

    def answer(self, exchange: Exchange) -> None:
        """Of the source."""
        self.going.wait()
        exchange.honest()

    def mount(self) -> None:
        """Mount it; ends the scenario where no engine works."""
        done = run("erofsd", "mount", f"file:{self.boot}", MOUNT_POINT, "--blobs", self.url, check=False)
        if done.returncode == NOT_POSSIBLE_HERE:
            print(f"no engine works here: {done.stderr.strip()}")
            sys.exit(SKIP)
        assert done.returncode == 0, f"{done.stderr}\n{journal()}"

    def start_readers(self, count: int = 1 + ROUNDS) -> Readers:
        """Every page of every file, each reader in an order of its own."""
        drop_caches()
        return Readers(self, count)


class Readers:
    """Threads that read a whole image; `check` ends with them."""

    def __init__(self, image: Image, count: int) -> None:
        self._wrong: list[str] = []
        self._threads = [
            threading.Thread(
                target=read_everything, args=(MOUNT_POINT, image.files, k, self._wrong), daemon=True
            )
            for k in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def waiting(self) -> bool:
        """True when all of them wait in the kernel."""
        stats = [Path(f"/proc/self/task/{thread.native_id}/stat") for thread in self._threads]
        return all(stat.read_text().rpartition(")")[2].split()[0] == "D" for stat in stats if stat.exists())

    def check(self) -> None:
        """Wait for them; every byte was right."""
        for thread in self._threads:
            thread.join()
        assert not self._wrong, f"{self._wrong[:5]} of {len(self._wrong)}\n{journal()}"


@contextmanager
def slow_image() -> Iterator[Image]:
    """An image, mounted from an HTTP server in this process."""
    wait_for(serving, "the unit to be active")
    with lying_origin() as origin, tempfile.TemporaryDirectory(dir="/var/lib/erofsd") as directory:
        image = Image(origin.url, Path(directory))
        for blob_id, data in image.image.blobs.items():
            origin.objects[f"/{blob_id}"] = data
            origin.always[f"/{blob_id}"] = image.answer
        image.mount()
        yield image
        image.going.set()
