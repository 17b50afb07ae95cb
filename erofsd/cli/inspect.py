"""``erofsd inspect``: what an image is, what is in it, where its data lies."""

from __future__ import annotations

import argparse
import stat
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from erofsd.cli.options import Subparsers, add_config, add_json, add_source, add_verb, run_async
from erofsd.errors import UsageError
from ondemand.ranges import Range

if TYPE_CHECKING:
    from erofsd.blobs.layout import BlobLayout
    from erofsd.cli.opened import Opened
    from erofsd.images.base import Entry

_KINDS = {
    "reg": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "lnk": stat.S_IFLNK,
    "chr": stat.S_IFCHR,
    "blk": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
    "sock": stat.S_IFSOCK,
}
_CHUNK_HEADER = f"{'SLOT':>4} {'CHUNK':>7} {'OFFSET':>12} {'SIZE':>9} {'STORED AT':>12} {'STORED':>9}  DIGEST"


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = add_verb(
        subparsers,
        "inspect",
        "show what an image is: format, files, blobs, chunks",
        """
erofsd inspect registry.example/app:nydus
erofsd inspect --files --json oci:/images/app:nydus | jq -r .path
erofsd inspect --chunks file:/images/app.boot --blobs /images/blobs
erofsd inspect --files --chunks registry.example/app:nydus | less
""",
    )
    add_source(parser)
    parser.add_argument("--files", action="store_true", help="list every file; with --json one object a line")
    parser.add_argument(
        "--chunks", action="store_true", help="list every chunk of every blob, or with --files of every file"
    )
    parser.add_argument(
        "--digests", action="store_true", help="with --files: add the sha256 of file contents"
    )
    add_config(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Open the image; print what was asked for."""
    if args.digests and not args.files:
        raise UsageError("inspect: --digests goes with --files")
    return run_async(_inspect(args))


async def _inspect(args: argparse.Namespace) -> int:
    import asyncio

    from erofsd.cli.opened import open_ref

    show = _show_files if args.files else _show_chunks if args.chunks else _show_summary
    async with open_ref(args) as opened:
        # In a thread: a tree is read with blocking calls, and its bytes come by way of this loop.
        await asyncio.to_thread(show, opened, args)
    return 0


# --- files ---


def _show_files(opened: Opened, args: argparse.Namespace) -> None:
    from erofsd.cli.output import print_json, printable

    if args.chunks and not args.json:
        print(f"{'IN THE FILE':>13} {_CHUNK_HEADER}")
    for fact, entry in facts(opened, digests=args.digests):
        if not args.json:
            print(printable(_line(fact, entry)))
            for chunk in _chunks_of(opened, entry) if args.chunks else ():
                print(_chunk_line(chunk, f"{chunk['file_offset']:>13} "))
        elif args.chunks and entry.type == "reg":
            print_json({**fact, "chunks": list(_chunks_of(opened, entry))}, lines=True)
        else:
            print_json(fact, lines=True)


def facts(opened: Opened, *, digests: bool) -> Iterator[tuple[dict[str, Any], Entry]]:
    """What there is to say of each entry, by path, and the entry."""
    from erofsd.images.summary import tree_facts

    entries = sorted(opened.tree.walk(), key=lambda entry: entry.path)
    yield from zip(tree_facts(opened.tree, digests=digests), entries, strict=True)


def _line(fact: dict[str, Any], entry: Entry) -> str:
    mode = stat.filemode(_KINDS[entry.type] | entry.mode)
    size = f"{entry.rdev >> 8},{entry.rdev & 255}" if "rdev" in fact else str(entry.size)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry.mtime // 10**9))
    name = entry.path.decode("utf-8", "backslashreplace")
    target = "" if entry.target is None else " -> " + entry.target.decode("utf-8", "backslashreplace")
    digest = f"{fact.get('sha256', '-'):64} " if "sha256" in fact else ""
    return f"{mode} {entry.nlink:>3} {entry.uid:>5} {entry.gid:>5} {size:>11} {when} {digest}{name}{target}"


# --- chunks ---


def _show_chunks(opened: Opened, args: argparse.Namespace) -> None:
    from erofsd.cli.output import print_json

    if not args.json:
        print(_CHUNK_HEADER)
    for slot, layout in opened.slots:
        for chunk in range(layout.chunk_count):
            fact = _chunk(slot, layout, chunk)
            if args.json:
                print_json(fact, lines=True)
            else:
                print(_chunk_line(fact))


def _chunks_of(opened: Opened, entry: Entry) -> Iterator[dict[str, Any]]:
    """The chunks with the content of a file, in its order, each with where in the file it begins.

    None are those of holes, of bytes beside the inode, and of what EROFS itself has compressed.
    """
    inode = opened.tree.reader.inode(entry.nid)
    if entry.type != "reg" or inode.compressed:
        return
    layouts = dict(opened.slots)
    at = 0
    for extent in opened.tree.reader.extents(inode):
        layout = layouts.get(extent.device)
        if extent.offset is not None and layout is not None:
            for chunk in layout.chunks_in(Range.of(extent.offset, extent.length)):
                begin = max(layout.chunk_offset[chunk] - extent.offset, 0)
                yield {"file_offset": at + begin, **_chunk(extent.device, layout, chunk)}
        at += extent.length


def _chunk_line(fact: dict[str, Any], prefix: str = "") -> str:
    digest = fact["digest"] or ("-" if fact["stated"] else "not in this image")
    return (
        f"{prefix}{fact['slot']:>4} {fact['chunk']:>7} {fact['offset']:>12} {fact['size']:>9}"
        f" {fact['stored_offset']:>12} {fact['stored_size']:>9}  {digest}"
    )


def _chunk(slot: int, layout: BlobLayout, chunk: int) -> dict[str, Any]:
    unit = layout.chunk_unit[chunk]
    stated = bool(layout.stated[chunk])
    return {
        "slot": slot,
        "blob_id": layout.blob_id,
        "chunk": chunk,
        "offset": layout.chunk_offset[chunk],
        "size": layout.chunk_size[chunk],
        "stored_offset": layout.unit_offset[unit],
        "stored_size": layout.unit_stored[unit],
        "compressed": bool(layout.unit_packed[unit]),
        "batch": len(layout.chunks_of(unit)) > 1,
        "stated": stated,
        "digest": layout.digest(chunk).hex() if stated and layout.digester else None,
    }


# --- the whole ---


def _show_summary(opened: Opened, args: argparse.Namespace) -> None:
    from erofsd.cli.output import print_json

    summary = summarise(opened)
    if args.json:
        print_json(summary)
    else:
        _print_summary(summary)


def summarise(opened: Opened) -> dict[str, Any]:
    """The image in figures."""
    image, located = opened.image, opened.located
    kinds: Counter[str] = Counter()
    size = 0
    seen: set[int] = set()
    for entry in opened.tree.walk():
        kinds[entry.type] += 1
        if entry.type == "reg" and entry.nid not in seen:
            seen.add(entry.nid)
            size += entry.size
    return {
        "ref": located.ref,
        "digest": located.digest,
        "format": image.format,
        "verified": image.verified,
        "block_size": image.block_size,
        "compressed": image.compressed,
        "source": located.backend.name,
        "entries": {kind: kinds[kind] for kind in _KINDS if kinds[kind]},
        "file_bytes": size,
        "bootstrap_bytes": None if image.bootstrap is None else len(image.bootstrap),
        "metadata_bytes": image.metadata.byte_count if image.primary else None,
        "blobs": [_blob(slot, layout) for slot, layout in opened.slots],
    }


def _blob(slot: int, layout: BlobLayout) -> dict[str, Any]:
    from erofsd.cli.verify import stated_units

    units = stated_units(layout)
    return {
        "slot": slot,
        "blob_id": layout.blob_id,
        "size": layout.size,
        "stored_size": layout.stored_size,
        "codec": layout.codec,
        "digester": layout.digester,
        "pin": layout.pin,
        "chunks": layout.chunk_count,
        "stated_chunks": sum(map(bool, layout.stated)),
        "stated_bytes": sum(layout.unit_stored[unit] for unit in units),
        "batches": sum(len(layout.chunks_of(unit)) > 1 for unit in range(layout.unit_count)),
    }


def _print_summary(summary: dict[str, Any]) -> None:
    from erofsd.cli.output import human, printable, table

    def line(name: str, value: str) -> None:
        print(f"{name:10} {printable(value)}")

    line("image", summary["ref"])
    if summary["digest"]:
        line("digest", summary["digest"])
    blocks = f"blocks of {summary['block_size']}"
    kind = f"{summary['format']}, {blocks}, verified: {summary['verified']}"
    line("format", kind + (", compressed by EROFS itself" if summary["compressed"] else ""))
    counts = ", ".join(f"{count} {kind}" for kind, count in summary["entries"].items())
    line("files", f"{counts}; {human(summary['file_bytes'])} of content")
    if summary["bootstrap_bytes"] is not None:
        line("bootstrap", human(summary["bootstrap_bytes"]))
    else:
        line("metadata", f"{human(summary['metadata_bytes'])}, fetched before the mount")
    line("source", summary["source"])
    print()
    header = ("SLOT", "BLOB", "SIZE", "STORED", "CHUNKS", "OF THEM HERE", "BYTES OF THEM", "CODEC", "DIGEST")
    rows = [
        (
            str(blob["slot"]),
            blob["blob_id"],
            human(blob["size"]),
            human(blob["stored_size"]),
            str(blob["chunks"]),
            str(blob["stated_chunks"]),
            human(blob["stated_bytes"]),
            blob["codec"] + (f", {blob['batches']} batches" if blob["batches"] else ""),
            blob["digester"] or "none",
        )
        for blob in summary["blobs"]
    ]
    print(table(header, rows, right=(0, 2, 3, 4, 5, 6)))
