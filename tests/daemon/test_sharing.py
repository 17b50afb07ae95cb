"""Images that need different parts of one blob, while workers die."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import rafs
from tests.daemon.conftest import Daemon, wait_for
from tests.daemon.readers import EIO, read, right
from tests.daemon.test_mounts import assert_content
from tests.registry import Exchange, Origin

pytestmark = pytest.mark.usefixtures("fanotify_here")

RNG = random.Random(31)
FILES = {f"file{k:03d}": RNG.randbytes(40_000) for k in range(150)}
FEW = ["file000", "file070"]


@pytest.fixture
def mounts(daemon: Daemon, tmp_path: Path) -> tuple[Path, Path]:
    """All files, nothing read yet; and a few of them, complete, which comes back first."""
    all_of_them, few = rafs.make_family(FILES, [sorted(FILES), FEW])
    mounted = []
    for name, image in (("few", few), ("all", all_of_them)):
        boot = rafs.write_files(image, tmp_path / name)
        mounted.append(
            daemon.mount(f"file:{boot}", "--blobs", tmp_path / name / "blobs", "--prefetch", "none")
        )
    daemon.cli("prefetch", mounted[0])
    return mounted[1], mounted[0]


def test_a_complete_image_that_comes_back_first_does_not_unguard_its_neighbour(
    daemon: Daemon, mounts: tuple[Path, Path]
) -> None:
    everything, few = mounts
    assert daemon.ls(few)["state"] == "complete"
    assert daemon.ls(everything)["state"] == "lazy"
    names = [name for name in FILES if name not in FEW]
    RNG.shuffle(names)
    wrong: list[tuple[str, object]] = []

    def reader(mine: list[str]) -> None:
        for name in mine:
            try:
                found = (everything / name).read_bytes()
            except OSError as exc:
                wrong.append((name, exc.errno))
                continue
            if found != FILES[name]:
                wrong.append((name, "zeros" if not any(found) else "other bytes"))
            over.wait(0.02)  # spread over the lives of several workers

    over = threading.Event()
    readers = [threading.Thread(target=reader, args=(names[k::4],)) for k in range(4)]
    for each in readers:
        each.start()
    while any(each.is_alive() for each in readers):
        daemon.kill_worker()
        over.wait(0.1)
    assert not wrong
    assert daemon.ls(everything)["errors"] == 0


def test_an_image_that_failed_keeps_its_guard_when_its_neighbour_is_unmounted(
    daemon: Daemon, mounts: tuple[Path, Path]
) -> None:
    everything, few = mounts
    damaged = daemon.ls(everything)["image"]
    (daemon.state_dir / "images" / damaged / "image.json").write_bytes(b"garbage")
    worker = daemon.pid("worker")
    daemon.kill_worker()
    wait_for(lambda: daemon.pid("worker") != worker, "another worker")
    assert read(few / FEW[0]) == right(FILES[FEW[0]])
    daemon.cli("umount", few)
    assert read(everything / "file100") == EIO


def test_a_source_that_hangs_does_not_starve_another_one(
    make_daemon: Callable[..., Daemon], tmp_path: Path, origin: Origin
) -> None:
    daemon = make_daemon(deadline=30)
    rng = random.Random(32)
    large = {f"large{k}": rng.randbytes(12 << 20) for k in range(8)}
    image = rafs.make_image(large, compressor="none", chunk_size=16 << 20)
    (blob_id,) = image.blobs
    origin.objects[f"/{blob_id}"] = image.blobs[blob_id]
    boot = rafs.write_files(image, tmp_path / "large")
    hanging = daemon.mount(f"file:{boot}", "--blobs", origin.url, "--prefetch", "none")
    good_boot = rafs.write_files(rafs.make_image({"good": b"good" * 1000}), tmp_path / "good")
    good = daemon.mount(f"file:{good_boot}", "--blobs", tmp_path / "good" / "blobs", "--prefetch", "none")

    def begin_and_hang(exchange: Exchange) -> None:
        first, stop = exchange.wanted() or (0, 0)
        exchange.head(206, stop - first, Content_Range=f"bytes {first}-{stop - 1}/{len(exchange.body())}")
        exchange.hang()

    origin.always[f"/{blob_id}"] = begin_and_hang
    asked = len(origin.seen)
    readers = [threading.Thread(target=read, args=(hanging / name, 0, 4096)) for name in large]
    for each in readers:
        each.start()
    wait_for(lambda: len(origin.seen) - asked >= 2, "requests for large chunks")
    assert_content(good, {"good": b"good" * 1000})
    origin.always.clear()
    origin.over.set()
    for each in readers:
        each.join()
