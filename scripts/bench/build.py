#!/usr/bin/env python3
"""Making images: speed, memory and size, against what the machine's own tools do with the same files.

The tree is a copy of a part of this machine's /usr. Every figure is the best of some rounds in which ours and
the baseline take turns: other work on the machine hits both.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
from harness import MIB, ROOT

PLACES = ("/usr/lib/python3", "/usr/lib/x86_64-linux-gnu", "/usr/share", "/usr/bin")


@dataclass
class Cost:
    """What a command took.

    Attributes:
        memory: Peak resident bytes of the largest process.
        cpu_s: Of all processes.
    """

    wall_s: float
    cpu_s: float
    memory: int


def run(command: Sequence[object] | str) -> Cost:
    """Run *command*, with a shell if it is one text."""
    shell = isinstance(command, str)
    started = time.perf_counter()
    process = subprocess.Popen(
        f"set -o pipefail; {command}" if shell else list(map(str, command)),
        shell=shell,
        executable="/bin/bash" if shell else None,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command}: {errors.decode(errors='replace')}")
    wall = time.perf_counter() - started
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10)


def copy_tree(target: Path, size: int) -> None:
    """Copy about *size* bytes of the machine's files; of hard links only one: they would be copies."""
    done = 0
    seen: set[int] = set()
    for place in map(Path, PLACES):
        for path in sorted(place.rglob("*")):
            if done >= size:
                return
            copy = target / path.relative_to("/")
            if path.is_symlink():
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.symlink_to(os.readlink(path))
            elif path.is_file() and path.stat().st_ino not in seen:
                seen.add(path.stat().st_ino)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
                done += path.stat().st_size


def tree_size(top: Path) -> int:
    """Bytes of all regular files."""
    return sum(p.stat().st_size for p in top.rglob("*") if p.is_file() and not p.is_symlink())


