"""A file tree of awkward files, what the kernel says of a tree, and mkfs.erofs."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from erofsd.images.base import Entry, Tree
from erofsd.images.erofs.format import TYPE_NAMES
from erofsd.images.summary import content_digest

Description = dict[str, object]
SIZES = (0, 1, 11, 100, 511, 512, 4000, 4095, 4096, 4097, 8192, 12288, 65536, 65537, 300000, 1048577)


def make_tree(top: Path) -> None:
    """Fill the new directory *top*. As root with owners, devices and all kinds of xattrs."""
    noise = random.Random(5).randbytes(1 << 20)
    text = b"".join(b"line %d of %s\n" % (i, bytes([97 + i % 26]) * (i % 40)) for i in range(40000))

    def write(name: str, data: bytes) -> Path:
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    for size in SIZES:
        write(f"text/{size}", text[:size])
        write(f"noise/{size}", noise[:size])
        write(f"mixed/{size}", (text[: size // 3] + noise[: size // 3] + bytes(size))[:size])
    write("zeros", bytes(200000))
    big = write("big", text + noise + text[:300000] + bytes(700000) + text)
    duplicate = write("dup/a", noise[:300000] + text[:50000])
    write("dup/b", noise[:300000] + text[:50000])
    write("dup/c", b"x" * 777 + noise[:300000] + text[100:50000])
    for i in range(400):
        write(f"many/{'n' * (i % 90)}{i:04}", b"%d" % i * (i % 50))
    with open(top / "sparse", "wb") as file:
        file.seek(3_000_000)
        file.write(b"end")
        file.truncate(5_000_000)
    (top / "text" / "link").symlink_to("../big")
    (top / "long").symlink_to("y/" * 2000)
    os.link(big, top / "dup" / "hard")
    os.mkfifo(top / "fifo")
    directory_fd = os.open(top, os.O_RDONLY)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{directory_fd}/sock")
    os.close(directory_fd)
    (top / "empty").mkdir(mode=0o1777)
    (top / "empty").chmod(0o1777)
    (top / "text" / "100").chmod(0o4755)
    for i in range(30):
        os.setxattr(top / "many" / f"{'n' * i}{i:04}", "user.shared", b"common value" * 5)
        os.setxattr(top / "many" / f"{'n' * i}{i:04}", "user.own", b"%d" % i * i)
    os.setxattr(duplicate, "user.large", noise[:3000])
    if os.geteuid() == 0:
        _make_roots_files(top)
    stamp = 1_600_000_000_000_000_000
    for path in [*sorted(top.rglob("*")), top]:
        stamp += 1_000_000_007
        os.utime(path, ns=(stamp, stamp), follow_symlinks=False)


def _make_roots_files(top: Path) -> None:
    os.mknod(top / "chr", stat.S_IFCHR | 0o600, os.makedev(5, 1))
    os.mknod(top / "blk", stat.S_IFBLK | 0o660, os.makedev(259, 70000))
    os.chown(top / "text" / "11", 70000, 80000)
    os.chown(top / "text" / "512", 1000, 1001)
    os.setxattr(top / "text", "trusted.overlay.opaque", b"y")
    set_security(top / "big", "security.capability", struct.pack("<IIIII", 0x2000001, 1 << 10, 0, 0, 0))
    rules = [(1, 6, -1), (2, 4, 1000), (4, 4, -1), (0x10, 4, -1), (0x20, 4, -1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *rule) for rule in rules)
    os.setxattr(top / "zeros", "system.posix_acl_access", acl)
    os.setxattr(top / "mixed", "system.posix_acl_default", acl)


def set_security(path: Path | bytes, name: str | bytes, value: bytes) -> None:
    """Set an attribute of the ``security`` namespace, where the file system knows it: UML's ext4 does not."""
    try:
        os.setxattr(path, name, value, follow_symlinks=False)
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise


def describe_directory(top: Path) -> dict[bytes, Description]:
    """What lstat, readlink, getxattr and read say of everything in *top*."""
    found = {b"/": _describe_path(top)}
    for directory, directories, files in os.walk(top):
        for name in directories + files:
            path = Path(directory, name)
            found[b"/" + os.fsencode(path.relative_to(top))] = _describe_path(path)
    return found


def _describe_path(path: Path) -> Description:
    st = path.lstat()
    kind = TYPE_NAMES[stat.S_IFMT(st.st_mode)]
    return {
        "type": kind,
        "mode": stat.S_IMODE(st.st_mode),
        "owner": (st.st_uid, st.st_gid),
        "mtime": st.st_mtime_ns,
        "size": None if kind == "dir" else st.st_size,
        "nlink": st.st_nlink,
        "rdev": st.st_rdev,
        "target": os.fsencode(os.readlink(path)) if kind == "lnk" else None,
        "xattrs": {
            os.fsencode(name): os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
        },
        "sha256": _content_digest(path) if kind == "reg" else None,
    }


def _content_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(16 << 20):
            digest.update(piece)
            if file.tell() >= 256 << 20:  # a huge one need not push everything else out of memory
                os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def describe_tree(tree: Tree) -> dict[bytes, Description]:
    """The same of a tree that we read ourselves."""
    return {entry.path: _describe_entry(tree, entry) for entry in tree.walk()}


def _describe_entry(tree: Tree, entry: Entry) -> Description:
    return {
        "type": entry.type,
        "mode": entry.mode,
        "owner": (entry.uid, entry.gid),
        "mtime": entry.mtime,
        "size": None if entry.type == "dir" else entry.size,
        "nlink": entry.nlink,
        "rdev": entry.rdev,
        "target": entry.target,
        "xattrs": entry.xattrs,
        "sha256": content_digest(tree, entry) if entry.type == "reg" else None,
    }


def without(descriptions: dict[bytes, Description], *keys: str) -> dict[bytes, Description]:
    """*descriptions* less some keys."""
    return {
        path: {key: value for key, value in each.items() if key not in keys}
        for path, each in descriptions.items()
    }


def mkfs(image: Path, source: Path, *options: str) -> None:
    """Make an image with Debian's mkfs.erofs."""
    command = ["mkfs.erofs", "-d1", "--quiet", *options, str(image), str(source)]
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def mounted(image: Path, directory: Path) -> Iterator[Path | None]:
    """*image* mounted on *directory* through a loop device; None where that is not possible."""
    directory.mkdir(exist_ok=True)
    command = ["mount", "-t", "erofs", "-o", "loop,ro", str(image), str(directory)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)
