"""Proves that two file trees are the same, entry by entry, or says where they are not.

Both sides come in the same order, parents before children and siblings sorted bytewise, and are read side by
side: nothing but names of hard links is kept. Content is compared by BLAKE3, in threads.

What is not compared: the time of the root (builders set it to anything), sizes of directories, and numbers
that a file system makes up (inode, device of the file system).
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from erofsd.backends.localfs import translate
from erofsd.images.base import Entry, Tree
from erofsd.images.tree import Node, walk

ASPECTS = ("mtime", "xattrs")
"""What can be left out of a comparison."""

KEPT = 1000
"""Differences that are told one by one; more are only counted."""

_PENDING_MAX = 64
_INLINE_MAX = 64 << 10  # handing over a smaller file takes longer than reading it
_PIECE_SIZE = 1 << 20
# What EROFS can hold. Source: fs/erofs/erofs_fs.h, EROFS_XATTR_INDEX_*.
_XATTR_PREFIXES = ("user.", "trusted.", "security.")
_XATTR_NAMES = ("system.posix_acl_access", "system.posix_acl_default")
_TYPES = {
    stat.S_IFREG: "reg",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "lnk",
    stat.S_IFCHR: "chr",
    stat.S_IFBLK: "blk",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "sock",
}


@dataclass(frozen=True, slots=True)
class Item:
    """One name of one side.

    Attributes:
        path: Absolute; ``b"/"`` for the root.
        mode: Permission bits.
        mtime: Nanoseconds since 1970.
        size: Of a regular file.
        inode: Equal for all names of one inode that has several; None for one that has no other.
        digest: Gives the BLAKE3 of a regular file's content; reads it. May be called from any thread.
    """

    path: bytes
    type: str
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    rdev: int
    target: bytes | None
    xattrs: dict[bytes, bytes]
    inode: Hashable | None
    digest: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which the sides differ.

    Attributes:
        path: As latin-1, one character a byte.
        aspect: ``missing``, ``extra``, ``type``, ``mode``, ``uid``, ``gid``, ``mtime``, ``size``, ``rdev``,
            ``target``, ``xattrs``, ``links``, ``content``.
        expected: As the first side has it, for people.
        found: As the second side has it.
    """

    path: str
    aspect: str
    expected: str
    found: str

    def __str__(self) -> str:
        path = self.path.encode("latin-1").decode("utf-8", "backslashreplace")
        match self.aspect:
            case "missing":
                return f"{path}: missing"
            case "extra":
                return f"{path}: should not be there"
        return f"{path}: {self.aspect}: {self.found}, should be {self.expected}"


@dataclass(slots=True)
class Comparison:
    """What came out.

    Attributes:
        entries: Names that both sides have.
        content_bytes: Sizes of the files whose content was compared.
        differences: The first `KEPT`, by path.
        count: All of them.
    """

    entries: int = 0
    content_bytes: int = 0
    differences: list[Difference] = field(default_factory=list)
    count: int = 0

    @property
    def same(self) -> bool:
        """True if there is no difference."""
        return not self.count


def compare(
    expected: Iterable[Item],
    found: Iterable[Item],
    *,
    ignore: Iterable[str] = (),
    threads: int = 1,
    tell: Callable[[int], None] = lambda size: None,
) -> Comparison:
    """Compare two sides. Blocks; reads all content.

    Args:
        ignore: Any of `ASPECTS`.
        threads: Files whose content is read at the same time.
        tell: Hears how many more bytes of content are done.

    Raises:
        As the sides.
    """
    run = _Run(frozenset(ignore), threads, tell)
    try:
        for left, right in _side_by_side(expected, found):
            run.pair(left, right)
        return run.finish()
    finally:
        run.pool.shutdown(cancel_futures=True)


def _side_by_side(
    expected: Iterable[Item], found: Iterable[Item]
) -> Iterator[tuple[Item | None, Item | None]]:
    """Pairs of equal path; None where a side does not have it."""
    lefts, rights = iter(expected), iter(found)
    left, right = next(lefts, None), next(rights, None)
    while left is not None or right is not None:
        if left is not None and right is not None and left.path == right.path:
            yield left, right
            left, right = next(lefts, None), next(rights, None)
        elif right is None or (left is not None and _key(left.path) < _key(right.path)):
            yield left, None
            left = next(lefts, None)
        else:
            yield None, right
            right = next(rights, None)


