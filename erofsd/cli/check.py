"""``erofsd check``: verify all of an image."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from erofsd.cli.options import Subparsers, add_config, add_json, add_source, add_verb, run_async
from erofsd.errors import BlobCorrupt, ErofsdError, ImageRefused, UsageError

if TYPE_CHECKING:
    from erofsd.blobs.layout import BlobLayout
    from erofsd.build.compare import Difference
    from erofsd.cli.opened import Opened
    from erofsd.cli.output import Bar
    from erofsd.images.base import ByteSource
    from erofsd.images.rafs6.format import BlobEntry

FAULTS_SHOWN = 20


@dataclass(slots=True)
class Report:
    """What was verified, and what is wrong.

    Attributes:
        verified: What stands behind the bytes: ``blake3``, ``sha256``, or ``none``.
        chunks: Chunks whose data was fetched, decoded and, where there are digests, compared.
        faults: One text a fault; empty if the image is sound.
        against: What its tree was compared with; None if with nothing.
        differences: In what the trees differ: the first ones.
        difference_count: All of them.
        warnings: What of the other tree no image can hold, and was left out.
    """

    ref: str
    format: str = ""
    verified: str = ""
    entries: int = 0
    chunks: int = 0
    stored_bytes: int = 0
    faults: list[str] = field(default_factory=list)
    against: str | None = None
    differences: list[Difference] = field(default_factory=list)
    difference_count: int = 0
    warnings: list[str] = field(default_factory=list)
    ok: bool = False


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = add_verb(
        subparsers,
        "check",
        "verify an image: metadata, every chunk, every file; compare its tree with another",
        """
erofsd check registry.example/app:nydus
erofsd check --json file:/images/app.boot --blobs /images/blobs
erofsd check registry.example/app:nydus --against registry.example/app:latest
erofsd check ./app.erofs --against ./rootfs --ignore mtime
""",
    )
    add_source(parser)
    parser.add_argument(
        "--against", metavar="REF|DIR|TAR", help="prove that its tree is that of this image, directory or tar"
    )
    parser.add_argument(
        "--ignore",
        metavar="ASPECTS",
        type=_aspects,
        default=(),
        help="with --against: mtime, xattrs, or both with a comma: do not compare these",
    )
    add_config(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def _aspects(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if not set(found) <= {"mtime", "xattrs"}:
        raise argparse.ArgumentTypeError(f"only mtime and xattrs can be ignored, not {text!r}")
    return found


def run(args: argparse.Namespace) -> int:
    """Verify; the exit code is 4 if anything is wrong with the image, or not as in the other tree."""
    from erofsd.cli.output import human, print_json

    if args.ignore and args.against is None:
        raise UsageError("check: --ignore goes with --against")
    report = Report(args.ref)
    try:
        run_async(_check(args, report))
    except ImageRefused as exc:
        if not args.json:
            raise
        report.faults.append(str(exc))
    report.ok = not report.faults and not report.difference_count
    if args.json:
        print_json(report)
    elif report.ok:
        print(
            f"{args.ref}: sound: {report.format}, {report.entries} entries, {report.chunks} chunks,"
            f" {human(report.stored_bytes)}; verified: {report.verified}"
        )
        if report.against is not None:
            print(f"{args.ref}: the same tree as {report.against}")
    else:
        _complain(report)
    return 0 if report.ok else ImageRefused.exit_code


def _complain(report: Report) -> None:
    from erofsd.cli import report as report_error

    told = [*report.faults, *(f"{report.ref}: {difference}" for difference in report.differences)]
    count = len(report.faults) + report.difference_count
    shown = told[:FAULTS_SHOWN]
    for text in shown:
        report_error(ImageRefused(text))
    if report.difference_count:
        what = f"{report.difference_count} differences from {report.against}"
    else:
        what = f"{len(report.faults)} faults"
    if count > len(shown):
        hint = "--json lists more of them"
    elif report.faults:
        hint = "ask whoever built it, or copy it again from where it is sound"
    else:
        hint = ""
    report_error(ImageRefused(f"{report.ref}: {what}", hint=hint))


async def _check(args: argparse.Namespace, report: Report) -> None:
    import asyncio

    from erofsd.cli.opened import open_ref
    from erofsd.cli.output import progress_bar

    async with open_ref(args) as opened:
        report.format, report.verified = opened.image.format, opened.image.verified
        with progress_bar("check", sum(_size(layout) for _, layout in opened.slots)) as bar:
            await asyncio.to_thread(_check_tree, opened, report)
            if opened.image.bootstrap is not None:
                await _check_framing(opened, report)
            try:
                for _, layout in opened.slots:
                    await _check_blob(opened, layout, report, bar)
            except BaseExceptionGroup as group:
                raise _first(group) from group
        if args.against is not None and not report.faults:
            await _compare(args, opened, report)


async def _compare(args: argparse.Namespace, opened: Opened, report: Report) -> None:
    """Compare the tree of the image with the other one."""
    import asyncio

    from erofsd.build.compare import compare, image_items
    from erofsd.build.readback import open_located
    from erofsd.cli.against import open_side
    from erofsd.cli.imaging import Console

    console = Console()
    image = await open_located(opened.located)
    try:
        async with open_side(args, console) as side:
            threads = 2 if image.image.bootstrap is not None else 1  # see ReadBack
            size = sum(e.size for e in opened.tree.walk() if e.type == "reg")
            with console.phase("compare", size) as tell:
                found = image_items(image.tree)
                result = await asyncio.to_thread(
                    compare, side.items, found, ignore=args.ignore, threads=threads, tell=tell
                )
    finally:
        image.close()
        console.close()
    report.against = args.against
    report.differences, report.difference_count = result.differences, result.count
    report.warnings = side.warnings


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error of ours that ended the group, if it was one."""
    while isinstance(group.exceptions[0], BaseExceptionGroup):
        group = group.exceptions[0]
    return next((exc for exc in group.exceptions if isinstance(exc, ErofsdError)), group.exceptions[0])


