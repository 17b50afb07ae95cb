"""Layers: a source packed into a blob, and several of them merged into one tree as containerd unpacks them.

A layer stays a list of entries in the order of its archive, because that order means something: the last
duplicate wins, a whiteout removes what is there when its turn comes, and a parent that is a symbolic link is
followed to where it points at that moment. `merge` applies the entries one after the other:

- a parent that is missing is made: a directory of root, 0755, with a modification time of 0 (nothing states
  one, and the same layers must give the same image);
- symbolic links in a path, but for its last name, are followed inside the root: an absolute target begins at
  the root. containerd stops ``..`` at the root; here a link that leads above it is refused, since no builder
  makes such a layer and somebody may have meant harm;
- ``.wh.NAME`` removes NAME; ``.wh..wh..opq`` removes what lower layers have in its directory and leaves what
  this layer has put there, before or after it;
- a directory over a directory replaces its attributes and keeps its entries; all else replaces what is there;
- a hard link takes another name for an inode, of this layer or a lower one, and its header's owner, mode and
  time are set on that inode, as for any other entry;
- an entry for the root itself is passed over in an image (containerd keeps 0755 and root), and taken where a
  tree is built from one source.

Source: containerd, pkg/archive/tar.go, applyNaive() and createTarFile(); continuity, fs/path.go, RootPath();
OCI image specification, layer.md, "Applying Changesets".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from erofsd.build.pack import Packer
from erofsd.build.source import NO_XATTRS, Content, SourceEntry, Warn, show
from erofsd.errors import CorruptImage
from erofsd.images.erofs.encode import refused_xattrs
from erofsd.images.tree import NAME_MAX, TARGET_MAX, Node, PackedBlob

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_LINKS_MAX = 255  # continuity, fs/path.go: errTooManyLinks
_TIME_MAX = (1 << 63) - 1  # seconds
_ID_MAX = (1 << 32) - 1


@dataclass(slots=True)
class LayerEntry:
    """One entry of a layer: see SourceEntry. The node has its chunks; content is gone."""

    path: bytes
    node: Node
    link: bytes | None = None


@dataclass(slots=True)
class Layer:
    """A source whose content has been packed.

    Attributes:
        name: For messages.
        entries: In the order of the source.
        blob: None where there was nothing to store.
        whiteouts: Names that begin with ``.wh.`` are no files.
        dropped: Paths of entries that EROFS cannot hold.
    """

    name: str
    entries: list[LayerEntry] = field(default_factory=list)
    blob: PackedBlob | None = None
    whiteouts: bool = False
    dropped: set[bytes] = field(default_factory=set)


def pack_layer(
    name: str, source: Iterable[SourceEntry], packer: Packer, *, whiteouts: bool, warn: Warn
) -> Layer:
    """Pack what *source* gives.

    Args:
        name: For messages.
        packer: Fresh, and finished afterwards.
        whiteouts: True for a layer of an image, False for a tree of its own.
        warn: Told about every entry, and every attribute, that EROFS cannot hold and that is dropped.

    Raises:
        CorruptImage, UnsupportedImage, SourceError: See the source; names the entry.
    """
    layer = Layer(name, whiteouts=whiteouts)
    for entry in source:
        if problem := _impossible_path(entry.path) or _impossible_node(entry.node):
            layer.dropped.add(entry.path)
            warn(f"{name}: {show(entry.path)} is left out: {problem}")
            if whiteouts and entry.path and not _impossible_path(entry.path):
                # What lower layers have there is replaced all the same.
                parent, slash, last = entry.path.rpartition(b"/")
                layer.entries.append(LayerEntry(parent + slash + WHITEOUT + last, entry.node))
            continue
        _drop_xattrs(name, entry, warn)
        if entry.content is not None and not (whiteouts and _is_whiteout(entry.path)):
            _pack_content(entry.node, entry.content, packer)
        layer.entries.append(LayerEntry(entry.path, entry.node, entry.link))
    layer.blob = packer.finish()
    return layer


def _pack_content(node: Node, content: Content, packer: Packer) -> None:
    if 0 < content.size <= packer.options.inline_max and content.extents is None:
        buffer = bytearray(content.size)
        content.readinto(0, memoryview(buffer))
        content.close()
        node.inline = bytes(buffer)
    elif content.size:
        node.chunks = packer.add(content)


def _is_whiteout(path: bytes) -> bool:
    return path.rpartition(b"/")[2].startswith(WHITEOUT)


def _impossible_path(path: bytes) -> str:
    """Why EROFS cannot hold the path; empty if it can."""
    if b"\0" in path:
        return "NUL in a name"
    if len(path) <= NAME_MAX:
        return ""
    longest = max(len(name) for name in path.split(b"/"))
    return f"a name of {longest} bytes; at most {NAME_MAX} are possible" if longest > NAME_MAX else ""


def _impossible_node(node: Node) -> str:
    """Why EROFS cannot hold the inode; empty if it can."""
    if node.type == "lnk" and not 0 < len(node.target) <= TARGET_MAX:
        return f"a target of {len(node.target)} bytes; 1 to {TARGET_MAX} are possible"
    if abs(node.mtime // 10**9) > _TIME_MAX:
        return "its modification time is out of range"
    if not (0 <= node.uid <= _ID_MAX and 0 <= node.gid <= _ID_MAX):
        return f"its owner {node.uid}:{node.gid} is out of range"
    if node.rdev < 0:
        return "its device number is out of range"
    return ""


def _drop_xattrs(name: str, entry: SourceEntry, warn: Warn) -> None:
    xattrs = entry.node.xattrs
    if not xattrs:
        return
    for refused, problem in refused_xattrs(xattrs).items():
        warn(f"{name}: {show(entry.path)}: attribute {show(refused)} is left out: {problem}")
        xattrs = {key: value for key, value in xattrs.items() if key != refused}
    entry.node.xattrs = xattrs or NO_XATTRS


def merge(layers: Sequence[Layer], *, warn: Warn) -> Node:
    """The tree that the layers make, lowest first; returns its root.

    The nodes of the layers become the tree's and their lists of entries are emptied on the way, so that large
    trees are not there twice: a layer can be merged once.

    Raises:
        CorruptImage: A layer does not fit those below it; names layer and entry.
    """
    merger = _Merger(warn)
    for layer in layers:
        merger.apply(layer)
    return merger.root


class _Merger:
    def __init__(self, warn: Warn) -> None:
        self.root = Node("dir", 0o755)
        self._warn = warn
        self._layer = Layer("")
        self._path = b""  # the entry at hand
        self._dropped: set[bytes] = set()
        # Parents that were looked up, until something but an addition happens.
        self._parents: dict[bytes, Node] = {}
        # Names that this layer has put into directories, where it has an opaque one.
        self._fresh: dict[Node, set[bytes]] | None = None

    def apply(self, layer: Layer) -> None:
        self._layer = layer
        self._dropped |= layer.dropped
        self._parents.clear()
        opaque = layer.whiteouts and any(e.path.rpartition(b"/")[2] == OPAQUE for e in layer.entries)
        self._fresh = {} if opaque else None
        entries = layer.entries
        entries.reverse()
        while entries:
            entry = entries.pop()
            self._path = entry.path
            self._apply_entry(entry)

    def _apply_entry(self, entry: LayerEntry) -> None:
        if not entry.path:
            if not self._layer.whiteouts:
                self._replace_root(entry)
            return
        parent_path, _, name = entry.path.rpartition(b"/")
        parent = self._directory(parent_path)
        if self._layer.whiteouts and name.startswith(WHITEOUT):
            self._white_out(parent, name)
            return
        existing = parent.children.get(name)
        if existing is not None:
            if existing.type == "dir" and entry.node.type == "dir" and entry.link is None:
                self._note(parent, name)
                _set_attributes(existing, entry.node)
                existing.xattrs = entry.node.xattrs
                return
            self._remove(parent, name)
        if entry.link is None:
            node = entry.node
        elif (linked := self._linked(entry.link)) is not None:
            node = linked
            _set_attributes(node, entry.node)
            if entry.node.xattrs:
                node.xattrs = {**node.xattrs, **entry.node.xattrs}
        else:
            return
        parent.children[name] = node
        self._note(parent, name)

    def _replace_root(self, entry: LayerEntry) -> None:
        if entry.node.type != "dir" or entry.link is not None:
            raise self._bad("the root is no directory")
        _set_attributes(self.root, entry.node)
        self.root.xattrs = entry.node.xattrs

    def _linked(self, path: bytes) -> Node | None:
        """The inode that a hard link names; None, and a warning, if it was dropped."""
        parent_path, _, name = path.rpartition(b"/")
        parent = self._walk(parent_path, make=False)
        node = parent.children.get(name) if parent is not None else None
        if node is None and path in self._dropped:
            self._warn(f"{self._layer.name}: {show(self._path)} is left out: it is a link to {show(path)}")
            return None
        if node is None or node.type == "dir":
            problem = "is not there" if node is None else "is a directory"
            raise self._bad(f"a hard link to {show(path)!r}, which {problem}")
        return node

    # --- removing ---

    def _white_out(self, parent: Node, name: bytes) -> None:
        if name == OPAQUE:
            self._hide(parent)
            self._parents.clear()
            return
        hidden = name[len(WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise self._bad("a whiteout of nothing that can be")
        if hidden in parent.children:
            self._remove(parent, hidden)

    def _hide(self, directory: Node) -> None:
        """Remove what lower layers have in *directory*."""
        assert self._fresh is not None  # this layer has an opaque directory
        fresh = self._fresh.get(directory, set())
        for name in list(directory.children):
            if name not in fresh:
                del directory.children[name]
            elif directory.children[name].type == "dir":
                self._hide(directory.children[name])

    def _remove(self, parent: Node, name: bytes) -> None:
        removed = parent.children.pop(name)
        if removed.type in ("dir", "lnk"):
            self._parents.clear()
        if self._fresh is not None and parent in self._fresh:
            self._fresh[parent].discard(name)

    # --- paths ---

    def _directory(self, path: bytes) -> Node:
        """The directory that *path* names, links followed; missing ones are made."""
        found = self._parents.get(path)
        if found is None or self._fresh is not None:  # what is fresh is noted on the way
            found = self._walk(path, make=True)
            assert found is not None  # it was made
            self._parents[path] = found
        return found

    def _walk(self, path: bytes, make: bool) -> Node | None:
        names = path.split(b"/")[::-1] if path else []
        way = [self.root]
        links = 0
        while names:
            name = names.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                if len(way) == 1:
                    raise self._bad("a symbolic link among its parents leads out of the root")
                way.pop()
                continue
            child = way[-1].children.get(name)
            if child is None:
                if not make:
                    return None
                child = way[-1].children[name] = Node("dir", 0o755)
            elif child.type == "lnk":
                links += 1
                if links > _LINKS_MAX:
                    raise self._bad("too many symbolic links among its parents")
                if child.target.startswith(b"/"):
                    del way[1:]
                names += _cleaned(child.target)[::-1]
                continue
            elif child.type != "dir":
                raise self._bad(f"its parent {show(name)!r} is no directory")
            if make:
                self._note(way[-1], name)
            way.append(child)
        return way[-1]

    def _note(self, parent: Node, name: bytes) -> None:
        if self._fresh is not None:
            self._fresh.setdefault(parent, set()).add(name)

    def _bad(self, problem: str) -> CorruptImage:
        return CorruptImage(f"{self._layer.name}: {show(self._path)}: {problem}")


def _set_attributes(node: Node, source: Node) -> None:
    node.uid, node.gid, node.mtime = source.uid, source.gid, source.mtime
    if node.type != "lnk":
        node.mode = source.mode


def _cleaned(target: bytes) -> list[bytes]:
    """The names of a link's target; ``..`` undoes the name before it, as containerd reads targets."""
    names: list[bytes] = []
    for name in target.split(b"/"):
        if name == b".." and names and names[-1] != b"..":
            names.pop()
        elif name == b".." and target.startswith(b"/"):
            continue  # above the root there is the root, for a target that begins there
        elif name not in (b"", b"."):
            names.append(name)
    return names