def _key(path: bytes) -> list[bytes]:
    return [] if path == b"/" else path.split(b"/")


class _Run:
    """A comparison under way."""

    def __init__(self, ignore: frozenset[str], threads: int, tell: Callable[[int], None]) -> None:
        self.pool = ThreadPoolExecutor(threads, "compare")
        self._ignore = ignore
        self._tell = tell
        self._result = Comparison()
        self._first: tuple[dict[Hashable, bytes], dict[Hashable, bytes]] = ({}, {})
        self._pending: deque[tuple[bytes, int, Future[tuple[bytes, bytes]]]] = deque()
        self._skipping: bytes | None = None

    def pair(self, left: Item | None, right: Item | None) -> None:
        """Compare one entry."""
        if left is None or right is None:
            present = left or right
            assert present is not None  # _side_by_side gives at least one
            self._alone(present.path, "missing" if right is None else "extra")
            return
        self._result.entries += 1
        if left.type != right.type:
            self._differ(left.path, "type", left.type, right.type)
            return
        for aspect, one, other in _aspects(left, right):
            if one != other and aspect not in self._ignore:
                self._differ(left.path, aspect, one, other)
        if "xattrs" not in self._ignore:
            self._compare_xattrs(left, right)
        if left.type != "dir":
            self._compare_links(left, right)

    def finish(self) -> Comparison:
        """Wait for all content; what came out."""
        while self._pending:
            self._settle()
        self._result.differences.sort(key=lambda d: d.path)
        return self._result

    def _alone(self, path: bytes, aspect: str) -> None:
        # What is below a directory that is not there needs no line of its own.
        if self._skipping is not None and path.startswith(self._skipping):
            self._result.count += 1
            return
        self._skipping = path + b"/"
        self._differ(path, aspect, "", "")

    def _compare_xattrs(self, left: Item, right: Item) -> None:
        for name in sorted(left.xattrs.keys() | right.xattrs.keys()):
            one, other = left.xattrs.get(name), right.xattrs.get(name)
            if one != other:
                shown = name.decode("utf-8", "backslashreplace")
                self._differ(left.path, "xattrs", f"{shown}={_shown(one)}", f"{shown}={_shown(other)}")

    def _compare_links(self, left: Item, right: Item) -> None:
        one, one_new = self._first_name(0, left)
        other, other_new = self._first_name(1, right)
        if one != other:
            self._differ(left.path, "links", f"one file with {one!r}", f"one file with {other!r}")
        elif left.type == "reg" and left.size == right.size and left.size and (one_new or other_new):
            if left.size <= _INLINE_MAX:
                self._content(left.path, left.size, left.digest(), right.digest())
                return
            while len(self._pending) >= _PENDING_MAX:
                self._settle()
            future = self.pool.submit(_digests, left.digest, right.digest)
            self._pending.append((left.path, left.size, future))

    def _first_name(self, side: int, item: Item) -> tuple[bytes, bool]:
        """The first name of the item's inode, and whether this is it."""
        if item.inode is None:
            return item.path, True
        first = self._first[side].setdefault(item.inode, item.path)
        return first, first == item.path

    def _settle(self) -> None:
        path, size, future = self._pending.popleft()
        self._content(path, size, *future.result())

    def _content(self, path: bytes, size: int, one: bytes, other: bytes) -> None:
        self._result.content_bytes += size
        self._tell(size)
        if one != other:
            self._differ(path, "content", f"blake3 {one.hex()}", f"blake3 {other.hex()}")

    def _differ(self, path: bytes, aspect: str, expected: Any, found: Any) -> None:
        self._result.count += 1
        if len(self._result.differences) < KEPT:
            difference = Difference(path.decode("latin-1"), aspect, _text(expected), _text(found))
            self._result.differences.append(difference)


def _aspects(left: Item, right: Item) -> Iterator[tuple[str, Any, Any]]:
    if left.type != "lnk":  # Linux asks nobody for it, and lets nobody set it: images have what they have
        yield "mode", f"{left.mode:04o}", f"{right.mode:04o}"
    yield "uid", left.uid, right.uid
    yield "gid", left.gid, right.gid
    if left.path != b"/":
        yield "mtime", left.mtime, right.mtime
    match left.type:
        case "reg":
            yield "size", left.size, right.size
        case "lnk":
            yield "target", left.target, right.target
        case "chr" | "blk":
            yield "rdev", left.rdev, right.rdev


