"""``erofsd prefetch``: fill now what would be fetched when it is read."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from erofsd.cli.options import (
    Subparsers,
    absolute,
    absolute_ref,
    add_json,
    add_socket,
    add_verb,
    connect,
    run_async,
)
from erofsd.errors import UsageError

if TYPE_CHECKING:
    from erofsd.api import PrefetchRequest


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = add_verb(
        subparsers,
        "prefetch",
        "fetch an image or some of its files now; returns when all of it is here",
        """
erofsd prefetch /mnt/app
erofsd prefetch registry.example/app:nydus
erofsd prefetch /mnt/app --files startup-files.txt
find /mnt/app/usr/lib -printf '/usr/lib/%P\\n' | erofsd prefetch /mnt/app --files -
""",
    )
    parser.add_argument("target", metavar="REF|DIR", help="a mounted directory, or an image by reference")
    parser.add_argument(
        "--files",
        metavar="LIST",
        help="only these files and directories: a text file with a path inside the image a line; - for stdin",
    )
    add_socket(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fill; show progress on a terminal."""
    from erofsd.api import PrefetchRequest

    request = PrefetchRequest(
        target=absolute(args.target) if os.path.isdir(args.target) else absolute_ref(args.target),
        files=None if args.files is None else read_list(args.files),
    )
    return run_async(_prefetch(args, request))


async def _prefetch(args: argparse.Namespace, request: PrefetchRequest) -> int:
    from erofsd.api import PrefetchProgress
    from erofsd.cli.output import human, print_json, progress_bar

    last = PrefetchProgress()
    async with connect(args) as client:
        with progress_bar(args.target) as bar:
            async for progress in client.prefetch(request):
                if progress.total_bytes:
                    last = progress
                    bar.total = progress.total_bytes
                    bar.n = progress.fetched_bytes
                    bar.refresh()
    if args.json:
        print_json({"fetched_bytes": last.fetched_bytes, "total_bytes": last.total_bytes})
    else:
        print(f"{args.target}: {human(last.fetched_bytes)} of {human(last.total_bytes)} here")
    return 0


def read_list(name: str) -> list[str]:
    """The paths in file *name*, one a line, as latin-1; skips empty lines and those that begin with ``#``.

    Raises:
        UsageError: The file cannot be read.
    """
    try:
        text = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("latin-1")
    except OSError as exc:
        raise UsageError(f"--files {name}: {exc.strerror}") from exc
    lines = [line for line in text.split("\n") if line and not line.startswith("#")]
    return [line if line.startswith("/") else "/" + line for line in lines]
