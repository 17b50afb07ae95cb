"""Comparing trees: every difference is found and named, and what is the same is the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from erofsd.build.compare import Difference, compare, directory_items
from tests.build.ordinary import erofsd
from tests.registry import need

TIME = 1_600_000_000_123_456_789

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="devices and owners need root")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with one of everything."""
    top = tmp_path / "tree"
    (top / "dir" / "deep").mkdir(parents=True)
    (top / "file").write_bytes(random.Random(5).randbytes(100_000))
    (top / "empty").write_bytes(b"")
    (top / "dir" / "other").write_bytes(b"other")
    os.link(top / "file", top / "dir" / "hard")
    os.symlink("file", top / "soft")
    os.mkfifo(top / "fifo")
    os.mknod(top / "null", 0o20666, os.makedev(1, 3))
    os.setxattr(top / "file", "user.a", b"\0value\n")
    (top / os.fsdecode(b"n\xffme")).write_bytes(b"x")
    sparse = top / "sparse"
    with sparse.open("wb") as file:
        file.seek(3_000_000)
        file.write(b"end")
    for path in sorted(top.rglob("*"), reverse=True):
        os.utime(path, ns=(TIME, TIME), follow_symlinks=False)
    return top


@pytest.fixture
def copy(tree: Path, tmp_path: Path) -> Path:
    """The same directory once more."""
    subprocess.run([need("cp"), "-a", str(tree), str(tmp_path / "copy")], check=True)
    return tmp_path / "copy"


def differences(one: Path, other: Path, *ignore: str, threads: int = 2) -> list[Difference]:
    """What is different."""
    result = compare(directory_items(one), directory_items(other), ignore=ignore, threads=threads)
    assert result.count == len(result.differences)
    return result.differences


def test_copy_is_the_same(tree: Path, copy: Path) -> None:
    assert not differences(tree, copy)


def _time(path: Path) -> None:
    os.utime(path, ns=(TIME, TIME + 1), follow_symlinks=False)


