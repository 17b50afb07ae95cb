"""What the verbs that make images share: options, progress, what they print in the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from erofsd.errors import UsageError

if TYPE_CHECKING:
    from erofsd.backends.settings import SourceSettings
    from erofsd.build.job import Outcome, Wanted

WARNINGS_SHOWN = 20
FORMATS = ("rafs", "erofs")
COMPRESSIONS = ("zstd", "lz4_block", "gzip", "none")
DIGESTS = ("blake3", "sha256")
DEST_HELP = "docker://HOST/REPO:TAG, oci:DIR[:TAG], or file:IMAGE with --blobs DIR"


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """How the image is to be made."""
    parser.add_argument("--format", choices=FORMATS, default="rafs", help="of the image (default: rafs)")
    parser.add_argument(
        "--chunk-size", metavar="SIZE", default="1M", help="4K to 16M, a power of two (default: 1M)"
    )
    parser.add_argument(
        "--compression", choices=COMPRESSIONS, help="of chunks (default: zstd; erofs has none)"
    )
    parser.add_argument("--level", type=int, metavar="N", help="of the compression (default: the codec's)")
    parser.add_argument("--digest", choices=DIGESTS, default="blake3", help="of chunks (default: blake3)")
    parser.add_argument(
        "--batch-size",
        metavar="SIZE",
        default="0",
        help="compress small files together, up to this size (default: 0, each for itself)",
    )
    parser.add_argument(
        "--chunk-dict",
        metavar="REF",
        action="append",
        default=[],
        help="an image whose chunks are used rather than stored again; may be repeated",
    )
    parser.add_argument(
        "--prefetch-list", metavar="FILE", help="paths to fetch first, one a line (- for standard input)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", default=0, help="threads (default: one a processor)")
    parser.add_argument("--blobs", type=Path, metavar="DIR", help="with file:IMAGE: where its blobs go")
    parser.add_argument(
        "--plain-http", action="store_true", help="speak HTTP without TLS to registries that are asked"
    )


def wanted(args: argparse.Namespace) -> Wanted:
    """What *args* ask for.

    Raises:
        UsageError: It contradicts itself.
    """
    from erofsd.build.job import Wanted
    from erofsd.build.options import BuildOptions, parse_size

    plain = args.format == "erofs"
    if plain and (args.compression not in (None, "none") or args.chunk_dict or parse_size(args.batch_size)):
        raise UsageError("--format erofs: knows neither compression nor batches nor chunk dictionaries")
    options = BuildOptions(
        chunk_size=parse_size(args.chunk_size),
        compression="none" if plain else args.compression or "zstd",
        level=args.level,
        digest=args.digest,
        batch_size=parse_size(args.batch_size),
        jobs=args.jobs,
    )
    return Wanted(
        options,
        args.format,
        chunk_dicts=tuple(args.chunk_dict),
        prefetch=_prefetch_list(args.prefetch_list),
        platforms=tuple(getattr(args, "platform", None) or ()),
        referrer=getattr(args, "referrer", False),
        check=not getattr(args, "no_check", True),
        work_dir=getattr(args, "work_dir", None),
    )


def _prefetch_list(name: str | None) -> tuple[bytes, ...]:
    if name is None:
        return ()
    try:
        text = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as exc:
        raise UsageError(f"--prefetch-list {name}: cannot be read: {exc.strerror}") from exc
    return tuple(line for line in text.splitlines() if line and not line.startswith(b"#"))


def source_settings(args: argparse.Namespace) -> SourceSettings:
    """How sources and destinations are reached."""
    from erofsd.backends.settings import SourceSettings
    from erofsd.cli.options import load_config
    from erofsd.logging import configure_logging

    configure_logging("error")  # what the user has to know comes as an exception or a warning
    config = load_config(args)
    return SourceSettings(registries=config.registry, plain_http=args.plain_http)


class Console:
    """Implements erofsd.build.report.Reporter: warnings and bars on stderr, bars on terminals only."""

    def __init__(self) -> None:
        self._warnings = 0

    def warn(self, text: str) -> None:
        """See Reporter. After some, they are only counted."""
        from erofsd.cli.output import printable

        self._warnings += 1
        if self._warnings <= WARNINGS_SHOWN:
            print(f"erofsd: warning: {printable(text)}", file=sys.stderr)

    @contextmanager
    def phase(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """See Reporter."""
        from erofsd.cli.output import progress_bar

        with progress_bar(label, total) as bar:

            def tell(size: int) -> None:
                bar.update(size)

            yield tell

    def close(self) -> None:
        """Say how many warnings were not shown."""
        more = self._warnings - WARNINGS_SHOWN
        if more > 0:
            print(f"erofsd: warning: and {more} more; --json lists all of them", file=sys.stderr)


def show(outcome: Outcome, args: argparse.Namespace, elapsed_s: float) -> None:
    """Print what came of it."""
    from dataclasses import asdict

    from erofsd.cli.output import human, print_json, printable

    if args.json:
        print_json({**asdict(outcome), "elapsed_s": round(elapsed_s, 3)})
        return
    print(printable(outcome.ref))
    lines = [
        ("digest", outcome.digest or ""),
        ("platforms", ", ".join(outcome.platforms)),
        ("files", f"{outcome.entries} entries, {human(outcome.content_bytes)} of content"),
        ("layers", _layers(outcome)),
        ("stored", human(outcome.blob_bytes)),
        ("sent", f"{human(outcome.uploaded_bytes)}; {human(outcome.present_bytes)} were there already"),
        ("checked", "the same as its source, entry by entry" if outcome.checked else "no"),
        ("took", f"{elapsed_s:.1f} s"),
    ]
    if outcome.digest is None:
        lines = [(name, text) for name, text in lines if name != "sent"]
    for name, text in lines:
        if text:
            print(f"{name:10} {printable(text)}")


def _layers(outcome: Outcome) -> str:
    reused = f", {outcome.layers_reused} of them converted before" if outcome.layers_reused else ""
    return f"{outcome.layers}{reused}"
