"""Trees of nodes with content, made by hand or by hypothesis, and what a file system should say of them."""

from __future__ import annotations

import hashlib
import os
import random
import struct
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import strategies as st

from erofsd.images.tree import Node, walk
from tests.images.sourcetree import Description

SIZES = (0, 1, 12, 2000, 3900, 4031, 4032, 4033, 4064, 4095, 4096, 4097, 8192, 9000, 65536, 65537, 200_000)
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHi", *rule)
    for rule in [(1, 6, -1), (2, 4, 1000), (4, 4, -1), (0x10, 4, -1), (0x20, 4, -1)]
)


@dataclass
class Source:
    """A tree, and the content of its files."""

    root: Node = field(default_factory=lambda: Node("dir", 0o755, mtime=1_600_000_000_000_000_001))
    content: dict[int, bytes] = field(default_factory=dict)

    def add(self, path: bytes, node: Node, content: bytes = b"") -> Node:
        """Put *node* at *path*, under its existing parent."""
        parent, _, name = path.rpartition(b"/")
        directory = self.root
        for part in parent.split(b"/"):
            directory = directory.children[part] if part else directory
        directory.children[name] = node
        if node.type == "reg":
            node.size = len(content)
            self.content[id(node)] = content
        return node

    def read(self, node: Node) -> list[bytes]:
        """Content of *node* in odd pieces, as the writer of plain EROFS wants it."""
        data = self.content[id(node)]
        return [data[at : at + 70_001] for at in range(0, len(data), 70_001)]

    def describe(self) -> dict[bytes, Description]:
        """As ``sourcetree.describe_directory`` of its mount."""
        links = Counter(id(node) for _, node in walk(self.root))
        return {
            b"/" + path: {
                "type": node.type,
                "mode": node.mode,
                "owner": (node.uid, node.gid),
                "mtime": node.mtime,
                "size": None if node.type == "dir" else len(node.target) or node.size,
                "nlink": 2 + sum(child.type == "dir" for child in node.children.values())
                if node.type == "dir"
                else links[id(node)],
                "rdev": node.rdev if node.type in ("chr", "blk") else 0,
                "target": node.target if node.type == "lnk" else None,
                "xattrs": node.xattrs,
                "sha256": hashlib.sha256(self.content[id(node)]).hexdigest() if node.type == "reg" else None,
            }
            for path, node in walk(self.root)
        }


def awkward() -> Source:
    """One of everything that is easily got wrong."""
    noise = random.Random(7).randbytes(300_000)
    source = Source()
    add = source.add
    add(b"dir", Node("dir", 0o1777, 70000, 80000, -1_500_000_000))
    add(b"dir/sub", Node("dir", 0o700, xattrs={b"trusted.overlay.opaque": b"y"}))
    for size in SIZES:
        add(b"dir/%d" % size, Node("reg", 0o644, mtime=size), noise[:size])
        add(
            b"dir/x%d" % size,
            Node("reg", 0o4755, 65535, 65536, xattrs={b"user.v": noise[:size][:3000]}),
            noise[:size],
        )
    for length in (1, 255, 3990, 4032, 4033, 4095):
        add(b"to-%d" % length, Node("lnk", 0o777, target=b"t" * length, mtime=-1))
    add(b"x" * 255, Node("reg", mtime=4_294_967_296_999_999_999), b"late")
    add(b"\xff\xfe\n!", Node("reg"), b"not UTF-8")
    add(b"!", Node("dir"))  # sorts before the dots
    add(b"...", Node("fifo", 0o600))
    add(b"sock", Node("sock"))
    add(b"chr", Node("chr", 0o600, rdev=os.makedev(5, 1)))
    add(b"blk", Node("blk", 0o660, rdev=os.makedev(259, 70000)))
    for name in (b"x" * 255, b"chr", b"to-1", b"sock", b"dir/9000"):
        node = source.root
        for part in name.split(b"/"):
            node = node.children[part]
        source.root.children[b"again-" + name.replace(b"/", b"-")[:200]] = node
        source.root.children[b"dir"].children[b"sub"].children[name.replace(b"/", b"-")] = node
    add(
        b"xattrs",
        Node(
            "reg",
            xattrs={
                b"user.nul": b"a\0b\nc",
                b"user.empty": b"",
                b"user." + b"n" * 250: b"long name",
                b"security.capability": struct.pack("<IIIII", 0x2000001, 1 << 10, 0, 0, 0),
                b"system.posix_acl_access": ACL,
                b"trusted.large": noise[:65535],
                b"user.large": noise[:50000],
            },
        ),
        noise[:5000],
    )
    add(b"acl", Node("dir", xattrs={b"system.posix_acl_default": ACL}))
    add(b"zeros", Node("reg"), bytes(200_000))
    add(b"holes", Node("reg"), noise[:100] + bytes(150_000) + noise[:100])
    add(b"twice", Node("reg"), noise[:65536] * 3 + noise[:1])
    add(b"many", Node("dir"))
    for i in range(500):
        add(b"many/%s%d" % (b"n" * (i % 200), i), Node("reg", mtime=i % 3, xattrs={b"user.same": b"v" * 40}))
    return source


