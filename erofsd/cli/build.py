"""``erofsd build``: a file tree becomes a lazily mountable image."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from erofsd.cli.imaging import DEST_HELP, add_image_options
from erofsd.cli.options import Subparsers, add_config, add_json, add_verb, run_async

if TYPE_CHECKING:
    from erofsd.build.job import Outcome
    from erofsd.cli.imaging import Console


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = add_verb(
        subparsers,
        "build",
        "make a lazily mountable image of a directory or a tar",
        """
erofsd build ./rootfs registry.example/app:lazy
erofsd build rootfs.tar.zst oci:/images/app:lazy --chunk-size 256K --batch-size 256K
erofsd build ./rootfs file:/images/app.boot --blobs /images/blobs
erofsd build ./rootfs file:/images/app.erofs --format erofs
""",
    )
    parser.add_argument("source", type=Path, metavar="DIR|TAR", help="directory, or tar (plain, gzip, zstd)")
    parser.add_argument("dest", metavar="DEST", help=DEST_HELP)
    add_image_options(parser)
    add_config(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build; print what came of it."""
    from erofsd.cli.imaging import Console, show

    console = Console()
    started = time.monotonic()
    try:
        outcome = _build(args, console)
    finally:
        console.close()
    show(outcome, args, time.monotonic() - started)
    return 0


def _build(args: argparse.Namespace, console: Console) -> Outcome:
    from erofsd.build.create import create
    from erofsd.build.destination import parse_destination
    from erofsd.build.workdir import WorkDir
    from erofsd.cli.imaging import source_settings, wanted

    asked = wanted(args)
    destination = parse_destination(args.dest, args.blobs, format_=args.format)
    settings = source_settings(args)
    with WorkDir(None, f"build {args.source.absolute()} {destination}") as work:
        return run_async(create(args.source, destination, asked, settings, work, console))
