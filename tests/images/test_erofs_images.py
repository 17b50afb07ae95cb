"""Images made by mkfs.erofs read as their source tree, and as the kernel's mount of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from erofsd.errors import CorruptImage, UnsupportedImage
from erofsd.images.erofs.metadata import metadata_ranges, survey
from erofsd.images.erofs.reader import ErofsReader
from erofsd.images.erofs.tree import ErofsTree
from erofsd.images.source import BytesSource, FileSource, PagedSource
from ondemand.ranges import Range, RangeSet
from tests.images.sourcetree import (
    Description,
    describe_directory,
    describe_tree,
    make_tree,
    mkfs,
    mounted,
    without,
)

pytestmark = pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="mkfs.erofs is not installed")

# All that mkfs.erofs 1.5 can make.
KINDS = {
    "plain": (),
    "no xattrs": ("-x-1",),
    "xattrs shared early": ("-x1",),
    "extended inodes": ("-Eforce-inode-extended",),
    "block map": ("--chunksize=4096",),
    "large chunks": ("--chunksize=1048576",),
    "chunk indexes": ("-Eforce-chunk-indexes", "--chunksize=65536"),
    "lz4": ("-zlz4",),
    "lz4hc": ("-zlz4hc,9",),
    "big pclusters": ("-zlz4hc", "-C65536"),
    "legacy": ("-zlz4", "-Elegacy-compress"),
    "legacy with features": ("-zlz4hc", "-C32768", "-Elegacy-compress,ztailpacking"),
    "tails packed": ("-zlz4", "-Eztailpacking"),
    "fragments": ("-zlz4hc", "-C65536", "-Efragments"),
    "fragments and tails": ("-zlz4hc", "-C65536", "-Efragments,ztailpacking"),
    "dedupe": ("-zlz4hc", "-C16384", "-Ededupe"),
    "short extents": ("-zlz4", "--max-extent-bytes=8192"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("source") / "top"
    top.mkdir()
    make_tree(top)
    return top


@pytest.fixture(scope="module")
def described(source: Path) -> dict[bytes, Description]:
    return describe_directory(source)


@pytest.fixture(scope="module", params=KINDS.values(), ids=list(KINDS))
def image(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.erofs"
    mkfs(path, source, *request.param)
    return path


def test_tree_equals_its_source_and_the_kernels_view(
    image: Path, described: dict[bytes, Description], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    found = describe_tree(ErofsTree(ErofsReader(PagedSource(FileSource(image)))))
    # mkfs.erofs counts the links of the source, and may round times to those of compact inodes
    ignored = ["nlink", *(["xattrs"] if "no xattrs" in request.node.name else [])]
    extended = "extended" in request.node.name
    assert without(found, *ignored, *(() if extended else ["mtime"])) == without(
        described, *ignored, *(() if extended else ["mtime"])
    )
    with mounted(image, tmp_path / "mnt") as directory:
        if directory is None:
            pytest.skip("no loop mount of EROFS here: compared with the source only")
        assert found == describe_directory(directory)


class OnlySource:
    """A source that has some of its bytes only."""

    def __init__(self, source: FileSource, present: RangeSet) -> None:
        self.name, self.size = source.name, source.size
        self._source, self._present = source, present

    def pread(self, offset: int, length: int) -> bytes:
        assert self._present.covers(Range.of(offset, length)), (offset, length)
        return self._source.pread(offset, length)


def test_metadata_ranges_suffice_for_the_reader_and_the_kernel(image: Path, tmp_path: Path) -> None:
    whole = FileSource(image)
    ranges = metadata_ranges(ErofsReader(whole))
    partly = ErofsReader(OnlySource(whole, ranges))
    assert [e.path for e in ErofsTree(partly).walk()] == [
        e.path for e in ErofsTree(ErofsReader(whole)).walk()
    ]
    sparse = tmp_path / "sparse.erofs"
    with sparse.open("wb") as file:
        file.truncate(whole.size)
        for part in ranges:
            file.seek(part.start)
            file.write(whole.pread(part.start, len(part)))
    with mounted(image, tmp_path / "whole") as complete, mounted(sparse, tmp_path / "partly") as lazy:
        if complete is None or lazy is None:
            pytest.skip("no loop mount of EROFS here")
        # Everything but file data; and where the kernel finds those, which needs every index
        assert stat_all(lazy) == stat_all(complete)
        assert extents_of(lazy) == extents_of(complete)


def stat_all(top: Path) -> str:
    command = ["find", ".", "-printf", r"%p %m %U %G %s %T@ %n %y %l\n"]
    listing = subprocess.run(command, cwd=top, check=True, capture_output=True, text=True).stdout
    attributes = ["getfattr", "-R", "-P", "-d", "-m-", "-e", "hex", "."]
    if shutil.which("getfattr"):
        listing += subprocess.run(attributes, cwd=top, check=True, capture_output=True, text=True).stdout
    return listing


def extents_of(top: Path) -> str:
    """What FIEMAP says of every file."""
    found = subprocess.run(["find", ".", "-type", "f"], cwd=top, check=True, capture_output=True, text=True)
    files = sorted(found.stdout.splitlines())
    command = ["filefrag", "-v", *files]
    return subprocess.run(command, cwd=top, check=True, capture_output=True, text=True).stdout


def test_metadata_of_an_uncompressed_image_are_a_small_part_of_it(source: Path, tmp_path: Path) -> None:
    mkfs(tmp_path / "image", source)
    reader = ErofsReader(FileSource(tmp_path / "image"))
    metadata = survey(reader)
    assert metadata.ranges.byte_count < reader.source.size // 10
    assert not metadata.compressed
    mkfs(tmp_path / "legacy", source, "-zlz4", "-Elegacy-compress")
    assert survey(ErofsReader(FileSource(tmp_path / "legacy"))).compressed


def test_data_on_an_extra_device(source: Path, described: dict[bytes, Description], tmp_path: Path) -> None:
    mkfs(tmp_path / "image", source, "--chunksize=65536", f"--blobdev={tmp_path / 'blob'}")
    blob = FileSource(tmp_path / "blob")

    def read(device: int, want: Range) -> bytes:
        assert device == 1
        return blob.pread(want.start, len(want))

    primary = FileSource(tmp_path / "image")
    found = describe_tree(ErofsTree(ErofsReader(primary, read)))
    assert without(found, "nlink", "mtime") == without(described, "nlink", "mtime")
    alone = ErofsTree(ErofsReader(primary))
    big = next(entry for entry in alone.walk() if entry.path == b"/big")
    with pytest.raises(UnsupportedImage, match="device 1"):
        list(alone.content(big))


def test_remote_images_are_read_in_few_large_pieces(source: Path, tmp_path: Path) -> None:
    mkfs(tmp_path / "image", source)
    reads: list[tuple[int, int]] = []

    class Counting(FileSource):
        def pread(self, offset: int, length: int) -> bytes:
            reads.append((offset, length))
            return super().pread(offset, length)

    inner = Counting(tmp_path / "image")
    survey(ErofsReader(PagedSource(inner)))
    assert all(offset % 65536 == 0 and length <= 1 << 20 for offset, length in reads)
    assert sum(length for _, length in reads) <= 2 * inner.size
    assert len(reads) <= inner.size // 65536 + 1


@pytest.mark.parametrize("options", [("-zlz4hc", "-C65536", "-Eztailpacking"), ("--chunksize=4096",)])
def test_truncated_images_are_corrupt(source: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    mkfs(tmp_path / "image", source, *options)
    data = (tmp_path / "image").read_bytes()
    for size in (0, 1, 1024, 1100, 1152, 4096, 8192, len(data) // 2, len(data) - 4096):
        with pytest.raises(CorruptImage, match="cut"):
            describe_tree(ErofsTree(ErofsReader(BytesSource("cut", data[:size]))))


def test_flipped_bit_under_the_checksum_is_found(source: Path, tmp_path: Path) -> None:
    mkfs(tmp_path / "image", source)
    data = bytearray((tmp_path / "image").read_bytes())
    assert data[1032] & 1, "this mkfs.erofs makes no checksum"
    data[2000] ^= 4
    with pytest.raises(CorruptImage, match="checksum"):
        ErofsReader(BytesSource("flipped", bytes(data)))