def make_image(tree: Path, layout: Path) -> None:
    """An OCI image of one gzip layer, as tar and gzip make it."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    packed = layout / "layer"
    subprocess.run(
        f"tar --sort=name --numeric-owner -C {tree} -cf - . | gzip -6n > {packed}", shell=True, check=True
    )
    with packed.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with gzip.open(packed) as file:
        diff_id = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    size = packed.stat().st_size
    packed.rename(blobs / digest)

    def add(body: dict[str, object], media_type: str) -> dict[str, object]:
        text = json.dumps(body).encode()
        name = hashlib.sha256(text).hexdigest()
        (blobs / name).write_bytes(text)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(text)}

    kind = "application/vnd.oci.image"
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]}
    config = add({"architecture": "amd64", "os": "linux", "rootfs": rootfs}, f"{kind}.config.v1+json")
    layer = {"mediaType": f"{kind}.layer.v1.tar+gzip", "digest": f"sha256:{digest}", "size": size}
    manifest = {"schemaVersion": 2, "mediaType": f"{kind}.manifest.v1+json", "config": config}
    entry = add({**manifest, "layers": [layer]}, f"{kind}.manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "source"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')


class Bench:
    """The figures of one tree.

    Attributes:
        size: Content of the tree, bytes.
    """

    def __init__(self, work: Path, tree: Path, rounds: int) -> None:
        self.work = work
        self.tree = tree
        self.rounds = rounds
        self.size = tree_size(tree)

    def erofsd(self, *argv: object) -> Callable[[], Cost]:
        """A command of ours that writes to a fresh place."""

        def work() -> Cost:
            self.clean()
            return run([sys.executable, "-m", "erofsd", *argv])

        return work

    def other(self, command: Sequence[object] | str) -> Callable[[], Cost]:
        """A command that is not ours."""

        def work() -> Cost:
            self.clean()
            return run(command)

        return work

    def clean(self) -> None:
        """Remove what was made before."""
        for name in ("out", "blobs"):
            shutil.rmtree(self.work / name, ignore_errors=True)
        for name in ("out.boot", "out.erofs", "out.zst"):
            (self.work / name).unlink(missing_ok=True)

    def race(self, name: str, ours: Callable[[], Cost], other: Callable[[], Cost], note: str = "") -> None:
        """Print speed and memory of both."""
        costs: tuple[list[Cost], list[Cost]] = ([], [])
        for _ in range(self.rounds):
            costs[0].append(ours())
            costs[1].append(other())
        best, base = (min(c.wall_s for c in side) for side in costs)
        harness.row(name, self._speed(best), self._speed(base), base / best, note)
        best, base = (min(c.cpu_s for c in side) for side in costs)
        harness.row("  CPU seconds a GiB", self._cpu(best), self._cpu(base), base / best)
        most, least = (max(c.memory for c in side) for side in costs)
        harness.row("  peak memory", f"{most / MIB:.0f} MiB", f"{least / MIB:.0f} MiB", least / most)

    def _speed(self, wall_s: float) -> str:
        return f"{self.size / wall_s / 1e6:.0f} MB/s"

    def _cpu(self, cpu_s: float) -> str:
        return f"{cpu_s / self.size * (1 << 30):.1f} s"

    def sizes(self, name: str, limit: float, *options: object) -> None:
        """Print the size of our blob against that of tar and zstd."""
        self.erofsd(
            "build", self.tree, f"file:{self.work}/out.boot", "--blobs", f"{self.work}/blobs", *options
        )()
        ours = sum(p.stat().st_size for p in (self.work / "blobs").iterdir())
        run(self.tar_zstd())
        base = (self.work / "out.zst").stat().st_size
        note = f"blob {ours / base:.3f} of tar | zstd; at most {limit} wanted"
        harness.row(name, f"{ours / MIB:.1f} MiB", f"{base / MIB:.1f} MiB", base / ours, note)

    def tar_zstd(self) -> str:
        """The baseline of building."""
        return f"tar -C {self.tree} -cf - . | zstd -q -3 -T2 -o {self.work}/out.zst"


def mkfs_options() -> list[str]:
    """The best compression that the installed mkfs.erofs has."""
    text = subprocess.run(["mkfs.erofs", "--help"], capture_output=True, text=True, check=False)
    return ["-zzstd,3"] if "zstd" in text.stdout + text.stderr else ["-zlz4"]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1000, help="MiB of files (default: 1000)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    harness.heading("making images")
    with harness.workspace() as work:
        tree, layout = work / "tree", work / "layout"
        tree.mkdir()
        copy_tree(tree, args.size * MIB)
        make_image(tree, layout)
        bench = Bench(work, tree, args.rounds)
        files = sum(1 for p in tree.rglob("*") if p.is_file())
        print(f"# {bench.size / MIB:.0f} MiB in {files} files; speeds count their content\n")
        harness.columns()
        boot = (f"file:{work}/out.boot", "--blobs", f"{work}/blobs")
        bench.race(
            "build DIR | tar | zstd -3 -T2",
            bench.erofsd("build", tree, *boot),
            bench.other(bench.tar_zstd()),
            "at least 0.8 wanted",
        )
        options = mkfs_options()
        bench.race(
            f"build DIR | mkfs.erofs {options[0]}",
            bench.erofsd("build", tree, *boot),
            bench.other(["mkfs.erofs", *options, f"{work}/out.erofs", tree]),
        )
        bench.race(
            "build DIR --format erofs | mkfs.erofs",
            bench.erofsd("build", tree, f"file:{work}/out.erofs", "--format", "erofs"),
            bench.other(["mkfs.erofs", f"{work}/out.erofs", tree]),
        )
        (layer,) = sorted(layout.glob("blobs/sha256/*"), key=lambda p: -p.stat().st_size)[:1]
        unpack = f"gzip -dc {layer} | zstd -q -3 -T2 -o {work}/out.zst"
        source, target = f"oci:{layout}:source", f"oci:{work}/out:x"
        bench.race(
            "convert, checked | gzip -dc | zstd -3 -T2",
            bench.erofsd("convert", source, target),
            bench.other(unpack),
            "at least 0.6 wanted",
        )
        bench.race(
            "convert --no-check | gzip -dc | zstd -3 -T2",
            bench.erofsd("convert", "--no-check", source, target),
            bench.other(unpack),
        )
        bench.sizes("size, defaults", 1.25)
        bench.sizes("size, --batch-size 1M", 1.08, "--batch-size", "1M")


if __name__ == "__main__":
    main()
