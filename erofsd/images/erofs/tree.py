"""The file tree of an EROFS image, read without the kernel."""

from __future__ import annotations

from collections.abc import Iterator

from erofsd.errors import CorruptImage
from erofsd.images.base import Entry
from erofsd.images.erofs.format import Inode
from erofsd.images.erofs.reader import Dirent, ErofsReader
from erofsd.images.source import corrupt

# No path that Linux can open is longer than 4096 bytes, but a tree may be deeper than one path can say.
PATH_MAX = 64 << 10
COMPRESSION_MAX = 64  # of directories: names and numbers differ


def walk_inodes(reader: ErofsReader) -> Iterator[tuple[bytes, Inode]]:
    """Every name with its inode, parents before children, siblings sorted; the root is ``b"/"``.

    A directory may have one name only: a second one is a cycle or makes the walk exponential. All directories
    together are no larger than the image, unless they are compressed, so the walk ends.

    Raises:
        CorruptImage: A cycle, a path longer than PATH_MAX, and whatever the reader finds.
    """
    seen = {reader.root.nid}
    budget = 2 * reader.source.size
    yield b"/", reader.root
    names: list[bytes] = [b""]
    levels: list[Iterator[Dirent]] = [reader.entries(reader.root)]
    while levels:
        dirent = next(levels[-1], None)
        if dirent is None:
            levels.pop()
            names.pop()
            continue
        inode = reader.inode(dirent.nid)
        path = b"/".join([*names, dirent.name])
        if len(path) > PATH_MAX:
            raise _bad(reader, inode, f"lies deeper than {PATH_MAX} bytes of path")
        if inode.type == "dir":
            budget -= inode.size // COMPRESSION_MAX if inode.compressed else inode.size
            if inode.nid in seen:
                raise _bad(reader, inode, "is a directory with two names")
            if budget < 0:
                raise _bad(reader, inode, "makes all directories larger than the image")
            seen.add(inode.nid)
        yield path, inode
        if inode.type == "dir":
            names.append(dirent.name)
            levels.append(reader.entries(inode))


def _bad(reader: ErofsReader, inode: Inode, problem: str) -> CorruptImage:
    return corrupt(reader.name, inode.offset, f"nid {inode.nid}", problem)


class ErofsTree:
    """Implements Tree over a reader."""

    def __init__(self, reader: ErofsReader) -> None:
        self.reader = reader

    def walk(self) -> Iterator[Entry]:
        """See Tree."""
        for path, inode in walk_inodes(self.reader):
            yield self.entry(path, inode)

    def entry(self, path: bytes, inode: Inode) -> Entry:
        """What lstat and friends show of *inode* under the name *path*."""
        return Entry(
            path=path,
            nid=inode.nid,
            type=inode.type,
            mode=inode.mode & 0o7777,
            uid=inode.uid,
            gid=inode.gid,
            mtime=inode.mtime,
            size=inode.size,
            nlink=inode.nlink,
            rdev=inode.rdev,
            target=self.reader.target(inode) if inode.type == "lnk" else None,
            xattrs=self.reader.xattrs(inode),
        )

    def content(self, entry: Entry) -> Iterator[bytes]:
        """See Tree."""
        return self.reader.content(self.reader.inode(entry.nid))
