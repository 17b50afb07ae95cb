"""Sources packed and read back: what went in, and what readers see of it."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from erofsd.build.chunks import Dictionary, ImageChunks
from erofsd.build.layers import Layer, merge, pack_layer
from erofsd.build.options import BuildOptions
from erofsd.build.pack import Packer
from erofsd.build.source import SourceEntry
from erofsd.build.tarstream import TarSource
from erofsd.images.erofs.tree import ErofsTree
from erofsd.images.rafs6.bootstrap import Bootstrap, parse_bootstrap
from erofsd.images.rafs6.reader import RafsReader
from erofsd.images.rafs6.writer import write_bootstrap
from erofsd.images.tree import Node, walk
from tests.images.nydusimages import decoder, layouts_of
from tests.images.sourcetree import Description, describe_tree

SMALL = BuildOptions(chunk_size=4096, jobs=2)


@dataclass
class Image:
    """An image under construction, in memory.

    Attributes:
        blobs: Blob id to blob.
        warnings: What packing and merging said.
    """

    options: BuildOptions = SMALL
    dictionary: Dictionary | None = None
    layers: list[Layer] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.image = ImageChunks(self.dictionary)

    def add(self, source: Iterable[SourceEntry], *, whiteouts: bool = False) -> Layer:
        """Pack *source* as the next layer."""
        out = io.BytesIO()
        name = f"layer {len(self.layers)}"
        with Packer(self.options, self.image, out) as packer:
            layer = pack_layer(name, source, packer, whiteouts=whiteouts, warn=self.warnings.append)
        assert layer.blob is not None or not out.getvalue()
        if layer.blob is not None:
            assert hashlib.sha256(out.getvalue()).hexdigest() == layer.blob.blob_id
            assert len(out.getvalue()) == layer.blob.stored_size
            self.blobs[layer.blob.blob_id] = out.getvalue()
        self.layers.append(layer)
        return layer

    def add_tar(self, data: bytes, *, whiteouts: bool = True) -> Layer:
        """Pack a tar as the next layer."""
        return self.add(TarSource(io.BytesIO(data), "tar"), whiteouts=whiteouts)

    def merge(self) -> Node:
        """The tree of all layers."""
        return merge(self.layers, warn=self.warnings.append)

    def bootstrap(self, root: Node) -> Bootstrap:
        """The image's bootstrap, read again."""
        out = io.BytesIO()
        options = self.options
        write_bootstrap(
            root, self.image.chunks, out,
            chunk_size=options.chunk_size, codec=options.compression, digester=options.digest,
        )  # fmt: skip
        return parse_bootstrap("image", out.getvalue())

    def read(self, root: Node, others: dict[str, bytes] | None = None) -> dict[bytes, Description]:
        """What our reader says of the finished image, every chunk verified.

        Args:
            others: Blobs of dictionaries.
        """
        bootstrap = self.bootstrap(root)
        blobs = {**self.blobs, **(others or {})}
        layouts = layouts_of(bootstrap, {}, blobs)
        return describe_tree(ErofsTree(RafsReader(bootstrap, layouts, decoder(layouts, blobs))))


def build(source: Iterable[SourceEntry], options: BuildOptions = SMALL) -> dict[bytes, Description]:
    """What our reader says of an image made of *source* alone."""
    image = Image(options)
    image.add(source)
    return image.read(image.merge())


def tar_entries(data: bytes, *, lenient_end: bool = False) -> list[tuple[SourceEntry, bytes]]:
    """Entries of a tar with their content, holes as zeros."""
    found = []
    for entry in TarSource(io.BytesIO(data), "test.tar", lenient_end=lenient_end):
        content = bytearray(entry.content.size if entry.content else 0)
        if entry.content:
            extents = entry.content.extents
            for start, length in [(0, len(content))] if extents is None else extents:
                entry.content.readinto(start, memoryview(content)[start : start + length])
        found.append((entry, bytes(content)))
    return found


def describe_entries(data: bytes) -> dict[bytes, Description]:
    """What a tar says of its entries, in the words of ``describe_directory``; without nlink."""
    found: dict[bytes, Description] = {}
    for entry, content in tar_entries(data):
        node = entry.node
        path = b"/" + entry.path
        if entry.link is not None:
            found[path] = {**found[b"/" + entry.link], "mtime": node.mtime}
            continue
        found[path] = {
            "type": node.type,
            "mode": node.mode,
            "owner": (node.uid, node.gid),
            "mtime": node.mtime,
            "size": {"dir": None, "lnk": len(node.target)}.get(node.type, node.size),
            "rdev": node.rdev,
            "target": node.target if node.type == "lnk" else None,
            "xattrs": node.xattrs,
            "sha256": hashlib.sha256(content).hexdigest() if node.type == "reg" else None,
        }
    return found


def link_groups(root: Node) -> set[frozenset[bytes]]:
    """The names of every inode that has several."""
    names: dict[int, set[bytes]] = defaultdict(set)
    for path, node in walk(root):
        names[id(node)].add(path)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def link_groups_of(top: Path) -> set[frozenset[bytes]]:
    """The same of a directory. Not by rglob, which stumbles over targets of links that are no names."""
    names: dict[int, set[bytes]] = defaultdict(set)
    for directory, directories, files in os.walk(os.fsencode(top)):
        for path in (os.path.join(directory, name) for name in (*directories, *files)):
            status = os.lstat(path)
            if not stat.S_ISDIR(status.st_mode):
                names[status.st_ino].add(os.path.relpath(path, os.fsencode(top)))
    return {frozenset(group) for group in names.values() if len(group) > 1}
