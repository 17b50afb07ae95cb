"""Plain EROFS images that we write: judged by the kernel, by fsck.erofs, and by our reader."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erofsd.errors import SourceError
from erofsd.images.erofs.metadata import metadata_ranges
from erofsd.images.erofs.reader import ErofsReader
from erofsd.images.erofs.tree import ErofsTree
from erofsd.images.erofs.writer import Written, write_image
from erofsd.images.source import BytesSource
from erofsd.images.tree import Node
from ondemand.ranges import Range
from tests.images.judges import fsck, mounted
from tests.images.nodes import Source, awkward, sources
from tests.images.sourcetree import describe_directory, describe_tree

KINDS = {"single": (1 << 20, False), "small chunks": (4096, False), "with blob": (65536, True)}


def write(source: Source, chunk_size: int = 1 << 20, with_blob: bool = False) -> tuple[bytes, bytes, Written]:
    image, blob = io.BytesIO(), io.BytesIO()
    written = write_image(
        source.root, image, source.read, chunk_size=chunk_size, blob=blob if with_blob else None
    )
    assert (written.size, written.blob_size) == (len(image.getvalue()), len(blob.getvalue()))
    return image.getvalue(), blob.getvalue(), written


def reader_of(image: bytes, blob: bytes = b"") -> ErofsReader:
    def read(device: int, want: Range) -> bytes:
        return blob[want.start : want.stop]

    return ErofsReader(BytesSource("image", image), read)


def put(directory: Path, image: bytes, blob: bytes) -> tuple[Path, list[str]]:
    """Image and blob as files; the paths of devices."""
    (directory / "image").write_bytes(image)
    (directory / "blob").write_bytes(blob)
    return directory / "image", [str(directory / "blob")] if blob else []


@pytest.mark.parametrize(("chunk_size", "with_blob"), KINDS.values(), ids=list(KINDS))
def test_awkward_tree_is_what_reader_fsck_and_kernel_see(
    tmp_path: Path, chunk_size: int, with_blob: bool
) -> None:
    source = awkward()
    image, blob, _ = write(source, chunk_size, with_blob)
    assert describe_tree(ErofsTree(reader_of(image, blob))) == source.describe()
    path, devices = put(tmp_path, image, blob)
    fsck(path, devices)
    with mounted(path, tmp_path / "mnt", devices) as directory:
        assert describe_directory(directory) == source.describe()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=sources(), kind=st.sampled_from(list(KINDS)))
def test_any_tree_survives(tmp_path: Path, source: Source, kind: str) -> None:
    image, blob, _ = write(source, *KINDS[kind])
    assert describe_tree(ErofsTree(reader_of(image, blob))) == source.describe()
    path, devices = put(tmp_path, image, blob)
    with mounted(path, tmp_path / "mnt", devices) as directory:
        assert describe_directory(directory) == source.describe()


def test_same_tree_gives_the_same_bytes_in_whatever_order_it_was_filled() -> None:
    source = awkward()
    image = write(source, 4096, True)
    for node in [source.root, *source.root.children.values()]:
        if node.type == "dir":
            node.children = dict(reversed(node.children.items()))
    assert write(source, 4096, True) == image


def test_equal_chunks_are_stored_once_and_zeros_not_at_all() -> None:
    source = Source()
    source.add(b"a", Node("reg"), b"x" * 40960 + bytes(40960))
    source.add(b"b", Node("reg"), b"x" * 8192)
    _, blob, _ = write(source, 4096, with_blob=True)
    assert len(blob) == 4096
    image, _, _ = write(source, 4096)
    assert len(image) == 3 * 4096


def test_huge_sparse_file_takes_no_room(tmp_path: Path) -> None:
    size = (4 << 30) + 10
    source = Source()
    node = source.add(b"huge", Node("reg"))
    node.size = size
    zeros = bytes(1 << 24)

    def content(_: Node) -> list[bytes]:
        return [zeros] * (size >> 24) + [b"0123456789"]

    with (tmp_path / "image").open("w+b") as out:
        written = write_image(source.root, out, content, chunk_size=1 << 24)
    assert written.size < 100_000
    with (
        mounted(tmp_path / "image", tmp_path / "mnt") as directory,
        (directory / "huge").open("rb") as file,
    ):
        assert os.fstat(file.fileno()).st_size == size
        assert os.pread(file.fileno(), 20, size - 15) == bytes(5) + b"0123456789"


def test_files_of_a_common_time_get_compact_inodes_unless_something_does_not_fit() -> None:
    source = Source()
    source.root.mtime = 7
    for i in range(10):
        source.add(b"%d" % i, Node("reg", mtime=5), b"same")
    source.add(b"other", Node("reg", mtime=6), b"time")
    source.add(b"owner", Node("reg", uid=65536, mtime=5), b"")
    image, _, _ = write(source)
    reader = reader_of(image)
    sizes = {
        e.name: reader.inode(e.nid).tail - reader.inode(e.nid).offset for e in reader.entries(reader.root)
    }
    assert {name for name, size in sizes.items() if size == 64} == {b"other", b"owner"}


def test_metadata_lie_together_at_the_front() -> None:
    source = awkward()
    image, _, _ = write(source)
    ranges = list(metadata_ranges(reader_of(image)))
    assert len(ranges) == 1
    assert ranges[0].start == 0


def test_inline_content_is_not_asked_for() -> None:
    source = Source()
    node = source.add(b"kept", Node("reg"), b"kept")
    node.inline = source.content.pop(id(node))
    image, _, _ = write(source)
    assert b"kept" in image


@pytest.mark.parametrize("actual", [b"", b"shor", b"longer than said"])
def test_file_that_changed_its_size_is_refused(actual: bytes) -> None:
    source = Source()
    node = source.add(b"file", Node("reg"), b"sixchr")
    source.content[id(node)] = actual
    with pytest.raises(SourceError):
        write(source)


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b", b"n" * 256])
def test_names_that_no_file_system_has_are_mistakes(name: bytes) -> None:
    source = Source()
    source.root.children[name] = Node("fifo")
    with pytest.raises(ValueError, match="can be called"):
        write(source)


def test_directory_of_two_hundred_thousand_names(tmp_path: Path) -> None:
    source = Source()
    big = source.add(b"big", Node("dir"))
    big.children = {b"file-%d" % i: Node("fifo", mtime=i) for i in range(200_000)}
    image, _, _ = write(source)
    path, _ = put(tmp_path, image, b"")
    with mounted(path, tmp_path / "mnt") as directory:
        assert len(os.listdir(directory / "big")) == 200_000
        for i in (0, 1, 99_999, 199_999):
            assert (directory / "big" / f"file-{i}").lstat().st_mtime_ns == i
