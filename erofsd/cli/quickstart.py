"""``erofsd quickstart``: the three-minute demonstration."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from erofsd.cli.options import Subparsers, add_json, add_verb, run_async
from erofsd.errors import ErofsdError, NotPossibleHere

if TYPE_CHECKING:
    from erofsd.quickstart.demo import Result

NEXT_STEPS = """\
Go on:
  erofsd doctor                                    what this machine can do
  erofsd serve                                     the daemon, in the foreground
  erofsd convert IMAGE:TAG REGISTRY/IMAGE:lazy     an ordinary image becomes a lazily mountable one
  erofsd mount REGISTRY/IMAGE:lazy /mnt/image      that, or one that nydusify or mkfs.erofs made
  erofsd ls                                        how much of it is here
  erofsd --man                                     the manual
"""


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = add_verb(
        subparsers,
        "quickstart",
        "show on a sample image what lazy mounting does; leaves nothing behind",
        "erofsd quickstart\nerofsd quickstart --dir /srv/tmp",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="where to work: 200 MB on ext4, XFS or btrfs (default: /var/tmp, /tmp or /var/lib)",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demonstration; print its figures."""
    from erofsd.cli import machine
    from erofsd.cli.output import print_json

    if os.geteuid() != 0:
        raise ErofsdError("quickstart mounts a file system, which needs root", hint="sudo erofsd quickstart")
    base = _working_directory(args.dir)
    engines = machine.probe_engines(base)
    if not any(engine.works for engine in engines):
        for engine in engines:
            print(f"{engine.name}: {engine.reason}", file=sys.stderr)
            if engine.hint:
                print(f"  hint: {engine.hint}", file=sys.stderr)
        raise NotPossibleHere(
            "no engine works on this kernel, so nothing can be mounted lazily here",
            hint="Linux 6.15 or later has one, with CONFIG_FANOTIFY_ACCESS_PERMISSIONS and"
            " CONFIG_EROFS_FS_BACKED_BY_FILE; `erofsd doctor` says more",
        )
    from erofsd.quickstart.demo import run_demo

    # An end from outside is an end in order: what is mounted is unmounted, what was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    result = run_async(run_demo(base.absolute(), lambda line: print(f"==> {line}", file=sys.stderr)))
    if args.json:
        print_json(result)
    else:
        _print(result)
    return 0


def _working_directory(chosen: Path | None) -> Path:
    from erofsd.cli import machine

    candidates = [chosen] if chosen else [Path(p) for p in ("/var/tmp", "/tmp", "/var/lib")]
    kinds = []
    for path in candidates:
        if not path.is_dir():
            raise ErofsdError(f"{path}: no such directory")
        kind = machine.file_system(path)
        if kind in machine.STATE_FILE_SYSTEMS:
            return path
        kinds.append(f"{path} is on {kind}")
    raise NotPossibleHere(
        "; ".join(kinds) + ": erofsd needs ext4, XFS or btrfs",
        hint="name a directory on one with --dir",
    )


def _print(result: Result) -> None:
    from erofsd.cli.output import human, table

    share = 100 * result.fetched_bytes / result.image_bytes
    rows = [
        (
            "image size",
            human(result.image_bytes),
            f"{result.files} files, {human(result.content_bytes)} of content",
        ),
        (
            "fetched by then",
            human(result.fetched_bytes),
            f"{share:.0f} % of the image, {result.requests} requests",
        ),
        ("files read", str(result.files_read), f"of {result.files}"),
        ("waits", str(result.waits), "times that a reader waited for data"),
        ("mounted after", f"{result.mount_s:.2f} s", f"engine {result.engine}"),
        ("program ran", f"{result.program_s:.2f} s", "cold; every byte it read came through the mount"),
        ("again", f"{result.repeat_s:.2f} s", "warm; the kernel serves what is here"),
        (
            "compared",
            str(result.files_compared),
            f"files equal to their source, in {result.complete_s:.2f} s",
        ),
    ]
    print()
    print(table(("", "", ""), rows, right=(1,)).partition("\n")[2])
    print()
    print(NEXT_STEPS, end="")
