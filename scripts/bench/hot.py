#!/usr/bin/env python3
"""Hot reads: the image is complete, its data is local. The daemon must not be noticed.

The same tree three times: through erofsd's mount (complete, so unmarked), on ext4 (or whatever holds
/var/tmp, or EROFSD_TEST_DIR), and through a daemonless EROFS mount of the same bootstrap and the same blob
files. Each figure with the page cache dropped ("local") and hot ("page cache").

Over fscache nothing can be mounted without a daemon, so ext4 is the only baseline there; what others have
published is printed beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import harness
from harness import MIB, Daemon

from ondemand import syscalls


def read_sequential(top: Path) -> None:
    """The big file in pieces of 128 KiB."""
    fd = os.open(top / "big", os.O_RDONLY)
    buffer = bytearray(128 << 10)
    while os.readv(fd, [buffer]):
        pass
    os.close(fd)


def read_random(top: Path) -> None:
    """4000 reads of 4 KiB all over the big file, the same ones every time."""
    fd = os.open(top / "big", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    pages = os.fstat(fd).st_size // 4096
    order = random.Random(7)
    for _ in range(4000):
        os.pread(fd, 4096, order.randrange(pages) * 4096)
    os.close(fd)


def tar_tree(top: Path) -> None:
    """tar of the small files."""
    subprocess.run(["tar", "-cf", "/dev/null", "--ignore-failed-read", "-C", str(top), "src"], check=True)


def read_tree(top: Path) -> None:
    """Open and read every small file (tar to /dev/null would not read them)."""
    for directory, _, names in os.walk(top / "src"):
        for name in names:
            with open(os.path.join(directory, name), "rb") as file:
                file.read()


def stat_storm(top: Path) -> None:
    """lstat of everything, ten times."""
    for _ in range(10):
        for directory, subdirectories, names in os.walk(top / "src"):
            for name in subdirectories + names:
                os.lstat(os.path.join(directory, name))


FIGURES: list[tuple[str, Callable[[Path], None]]] = [
    ("sequential read, 128 KiB pieces", read_sequential),
    ("random 4 KiB reads", read_random),
    ("open and read a tree of small files", read_tree),
    ("tar of the tree's metadata", tar_tree),
    ("stat storm", stat_storm),
]


PUBLISHED = {"sequential read, 128 KiB pieces": 0.85, "random 4 KiB reads": 0.93}
"""Cached reads over fscache against ext4. Source: fio figures of the series that brought it to Linux 5.19."""


def measure(places: dict[str, Path], rounds: int, published: Mapping[str, float]) -> None:
    """Print every figure, cold and hot page cache, against the other places."""
    for name, work in FIGURES:
        for state in ("local", "page cache"):
            best: dict[str, float] = {}
            for number in range(rounds):
                # Not always the same first: the disk under us has a cache of its own.
                for place in sorted(places, key=lambda p: (hash(p) + number) % len(places)):
                    if state == "local":
                        harness.drop_caches()
                    else:
                        work(places[place])
                    seconds = harness.timed(partial(work, places[place]))
                    best[place] = min(seconds, best.get(place, seconds))
            ours = best["erofsd"]
            for baseline in sorted(best.keys() - {"erofsd"}, reverse=True):
                told = f"; published {published[name]}" if state == "local" and name in published else ""
                harness.row(
                    f"{name}, {state}",
                    f"{ours * 1e3:.1f} ms",
                    f"{best[baseline] * 1e3:.1f} ms",
                    best[baseline] / ours,
                    f"against {baseline}{told}",
                )


def main() -> None:
    """Build, prefetch, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=int, default=128, metavar="MIB", help="size of the big file (default 128)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds, best counts (default 5)")
    args = parser.parse_args()
    harness.heading(
        "hot reads: erofsd (complete) against ext4, and a daemonless EROFS mount where there is one"
    )
    with harness.workspace() as work:
        content = harness.real_content(args.size * MIB)
        files = {"big": content}
        for k in range(3000):
            at = k * 40961 % (len(content) - 40960)
            files[f"src/{k % 60:02d}/file{k:04d}.c"] = content[at : at + 1024 + k * 37 % 20000]
        image = harness.rafs.make_image(files)
        bootstrap = harness.rafs.write_files(image, work)
        plain = work / "ext4"
        for name, data in files.items():
            (plain / name).parent.mkdir(parents=True, exist_ok=True)
            (plain / name).write_bytes(data)
        with Daemon(work) as daemon:
            target = work / "mnt"
            target.mkdir()
            daemon.cli("mount", f"file:{bootstrap}", target, "--blobs", work / "blobs")
            daemon.cli("prefetch", target)
            engine = daemon.ls(target)["engine"]
            events = _events(daemon, engine)
            harness.columns()
            places = {"erofsd": target, "ext4": plain}
            if engine == "cachefiles":
                read_tree(target)  # the kernel fills the metadata when it is read
                events = _events(daemon, engine)
                measure(places, args.rounds, PUBLISHED)
            else:
                with _daemonless(daemon, bootstrap, work) as daemonless:
                    measure({**places, "daemonless": daemonless}, args.rounds, {})
            print(f"events of engine {engine} while measuring: {_events(daemon, engine) - events}")
            daemon.cli("umount", target)


@contextlib.contextmanager
def _daemonless(daemon: Daemon, bootstrap: Path, work: Path) -> Iterator[Path]:
    """The kernel's own mount of the same files."""
    target = work / "daemonless"
    target.mkdir()
    blobs = [str(path) for path in sorted((daemon.state_dir / "blobs").glob("*.data"))]
    syscalls.mount_erofs(str(bootstrap), str(target), blobs)
    try:
        yield target
    finally:
        syscalls.umount2(str(target), 0)


def _events(daemon: Daemon, engine: str) -> int:
    import http.client
    import socket

    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(daemon.socket))
    connection.request("GET", "/metrics")
    for line in connection.getresponse().read().decode().splitlines():
        if line.startswith(f'erofsd_engine_events_total{{engine="{engine}"}}'):
            return int(float(line.split()[-1]))
    raise SystemExit("no erofsd_engine_events_total in /metrics")


if __name__ == "__main__":
    main()