def _digests(left: Callable[[], bytes], right: Callable[[], bytes]) -> tuple[bytes, bytes]:
    return left(), right()


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _shown(value: bytes | None) -> str:
    if value is None:
        return "nothing"
    return f"0x{value.hex()}" if len(value) <= 64 else f"0x{value[:64].hex()}… ({len(value)} bytes)"


# --- sides ---


def image_items(tree: Tree) -> Iterator[Item]:
    """The entries of an image. Its content is read with as many threads as `compare` is told to use."""
    return entry_items(tree.walk(), lambda entry: _content_digest(tree.content(entry)))


def entry_items(entries: Iterable[Entry], digest: Callable[[Entry], bytes]) -> Iterator[Item]:
    """Entries of an image whose content *digest* knows."""
    for entry in entries:
        linked = entry.type != "dir" and entry.nlink > 1
        yield Item(
            entry.path,
            entry.type,
            entry.mode,
            entry.uid,
            entry.gid,
            entry.mtime,
            entry.size,
            entry.rdev,
            entry.target,
            entry.xattrs,
            entry.nid if linked else None,
            partial(digest, entry),
        )


def _content_digest(pieces: Iterable[bytes]) -> bytes:
    hasher = blake3()
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()


def node_items(root: Node) -> Iterator[Item]:
    """The entries of a tree that a source filled, with ``Node.digest``. No writer may be at work on it."""
    for _, node in walk(root):
        node.number = 0
    for _, node in walk(root):  # counted in the nodes: a table of all of them would take more than they do
        if node.type != "dir":
            node.number += 1
    groups = 0
    for path, node in walk(root):
        if node.type == "dir":
            inode = None
        else:
            if node.number > 1:
                groups += 1
                node.number = -groups
            inode = node.number if node.number < 0 else None
        yield Item(
            b"/" + path,
            node.type,
            node.mode,
            node.uid,
            node.gid,
            node.mtime,
            node.size,
            node.rdev,
            node.target if node.type == "lnk" else None,
            node.xattrs,
            inode,
            partial(_known_digest, node.digest),
        )


def _known_digest(digest: bytes) -> bytes:
    return digest


def directory_items(top: Path) -> Iterator[Item]:
    """The entries of a directory of this machine, with what other file systems are mounted in it.

    Raises:
        SourceError: Something in it cannot be read; names it.
    """
    stack = [(os.path.join(os.fsencode(top), b"."), b"/")]  # by its inside: it may be a link
    while stack:
        place, path = stack.pop()
        try:
            status = os.lstat(place)
            yield _local_item(place, path, status)
            if not stat.S_ISDIR(status.st_mode):
                continue
            names = sorted(os.listdir(place), reverse=True)
        except OSError as exc:
            raise translate(exc, os.fsdecode(place)) from exc
        stack += [(place + b"/" + name, path.rstrip(b"/") + b"/" + name) for name in names]


def _local_item(place: bytes, path: bytes, status: os.stat_result) -> Item:
    kind = _TYPES[stat.S_IFMT(status.st_mode)]
    return Item(
        path,
        kind,
        stat.S_IMODE(status.st_mode),
        status.st_uid,
        status.st_gid,
        status.st_mtime_ns,
        status.st_size,
        status.st_rdev if kind in ("chr", "blk") else 0,
        os.readlink(place) if kind == "lnk" else None,
        _local_xattrs(place),
        (status.st_dev, status.st_ino) if kind != "dir" and status.st_nlink > 1 else None,
        partial(_file_digest, place),
    )


def _local_xattrs(place: bytes) -> dict[bytes, bytes]:
    try:
        names = os.listxattr(place, follow_symlinks=False)
    except OSError:  # a file system without any
        return {}
    return {
        os.fsencode(name): os.getxattr(place, name, follow_symlinks=False)
        for name in names
        if name.startswith(_XATTR_PREFIXES) or name in _XATTR_NAMES
    }


def _file_digest(place: bytes) -> bytes:
    try:
        with open(place, "rb", buffering=0) as file:
            hasher = blake3()
            while piece := file.read(_PIECE_SIZE):
                hasher.update(piece)
            return hasher.digest()
    except OSError as exc:
        raise translate(exc, os.fsdecode(place)) from exc