def _without_nul(name: bytes) -> bytes:
    return name.replace(b"\0", b"\1")


_NAMES = st.one_of(
    st.binary(min_size=1, max_size=20),
    st.binary(min_size=250, max_size=255),
    st.sampled_from([b"!", b"-", b"..."]),
).map(lambda name: b"dots" if name in (b".", b"..") else _without_nul(name).replace(b"/", b"\xff"))
_TIMES = st.one_of(
    st.integers(-(10**9) * 3_000_000_000, 10**9 * 10_000_000_000), st.sampled_from([0, 10**18, 10**18 + 1])
)
_NOISE = [random.Random(seed).randbytes(65536) for seed in range(3)]
_IDS = st.sampled_from([0, 1000, 65535, 65536, 0xFFFFFFFE])
_TYPES = ["reg", "reg", "reg", "dir", "dir", "lnk", "chr", "blk", "fifo", "sock", "link"]


@st.composite
def _xattrs(draw: st.DrawFn, kind: str) -> dict[bytes, bytes]:
    # The kernel shows user.* of files and directories only
    prefixes = [b"trusted.", b"security."] + ([b"user."] if kind in ("reg", "dir") else [])
    suffix = st.binary(min_size=1, max_size=30).map(_without_nul)
    names = st.builds(lambda prefix, name: prefix + name, st.sampled_from(prefixes), suffix)
    return draw(st.dictionaries(names, st.binary(max_size=80), max_size=3))


@st.composite
def sources(draw: st.DrawFn) -> Source:
    """Trees of up to 40 names."""
    source = Source()
    directories = [source.root]
    others: list[Node] = []
    for _ in range(draw(st.integers(0, 40))):
        directory = draw(st.sampled_from(directories))
        name = draw(_NAMES)
        kind = draw(st.sampled_from(_TYPES))
        if name in directory.children:
            continue
        if kind == "link":
            if others:
                directory.children[name] = draw(st.sampled_from(others))
            continue
        node = Node(kind, draw(st.integers(0, 0o7777)), draw(_IDS), draw(_IDS), draw(_TIMES))
        node.xattrs = draw(_xattrs(kind)) if draw(st.booleans()) else {}
        if kind == "lnk":
            node.mode = 0o777  # the VFS does not care, but nobody sees others
            node.target = draw(st.sampled_from([b"t", b"t" * 3000, b"t" * 4095, b"\xff/.."]))
        if kind in ("chr", "blk"):
            node.rdev = os.makedev(draw(st.integers(0, 4095)), draw(st.integers(0, (1 << 20) - 1)))
        if kind == "reg":
            data = (
                random.Random(draw(st.integers(0, 3))).randbytes(65536)
                if draw(st.booleans())
                else bytes(65536)
            )
            size = draw(st.sampled_from(SIZES))
            node.size = size
            source.content[id(node)] = (data * 4)[:size]
        (directories if kind == "dir" else others).append(node)
        directory.children[name] = node
    return source
