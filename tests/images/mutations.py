"""Reads ten thousand damaged images in a process of its own, whose memory is limited.

Run as ``python -m tests.images.mutations TESTDATA IMAGE…``, where images are small ones that mkfs.erofs made.
Ends with 0 if each was read or refused; else prints what happened to which.
"""

from __future__ import annotations

import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from erofsd.errors import CorruptImage, UnsupportedImage
from erofsd.images.base import Tree
from erofsd.images.erofs.metadata import survey
from erofsd.images.erofs.reader import ErofsReader, ReadDevice
from erofsd.images.erofs.tree import ErofsTree
from erofsd.images.rafs6 import toc
from erofsd.images.rafs6.blobmeta import parse_blob_meta
from erofsd.images.rafs6.bootstrap import parse_bootstrap
from erofsd.images.rafs6.layout import build_layouts
from erofsd.images.rafs6.reader import RafsReader
from erofsd.images.source import BytesSource, PagedSource
from ondemand.ranges import Range
from tests.images.nydusimages import blob_files, layer_files

MEMORY_LIMIT = 600 << 20
CASE_LIMIT_S = 3.0
CASES = 10_000
CONTENT_LIMIT = 4 << 20  # of one file: a hole may be of any size
EXTREMES = [0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, 1 << 63, (1 << 64) - 1]

Read = Callable[[bytes], None]


def read_tree(tree: Tree) -> None:
    for entry in tree.walk():
        if entry.type == "reg":
            size = 0
            for piece in tree.content(entry):
                assert len(piece) <= 1 << 20
                size += len(piece)
                if size > CONTENT_LIMIT:
                    break


def zeros(device: int, want: Range) -> bytes:
    return bytes(len(want))


def rafs_reader(meta: bytes | None) -> Read:
    """Reads a bootstrap, with its blob's chunk information if there is some."""

    def read(data: bytes) -> None:
        bootstrap = parse_bootstrap("boot", data)
        layouts = None
        if meta is not None and len(bootstrap.blobs) == 1:
            layouts = build_layouts(bootstrap, [parse_blob_meta("meta", bootstrap.blobs[0], meta)])
        read_tree(ErofsTree(RafsReader(bootstrap, layouts, zeros)))

    return read


def meta_reader(boot: bytes) -> Read:
    """Reads the chunk information of the only blob of *boot*."""

    def read(data: bytes) -> None:
        bootstrap = parse_bootstrap("boot", boot)
        build_layouts(bootstrap, [parse_blob_meta("meta", bootstrap.blobs[0], data)])

    return read


def erofs_reader(devices: ReadDevice | None = None) -> Read:
    def read(data: bytes) -> None:
        reader = ErofsReader(PagedSource(BytesSource("image", data)), devices)
        survey(reader)
        read_tree(ErofsTree(reader))

    return read


def toc_reader(data: bytes) -> None:
    source = BytesSource("blob", data)
    toc.sections(source)
    toc.read_toc(source)
    toc.extract_bootstrap(source)


def subjects(testdata: Path, images: list[Path]) -> Iterator[tuple[str, bytes, Read, tuple[int, int]]]:
    """What is damaged: name, bytes, how they are read, and where the interesting part is."""
    texture = testdata / "nydus-texture"
    boot = (texture / "bootstrap" / "rafs-v6-2.2.boot").read_bytes()
    blob_id = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"
    blob = (texture / "blobs" / blob_id).read_bytes()
    meta = blob[8314 : 8314 + 4128]
    for area in ((1024, 1800), (4096, 4400), (12288, 13000), (16384, 16600)):
        yield f"2.2 boot {area}", boot, rafs_reader(meta), area
    yield "2.2 meta", meta, meta_reader(boot), (0, 200)
    yield "2.2 toc", blob, toc_reader, (len(blob) - 1100, len(blob))
    for tag in ("zstd", "batch"):
        bootstrap = parse_bootstrap(tag, layer_files(testdata, tag)["image.boot"])
        second = bootstrap.blobs[1].blob_id
        data = blob_files(testdata, [second])[second]
        own = toc.extract_bootstrap(BytesSource(second, data))
        (entry,) = parse_bootstrap(tag, own, second).blobs
        offset, length = entry.meta_range
        yield f"{tag} meta", data[offset : offset + length], meta_reader(own), (0, length)
        yield f"{tag} boot", own, rafs_reader(data[offset : offset + length]), (8192, len(own))
    for image in images:
        data = image.read_bytes()
        yield image.stem, data, erofs_reader(zeros), (1024, min(len(data), 12288))
        yield f"{image.stem} anywhere", data, erofs_reader(zeros), (0, len(data))


def mutate(data: bytes, area: tuple[int, int], rng: random.Random) -> bytes:
    """*data* with one to four changes, most of them in *area*."""
    changed = bytearray(data)
    if rng.random() < 0.1:
        return bytes(changed[: rng.randrange(len(changed))])
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(*area) if rng.random() < 0.9 else rng.randrange(len(changed))
        kind = rng.random()
        if kind < 0.4:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind < 0.6:
            changed[at] = rng.randrange(256)
        else:
            size = rng.choice([1, 2, 4, 8])
            at -= at % size
            value = rng.choice([*EXTREMES, rng.randrange(1 << 20), len(data)])
            changed[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")[: len(data) - at]
    return bytes(changed)


def main(testdata: Path, images: list[Path]) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    found = list(subjects(testdata, images))
    for name, data, read, _ in found:
        read_sound(name, data, read)
    outcome: Counter[str] = Counter()
    for case in range(CASES):
        name, data, read, area = found[case % len(found)]
        changed = mutate(data, area, random.Random(case))
        started = time.process_time()
        try:
            read(changed)
            outcome["read"] += 1
        except (CorruptImage, UnsupportedImage) as exc:
            outcome[type(exc).__name__] += 1
        except BaseException as exc:
            print(f"case {case}, {name}: {type(exc).__name__}: {exc}")
            raise
        if (elapsed := time.process_time() - started) > CASE_LIMIT_S:
            print(f"case {case}, {name}: took {elapsed:.1f} s")
            return 1
    print(dict(outcome))
    return 0


def read_sound(name: str, data: bytes, read: Read) -> None:
    """What is not damaged is read, or the whole test means nothing."""
    try:
        read(data)
    except UnsupportedImage as exc:
        if "without a bootstrap" not in str(exc):
            raise RuntimeError(f"{name} is not sound") from exc


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [Path(arg) for arg in sys.argv[2:]]))
