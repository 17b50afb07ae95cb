#!/usr/bin/env python3
"""Cold reads: nothing is cached, every byte comes from an HTTP origin on loopback.

- 4 KiB random reads, one in each chunk: the wait against a raw HTTP range GET of the same stored bytes; and
  the daemon's own part of it: the wait less GET, decompression, digest and write of the same chunk.
- sequential reads with 1 and 4 readers: against the slower of curl of the blob and `zstd -dc` of its chunks.
"""

from __future__ import annotations

import argparse
import http.client
import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import blake3
import harness
import zstandard
from harness import MIB, Daemon


def read_file(path: Path, start: int = 0, stop: int | None = None) -> None:
    """Read [start, stop) in pieces of 1 MiB, as cat would."""
    fd = os.open(path, os.O_RDONLY)
    try:
        at = start
        stop = os.fstat(fd).st_size if stop is None else stop
        while at < stop:
            piece = os.pread(fd, min(MIB, stop - at), at)
            if not piece:
                raise SystemExit(f"{path}: ends at {at}")
            at += len(piece)
    finally:
        os.close(fd)


def sequential(work: Path, url: str, image: harness.rafs.RafsImage, rounds: int) -> None:
    """1 and 4 readers against curl and zstd."""
    blob_id, blob = next(iter(image.blobs.items()))
    frames = work / "frames.zst"
    compressor = zstandard.ZstdCompressor(level=3)
    content = next(iter(image.files.values()))
    with open(frames, "wb") as file:
        for at in range(0, len(content), MIB):
            file.write(compressor.compress(content[at : at + MIB]))
    for readers in (1, 4):
        best: dict[str, float] = {}

        def note(name: str, seconds: float, best: dict[str, float] = best) -> None:
            best[name] = min(seconds, best.get(name, seconds))

        cpu = 0.0
        for number in range(rounds):
            note(
                "curl",
                harness.timed(
                    lambda: subprocess.run(["curl", "-s", "-o", "/dev/null", f"{url}/{blob_id}"], check=True)
                ),
            )
            note(
                "zstd",
                harness.timed(
                    lambda: subprocess.run(
                        ["zstd", "-dcq", str(frames)], stdout=subprocess.DEVNULL, check=True
                    )
                ),
            )
            with tempfile.TemporaryDirectory(dir=work) as own, Daemon(Path(own)) as daemon:
                target = Path(own) / "mnt"
                target.mkdir()
                daemon.cli("mount", f"file:{work}/image.boot", target, "--blobs", url)
                before = daemon.cpu_seconds()
                share = len(content) // readers
                threads = [
                    threading.Thread(target=read_file, args=(target / "content", k * share, (k + 1) * share))
                    for k in range(readers)
                ]
                started = time.perf_counter()
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                note("ours", time.perf_counter() - started)
                cpu = daemon.cpu_seconds() - before
                if number == 0:
                    with open(target / "content", "rb") as file:
                        if file.read() != content:
                            raise SystemExit("wrong bytes")
                daemon.cli("umount", target)
        slower = max(best["curl"], best["zstd"])
        size = len(content) / MIB
        harness.row(
            f"sequential {size:.0f} MiB, {readers} reader(s)",
            f"{size / best['ours']:.0f} MiB/s",
            f"{size / slower:.0f} MiB/s",
            slower / best["ours"],
            f"curl {best['curl']:.2f} s, zstd {best['zstd']:.2f} s, ours {best['ours']:.2f} s; "
            f"{cpu / (len(content) / (1 << 30)):.1f} CPU s a GiB; blob {len(blob) / MIB:.0f} MiB",
        )


def random_reads(work: Path, url: str, image: harness.rafs.RafsImage) -> None:
    """One 4 KiB read in every chunk, in an order without neighbours."""
    blob_id = next(iter(image.blobs))
    content = next(iter(image.files.values()))
    count = len(content) // MIB
    order = [k * 97 % count for k in range(count)] if count % 97 else list(range(count))
    compressor = zstandard.ZstdCompressor(level=3)
    stored = [compressor.compress(content[k * MIB : (k + 1) * MIB]) for k in range(count)]
    starts = [0]
    for piece in stored:
        starts.append(starts[-1] + min(len(piece), MIB))
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port))
    waits: list[float] = []
    gets: list[float] = []
    own: list[float] = []
    scratch = os.open(work / "scratch", os.O_RDWR | os.O_CREAT)
    os.ftruncate(scratch, len(content))
    target_buffer = bytearray(MIB)
    with tempfile.TemporaryDirectory(dir=work) as directory, Daemon(Path(directory)) as daemon:
        mount = Path(directory) / "mnt"
        mount.mkdir()
        daemon.cli("mount", f"file:{work}/image.boot", mount, "--blobs", url)
        fd = os.open(mount / "content", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for k in order:
            offset = k * MIB + (k * 53 % 256) * 4096

            def get(k: int = k) -> None:
                headers = {"Range": f"bytes={starts[k]}-{starts[k + 1] - 1}"}
                connection.request("GET", f"/{blob_id}", headers=headers)
                connection.getresponse().read()

            def work_of(k: int = k) -> None:
                if len(stored[k]) < MIB:
                    zstandard.ZstdDecompressor().stream_reader(stored[k]).readinto(target_buffer)
                blake3.blake3(target_buffer).digest()
                os.pwrite(scratch, target_buffer, k * MIB)

            get_s = harness.timed(get)
            work_s = harness.timed(work_of)
            started = time.perf_counter()
            piece = os.pread(fd, 4096, offset)
            wait_s = time.perf_counter() - started
            if piece != content[offset : offset + 4096]:
                raise SystemExit(f"wrong bytes at {offset}")
            waits.append(wait_s)
            gets.append(get_s)
            own.append(wait_s - get_s - work_s)
        os.close(fd)
        moved = daemon.ls(mount)["transferred_bytes"]
        daemon.cli("umount", mount)
    os.close(scratch)
    for name, q in (("p50", 0.5), ("p99", 0.99)):
        ours, raw = harness.quantile(waits, q), harness.quantile(gets, q)
        harness.row(
            f"random 4 KiB wait, {name}",
            f"{ours * 1e3:.2f} ms",
            f"{raw * 1e3:.2f} ms",
            raw / ours,
            "raw range GET of the chunk",
        )
    part = harness.median(own)
    harness.row(
        "the daemon's own part, median",
        f"{part * 1e3:.2f} ms",
        "1.00 ms",
        1e-3 / part if part > 0 else 99.0,
        "limit; wait - GET - decode - digest - write",
    )
    print(f"{count} reads of 4 KiB moved {moved / MIB:.1f} MiB")


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256, metavar="MIB", help="size of the file (default 256)")
    parser.add_argument("--rounds", type=int, default=3, help="sequential rounds, best counts (default 3)")
    args = parser.parse_args()
    harness.heading("cold reads, zstd chunks of 1 MiB, blake3, nginx on loopback")
    with harness.workspace() as work:
        print(f"building a {args.size} MiB image …", flush=True)
        image = harness.rafs.make_image({"content": harness.real_content(args.size * MIB)})
        harness.rafs.write_files(image, work)
        with harness.origin(work / "blobs", work) as url:
            harness.columns()
            random_reads(work, url, image)
            sequential(work, url, image, args.rounds)


if __name__ == "__main__":
    main()
