"""Debian's kernel source packages and running make over them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vmrun import cache
from vmrun.errors import RunnerError

# Seconds between two progress lines; a CI log wants to see life, not every object.
PROGRESS_INTERVAL_S = 20.0


def package(series: str) -> str:
    """Name of the package whose tarball holds the source of *series*."""
    return f"linux-source-{series}"


def unpack(series: str, into: Path, members: Sequence[str] = ()) -> Path:
    """Unpack the installed source of *series*, or only *members* of it; returns the source directory."""
    tarball = Path(f"/usr/src/{package(series)}.tar.xz")
    if not tarball.is_file():
        raise RunnerError(f"{tarball} is missing although {package(series)} is installed")
    print(f"  unpacking {tarball.name}", file=sys.stderr, flush=True)
    top = package(series)
    subprocess.run(
        ["nice", "-n", "19", "tar", "xf", tarball, "-C", into, *(f"{top}/{member}" for member in members)],
        check=True,
    )
    return into / top


def apply(patch: Path, tree: Path) -> None:
    """Apply *patch* to the source in *tree*; it may have moved a few lines, as it serves several series.

    Raises:
        RunnerError: It does not apply.
    """
    reply = subprocess.run(["patch", "-p1", "-i", patch], cwd=tree, capture_output=True, text=True)
    if reply.returncode != 0:
        raise RunnerError(f"{patch.name} does not apply to {tree.name}:\n{reply.stdout}{reply.stderr}")


def make(name: str, source: Path, *arguments: str, compiler: str | None = "ccache gcc") -> None:
    """Run make in *source*, quietly: the output goes to the build log, a count of objects to standard error.

    Args:
        compiler: Passed as CC=. The same for every call on one tree, or Kconfig asks its questions again.

    Raises:
        RunnerError: make failed; carries the end of its output.
    """
    log_path = cache.directory() / "logs" / f"build-{name}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    command = ["nice", "-n", "19", "make", *([f"CC={compiler}"] if compiler else []), jobs, *arguments]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "CCACHE_DIR": str(cache.directory() / "ccache")}
    environment.pop("MAKEFLAGS", None)
    started = told = time.monotonic()
    objects = 0
    tail: list[str] = []
    with (
        log_path.open("a", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            cwd=source,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            tail = [*tail[-30:], line]
            objects += line.startswith(("  CC", "  AS"))
            now = time.monotonic()
            if now - told >= PROGRESS_INTERVAL_S:
                told = now
                print(
                    f"  {name}: {objects} objects compiled, {now - started:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    if process.returncode != 0:
        raise RunnerError(
            f"{name}: make {' '.join(arguments)} failed; all of it in {log_path}\n{''.join(tail)}"
        )