def _check_tree(opened: Opened, report: Report) -> None:
    """Every inode, directory and attribute; every file's data lies where data is."""
    seen: set[int] = set()
    for entry in opened.tree.walk():
        report.entries += 1
        if entry.type == "reg" and entry.nid not in seen:
            seen.add(entry.nid)
            try:
                opened.check_content(entry)
            except ImageRefused as exc:
                name = entry.path.decode("utf-8", "backslashreplace")
                report.faults.append(f"{opened.located.ref}: {name}: {exc}")


def _size(layout: BlobLayout) -> int:
    from erofsd.cli.verify import stated_units

    return sum(layout.unit_stored[unit] for unit in stated_units(layout))


async def _check_blob(opened: Opened, layout: BlobLayout, report: Report, bar: Bar) -> None:
    from erofsd.cli.verify import verify_blob, verify_pin

    def tell(size: int) -> None:
        report.stored_bytes += size
        bar.n = report.stored_bytes
        bar.refresh()

    verify = verify_pin if layout.digester is None else verify_blob
    report.chunks += await verify(layout, opened.located.backend, report.faults, tell)


async def _check_framing(opened: Opened, report: Report) -> None:
    """What a Nydus blob says of itself at its end must be true, and agree with the bootstrap."""
    import asyncio

    from erofsd.cli.opened import StoredBlobSource
    from erofsd.images.rafs6.bootstrap import parse_bootstrap

    located, image = opened.located, opened.image
    assert image.bootstrap is not None
    loop = asyncio.get_running_loop()
    bootstrap = parse_bootstrap(located.ref, image.bootstrap)
    for blob, layout in zip(bootstrap.blobs, image.devices, strict=True):
        if not blob.chunk_count:
            continue
        size = await located.backend.size(blob.blob_id)
        source = StoredBlobSource(located.backend, blob.blob_id, size, loop)
        try:
            await asyncio.to_thread(_check_sections, source, blob, layout)
        except ImageRefused as exc:
            report.faults.append(str(exc))


def _check_sections(source: ByteSource, blob: BlobEntry, layout: BlobLayout) -> None:
    from erofsd.images.rafs6 import toc

    found = toc.read_toc(source, blob.toc_size, blob.toc_digest)
    for entry in found.values():
        if entry.name != "image.blob":  # the data: each chunk is compared with its own digest
            toc.read_entry(source, entry)
    if toc.DIGESTS_NAME not in found:
        return
    digests = toc.read_chunk_digests(source, found, blob.chunk_count)
    for chunk in range(layout.chunk_count):
        if layout.stated[chunk] and digests[32 * chunk : 32 * chunk + 32] != layout.digest(chunk):
            raise BlobCorrupt(
                f"{source.name}: {toc.DIGESTS_NAME}: another digest of chunk {chunk} than the bootstrap's"
            )
