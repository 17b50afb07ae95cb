"""``erofsd convert``: an ordinary image becomes a lazily mountable one, or the other way round."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from erofsd.cli.imaging import DEST_HELP, add_image_options
from erofsd.cli.options import Subparsers, add_config, add_json, add_verb, run_async
from erofsd.errors import UsageError

if TYPE_CHECKING:
    from erofsd.build.job import Outcome
    from erofsd.cli.imaging import Console


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = add_verb(
        subparsers,
        "convert",
        "make an ordinary image lazily mountable, or the other way round",
        """
erofsd convert python:3.12 registry.example/python:3.12-lazy
erofsd convert registry.example/app:2 registry.example/app:2-lazy --chunk-dict registry.example/app:1-lazy
erofsd convert oci-archive:app.tar oci:/images/app:lazy --platform linux/amd64
erofsd convert --to oci registry.example/app:2-lazy oci:/images/app:plain
""",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="[docker://]HOST/REPO:TAG, oci:DIR[:TAG], oci-archive:FILE, docker-archive:FILE",
    )
    parser.add_argument("dest", metavar="DEST", help=DEST_HELP)
    parser.add_argument("--to", choices=("rafs", "oci"), default="rafs", help="what to make (default: rafs)")
    parser.add_argument(
        "--platform",
        metavar="OS/ARCH",
        action="append",
        type=_platforms,
        help="of an index only these; may be repeated (default: all for Linux)",
    )
    parser.add_argument(
        "--referrer",
        action="store_true",
        help="tie it to SRC, whose repository it goes to; without a tag in DEST that is its only name",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="publish without comparing it with SRC before"
    )
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="keep converted layers here, for this and other images"
    )
    add_image_options(parser)
    add_config(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def _platforms(text: str) -> list[str]:
    found = text.split(",")
    if not all(part.count("/") in (1, 2) and all(part.split("/")) for part in found):
        raise argparse.ArgumentTypeError(f"not OS/ARCH: {text!r}")
    return found


def run(args: argparse.Namespace) -> int:
    """Convert; print what came of it."""
    from erofsd.cli.imaging import Console, show

    args.platform = [platform for group in args.platform or () for platform in group]
    console = Console()
    started = time.monotonic()
    try:
        outcome = _convert(args, console)
    finally:
        console.close()
    show(outcome, args, time.monotonic() - started)
    return 0


def _convert(args: argparse.Namespace, console: Console) -> Outcome:
    from erofsd.backends.reference import parse_reference
    from erofsd.build.back import convert_back
    from erofsd.build.convert import convert
    from erofsd.build.destination import parse_destination
    from erofsd.build.workdir import WorkDir
    from erofsd.cli.imaging import source_settings, wanted

    asked = wanted(args)
    source = parse_reference(args.source)
    back = args.to == "oci"
    if back and (args.referrer or args.chunk_dict or args.format == "erofs"):
        raise UsageError("convert: --to oci goes with neither --referrer nor --chunk-dict nor --format erofs")
    destination = parse_destination(
        args.dest, args.blobs, format_=args.format, source=source, referrer=args.referrer
    )
    settings = source_settings(args)
    with WorkDir(args.work_dir, f"convert {source} {destination}") as work:
        if back:
            return run_async(
                convert_back(
                    source,
                    destination,
                    settings,
                    work,
                    console,
                    platforms=asked.platforms,
                    threads=asked.options.jobs,
                    check=asked.check,
                )
            )
        return run_async(convert(source, destination, asked, settings, work, console))
