from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from erofsd.build.options import BuildOptions
from erofsd.build.source import DirectorySource
from erofsd.errors import SourceError, UsageError
from tests.build.packed import SMALL, Image, build, link_groups, link_groups_of
from tests.conftest import ROOT
from tests.images.sourcetree import Description, describe_directory, make_tree, without


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("source") / "top"
    top.mkdir()
    make_tree(top)
    (top / "links").mkdir()
    (top / "links" / "soft").symlink_to("x")
    os.mkfifo(top / "links" / "pipe")
    for name in ("soft", "pipe"):
        os.link(top / "links" / name, top / f"{name} again", follow_symlinks=False)
    return top


@pytest.fixture(scope="module")
def wanted(tree: Path) -> dict[bytes, Description]:
    return describe_directory(tree)


def same(found: dict[bytes, Description], wanted: dict[bytes, Description]) -> None:
    for path, description in wanted.items():
        assert found[path] == description, path
    assert found.keys() == wanted.keys()


OPTIONS = {
    "4K": SMALL,
    "1M": BuildOptions(jobs=2),
    "batches": BuildOptions(chunk_size=4096, batch_size=65536),
    "batches of 1M": BuildOptions(batch_size=1 << 20, jobs=1),
    "lz4": BuildOptions(chunk_size=65536, compression="lz4_block"),
    "lz4 HC": BuildOptions(chunk_size=65536, compression="lz4_block", level=9),
    "gzip": BuildOptions(chunk_size=65536, compression="gzip"),
    "gzip batches": BuildOptions(chunk_size=65536, compression="gzip", batch_size=8192),
    "none, sha256": BuildOptions(chunk_size=65536, compression="none", digest="sha256"),
    "16M": BuildOptions(chunk_size=16 << 20, jobs=2),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_tree_survives_packing(tree: Path, wanted: dict[bytes, Description], name: str) -> None:
    image = Image(OPTIONS[name])
    image.add(DirectorySource(tree))
    root = image.merge()
    assert link_groups(root) == link_groups_of(tree)
    same(image.read(root), wanted)
    assert not image.warnings


def test_entries_come_in_the_order_of_bytes(tree: Path) -> None:
    paths = [entry.path for entry in DirectorySource(tree)]
    keys = [path.split(b"/") for path in paths[1:]]
    assert paths[0] == b""
    assert keys == sorted(keys)


def test_wanted_files_come_first(tree: Path, wanted: dict[bytes, Description]) -> None:
    first = [b"/zeros", b"dup/hard", b"text", b"nowhere", b"long/x", b"/", b"zeros"]
    entries = [entry.path for entry in DirectorySource(tree, first)]
    texts = sorted(
        path[1:] for path, d in wanted.items() if path.startswith(b"/text/") and d["type"] == "reg"
    )
    head = [b"zeros", b"dup/hard", *texts]
    assert entries[: len(head) + 1] == [*head, b""]
    assert sorted(entries) == sorted(path.strip(b"/") for path in wanted)
    same(build(DirectorySource(tree, first)), wanted)


def test_sparse_files_are_not_read_through(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as out:
        out.seek(5 << 40)
        out.write(b"here")
        out.seek(6 << 40)
        out.write(b"end")
    image = Image(BuildOptions(chunk_size=1 << 20, jobs=1))
    layer = image.add(DirectorySource(tmp_path))
    [node] = image.merge().children.values()
    assert node.size == (6 << 40) + 3
    assert len(node.chunks) == (6 << 20) + 1
    assert len(set(node.chunks)) == 3
    assert layer.blob
    assert layer.blob.stored_size < 100_000


READ_ALL = """
import sys
from erofsd.build.source import DirectorySource
from erofsd.errors import ErofsdError
for first in ([b"secret"], []):
    try:
        for entry in DirectorySource(sys.argv[1], first):
            if entry.content:
                entry.content.readinto(0, memoryview(bytearray(1)))
    except ErofsdError as exc:
        print(type(exc).__name__, exc)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="drops privileges: needs root")
def test_what_cannot_be_read_is_named() -> None:
    nobody = 65534
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        Path(name, "secret").write_text("x")
        Path(name, "secret").chmod(0)
        Path(name, "locked").mkdir(mode=0)
        command = [sys.executable, "-c", READ_ALL, name]
        run = subprocess.run(
            command, user=nobody, group=nobody, extra_groups=(), cwd=ROOT, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        assert run.stdout.splitlines() == [
            f"BackendDenied {name}/secret: Permission denied",
            f"BackendDenied {name}/locked: Permission denied",
        ]


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 5000)
    for entry in DirectorySource(tmp_path):
        if entry.content:
            os.truncate(tmp_path / "log", 100)
            with pytest.raises(SourceError, match="log: became shorter"):
                entry.content.readinto(0, memoryview(bytearray(5000)))


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file: is no directory"):
        DirectorySource(tmp_path / "file")
    with pytest.raises(SourceError, match="nowhere: No such file"):
        DirectorySource(tmp_path / "nowhere")


def test_a_link_to_the_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").touch()
    (tmp_path / "link").symlink_to("real")
    assert [(e.path, e.node.type) for e in DirectorySource(tmp_path / "link")] == [
        (b"", "dir"), (b"x", "reg"),
    ]  # fmt: skip


def test_paths_longer_than_the_system_takes_at_once(tmp_path: Path) -> None:
    depth = 60
    script = f'cd "$1"; for i in $(seq {depth}); do mkdir {"n" * 200}; cd {"n" * 200}; done; echo deep >leaf'
    subprocess.run(["bash", "-c", script, "-", tmp_path], check=True)
    descriptors = len(os.listdir("/proc/self/fd"))
    found = build(DirectorySource(tmp_path))
    assert len(found) == depth + 2
    assert max(found, key=len).endswith(b"n/leaf")
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_ten_thousand_names_in_one_directory_and_none_lost(tmp_path: Path) -> None:
    for i in range(10_000):
        (tmp_path / f"{i:x}").symlink_to(str(i))
    found = without(build(DirectorySource(tmp_path)), "mtime")
    assert {path: d["target"] for path, d in found.items() if d["target"]} == {
        b"/%x" % i: b"%d" % i for i in range(10_000)
    }