def _kept(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """*change* that leaves the time alone."""

    def changed(path: Path) -> None:
        change(path)
        os.utime(path, ns=(TIME, TIME), follow_symlinks=False)
        os.utime(path.parent, ns=(TIME, TIME))

    return changed


def _flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[70_000] ^= 1
    path.write_bytes(body)


def _relink(path: Path) -> None:
    path.unlink()
    os.symlink("fime", path)


def _unlink(path: Path) -> None:
    body = path.read_bytes()
    path.unlink()
    path.write_bytes(body)


@pytest.mark.parametrize(
    ("path", "change", "aspects"),
    [
        ("file", _kept(_flip), {("/dir/hard", "content")}),
        ("dir/other", _kept(lambda p: p.write_bytes(b"othex")), {("/dir/other", "content")}),
        ("dir/other", _kept(lambda p: p.write_bytes(b"o")), {("/dir/other", "size")}),
        ("dir/other", _kept(lambda p: p.chmod(0o4755)), {("/dir/other", "mode")}),
        ("dir/other", _kept(lambda p: os.chown(p, 7, -1)), {("/dir/other", "uid")}),
        ("soft", _kept(lambda p: os.chown(p, -1, 7, follow_symlinks=False)), {("/soft", "gid")}),
        ("dir/deep", _time, {("/dir/deep", "mtime")}),
        ("soft", _time, {("/soft", "mtime")}),
        ("soft", _kept(_relink), {("/soft", "target")}),
        ("dir/other", _kept(lambda p: os.setxattr(p, "user.b", b"1")), {("/dir/other", "xattrs")}),
        (
            "file",
            _kept(lambda p: os.setxattr(p, "user.a", b"2")),
            {("/dir/hard", "xattrs"), ("/file", "xattrs")},
        ),
        ("dir/hard", _kept(_unlink), {("/file", "links"), ("/dir/hard", "xattrs")}),
        ("dir/deep", _kept(lambda p: p.rmdir()), {("/dir/deep", "missing")}),
        ("dir/more", _kept(lambda p: p.mkdir()), {("/dir/more", "extra")}),
        ("fifo", _kept(lambda p: (p.unlink(), p.write_bytes(b""))), {("/fifo", "type")}),
        (
            "null",
            _kept(lambda p: (p.unlink(), os.mknod(p, 0o20666, os.makedev(1, 5)), p.chmod(0o644))),
            {("/null", "rdev")},
        ),
    ],
)
def test_every_difference_is_found(
    tree: Path, copy: Path, path: str, change: Callable[[Path], None], aspects: set[tuple[str, str]]
) -> None:
    try:
        change(copy / path)
    except FileNotFoundError:  # the time of what was removed cannot be kept
        os.utime((copy / path).parent, ns=(TIME, TIME))
    assert {(d.path, d.aspect) for d in differences(tree, copy)} == aspects


def test_aspects_can_be_left_out(tree: Path, copy: Path) -> None:
    _time(copy / "file")
    os.setxattr(copy / "empty", "user.z", b"z")
    os.utime(copy / "empty", ns=(TIME, TIME))
    assert {d.aspect for d in differences(tree, copy)} == {"mtime", "xattrs"}
    assert {d.aspect for d in differences(tree, copy, "mtime")} == {"xattrs"}
    assert not differences(tree, copy, "mtime", "xattrs")


def test_what_is_below_a_missing_directory_is_counted_and_not_listed(tree: Path, copy: Path) -> None:
    shutil.rmtree(copy / "dir")
    result = compare(directory_items(tree), directory_items(copy))
    assert [(d.path, d.aspect) for d in result.differences if d.aspect == "missing"] == [("/dir", "missing")]
    assert result.count >= 4


def test_very_deep_tree_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "top"
    path.mkdir()
    here = os.open(path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    try:
        assert not differences(path, path)
    finally:
        subprocess.run(["rm", "-rf", str(path)], check=True)


# --- the program ---


@pytest.fixture
def image(tree: Path, tmp_path: Path) -> str:
    """An image of the tree."""
    erofsd("build", tree, f"oci:{tmp_path}/layout:x", "--chunk-size", "16K")
    return f"oci:{tmp_path}/layout:x"


def test_image_is_the_same_as_its_directory_and_as_a_tar_of_it(
    tree: Path, image: str, tmp_path: Path
) -> None:
    done = erofsd("check", image, "--against", tree)
    assert "the same tree" in done.stdout
    tar = tmp_path / "tree.tar.gz"
    subprocess.run(
        [need("tar"), "--xattrs", "--format=pax", "--sparse", "-C", str(tree), "-czf", str(tar), "."],
        check=True,
    )
    erofsd("check", image, "--against", tar)
    erofsd("build", tar, f"oci:{tmp_path}/layout:tar", "--chunk-size", "16K")
    erofsd("check", image, "--against", f"oci:{tmp_path}/layout:tar")


def test_differences_are_printed_and_the_exit_code_is_4(tree: Path, image: str) -> None:
    _kept(_flip)(tree / "file")
    (tree / "new").write_bytes(b"")
    done = erofsd("check", image, "--against", tree, check=False)
    assert done.returncode == 4
    assert "/dir/hard: content: " in done.stderr
    assert "/new: missing" in done.stderr
    listed = erofsd("check", image, "--against", tree, "--json", check=False)
    report = json.loads(listed.stdout)
    assert (listed.returncode, report["ok"], report["faults"]) == (4, False, [])
    assert {(d["path"], d["aspect"]) for d in report["differences"]} >= {
        ("/dir/hard", "content"),
        ("/new", "missing"),
    }


def test_only_times_and_attributes_can_be_ignored(image: str, tree: Path) -> None:
    os.utime(tree / "empty", (5, 5))
    assert erofsd("check", image, "--against", tree, check=False).returncode == 4
    erofsd("check", image, "--against", tree, "--ignore", "mtime,xattrs")
    assert erofsd("check", image, "--ignore", "mtime", check=False).returncode == 2
    with pytest.raises(SystemExit, match="2"):
        erofsd("check", image, "--against", tree, "--ignore", "content", check=False)
