"""What ``erofsd build`` makes of directories, served by ourselves: every entry is what it was there."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erofsd.api import MountRequest
from erofsd.client import Client
from erofsd.images.tree import Node, walk
from tests.build.ordinary import erofsd
from tests.build.packed import link_groups_of
from tests.daemon.conftest import Daemon
from tests.images.nodes import Source, sources
from tests.images.sourcetree import describe_directory, make_tree, set_security

KINDS = {
    "rafs": (),
    "small chunks": ("--chunk-size", "4K", "--compression", "lz4_block"),
    "batches": ("--chunk-size", "64K", "--batch-size", "64K", "--digest", "sha256"),
    "raw": ("--compression", "none"),
    "erofs": ("--format", "erofs"),
}
EXAMPLES = 12
_MODES = {
    "chr": stat.S_IFCHR,
    "blk": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
    "sock": stat.S_IFSOCK,
    "reg": stat.S_IFREG,
}


@pytest.fixture(autouse=True)
def with_all_rights() -> None:
    if os.geteuid():
        pytest.skip("making devices and changing owners needs root")


def build(source: Path, directory: Path, kind: str) -> tuple[str, list[str]]:
    """Build an image of *source* in *directory*: its reference, and where its blobs are."""
    ref, blobs = f"file:{directory}/image", [str(directory / "blobs")] if kind != "erofs" else []
    erofsd("build", source, ref, *KINDS[kind], *(["--blobs", *blobs] if blobs else []))
    return ref, blobs


@pytest.mark.parametrize("kind", list(KINDS))
def test_built_directory_is_served_as_it_is(
    make_directory: Callable[[], Path], daemon: Daemon, kind: str
) -> None:
    source, directory = make_directory(), make_directory()
    make_tree(source)
    ref, blobs = build(source, directory, kind)
    mounted = daemon.mount(ref, *(["--blobs", *blobs] if blobs else []))
    assert describe_directory(mounted) == describe_directory(source)
    assert link_groups_of(mounted) == link_groups_of(source)
    assert daemon.ls(mounted)["errors"] == 0


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(source=sources(), kind=st.sampled_from(list(KINDS)))
def test_any_directory_is_served_as_it_is(
    make_directory: Callable[[], Path], daemon: Daemon, source: Source, kind: str
) -> None:
    top = make_directory()
    materialise(source, top / "source")
    ref, blobs = build(top / "source", top, kind)
    (top / "mnt").mkdir()
    daemon.directories.append(top / "mnt")

    async def compare() -> None:
        async with Client(daemon.socket) as client:
            await client.mount(MountRequest(ref=ref, dir=str(top / "mnt"), blobs=blobs))
            found = await asyncio.to_thread(describe_directory, top / "mnt")
            assert found == describe_directory(top / "source")
            assert link_groups_of(top / "mnt") == link_groups_of(top / "source")
            await client.unmount(str(top / "mnt"))

    asyncio.run(compare())
    shutil.rmtree(top)


def materialise(source: Source, top: Path) -> None:
    """Make the directory *top* from *source*, as far as its file system can hold that."""
    made: dict[int, bytes] = {}
    paths = [(os.path.join(os.fsencode(top), path), node) for path, node in walk(source.root)]
    for path, node in paths:
        if id(node) in made:
            os.link(made[id(node)], path, follow_symlinks=False)
            continue
        made[id(node)] = path
        _make(path, node, source)
    for path, node in reversed(paths):  # a directory's time last
        os.utime(path, ns=(node.mtime, node.mtime), follow_symlinks=False)


def _make(path: bytes, node: Node, source: Source) -> None:
    if node.type == "dir":
        os.mkdir(path.rstrip(b"/"))
    elif node.type == "lnk":
        os.symlink(node.target, path)
    else:
        os.mknod(path, _MODES[node.type], node.rdev)
    if node.type == "reg":
        with open(path, "wb") as file:
            file.write(source.content[id(node)])
    os.lchown(path, node.uid, node.gid)
    if node.type != "lnk":
        os.chmod(path, node.mode)
    for name, value in node.xattrs.items():
        if name.startswith(b"security."):
            set_security(path, name, value)
        else:
            os.setxattr(path, name, value, follow_symlinks=False)
