"""``erofsd check``: verify all of an image."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from erofsd.cli.options import Subparsers, add_config, add_json, add_source, add_verb, run_async
from erofsd.errors import BlobCorrupt, ErofsdError, ImageRefused

if TYPE_CHECKING:
    from erofsd.blobs.layout import BlobLayout
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
    """

    ref: str
    format: str = ""
    verified: str = ""
    entries: int = 0
    chunks: int = 0
    stored_bytes: int = 0
    faults: list[str] = field(default_factory=list)
    ok: bool = False


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = add_verb(
        subparsers,
        "check",
        "verify an image: metadata, every chunk's digest, every file's content",
        """
erofsd check registry.example/app:nydus
erofsd check --json file:/images/app.boot --blobs /images/blobs
""",
    )
    add_source(parser)
    add_config(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify; the exit code is 4 if anything is wrong with the image."""
    from erofsd.cli.output import human, print_json

    report = Report(args.ref)
    try:
        run_async(_check(args, report))
    except ImageRefused as exc:
        if not args.json:
            raise
        report.faults.append(str(exc))
    report.ok = not report.faults
    if args.json:
        print_json(report)
    elif report.ok:
        print(
            f"{args.ref}: sound: {report.format}, {report.entries} entries, {report.chunks} chunks,"
            f" {human(report.stored_bytes)}; verified: {report.verified}"
        )
    else:
        _complain(report)
    return 0 if report.ok else ImageRefused.exit_code


def _complain(report: Report) -> None:
    from erofsd.cli import report as report_error

    shown = report.faults[:FAULTS_SHOWN]
    for fault in shown:
        report_error(ImageRefused(fault))
    more = len(report.faults) - len(shown)
    hint = (
        "--json lists all of them"
        if more
        else "ask whoever built it, or copy it again from where it is sound"
    )
    report_error(ImageRefused(f"{report.ref}: {len(report.faults)} faults", hint=hint))


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
