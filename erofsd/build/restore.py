"""An image's tree as one ordinary layer: a tar in pax format, in gzip. The same tree, the same bytes.

Names, targets and attributes are bytes; what is not ASCII goes into extended headers as it is. Every entry
stands behind its directory, a hard link behind the first name of its file.

Sources: POSIX.1-2017, pax, "pax Extended Header"; opencontainers/image-spec layer.md; Go archive/tar, which
containerd unpacks with, for what it takes: values may be binary, names of attributes hold neither = nor NUL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from erofsd.build import acl
from erofsd.build.compare import Item, entry_items
from erofsd.build.deflate import GzipWriter
from erofsd.build.expected import Expected, write_items
from erofsd.build.publish import GZIP_LAYER_TYPE, Stored
from erofsd.images.base import Entry, Tree

Warn = Callable[[str], None]

_BLOCK = 512
_NAME_MAX, _TARGET_MAX = 100, 100
_ID_MAX = 8**7 - 1
_SIZE_MAX = _TIME_MAX = 8**11 - 1
_TYPES = {"reg": b"0", "lnk": b"2", "chr": b"3", "blk": b"4", "dir": b"5", "fifo": b"6"}
_LINK = b"1"
_PAX = b"x"
_WHITEOUT = b".wh."


@dataclass(frozen=True, slots=True)
class RestoredLayer:
    """A layer made from an image.

    Attributes:
        diff_id: Digest of the tar.
        entries: Entries in it.
        expected: What must be in it.
    """

    stored: Stored
    diff_id: str
    entries: int
    expected: Expected | None


def restore_layer(
    tree: Tree,
    path: Path,
    threads: int,
    warn: Warn,
    tell: Callable[[int], None] = lambda size: None,
    *,
    expected: Path | None = None,
) -> RestoredLayer:
    """Write *tree* to *path*. Blocks.

    Args:
        warn: Told about what no layer can hold: it is left out.
        expected: Where to write what the layer is to be compared with, when *tree* is gone from memory.
        tell: Hears how many more bytes of content are done.

    Raises:
        CorruptImage, BlobCorrupt, SourceError: As the tree.
    """
    entries = 0
    digests: dict[int, bytes] = {}
    with path.open("wb") as file, GzipWriter(file, threads) as gzip:
        for entry, link in _tar_entries(tree, warn):
            entries += 1
            gzip.write(_headers(entry, link, warn))
            if entry.type == "reg" and link is None:
                hasher = blake3()
                for piece in tree.content(entry):
                    gzip.write(piece)
                    hasher.update(piece)
                    tell(len(piece))
                if expected is not None:
                    digests[entry.nid] = hasher.digest()
                gzip.write(bytes(-entry.size % _BLOCK))
        gzip.write(bytes(2 * _BLOCK))
    os.chmod(path, 0o644)
    stored = Stored(GZIP_LAYER_TYPE, gzip.digest, gzip.size, path)
    written = write_items(_restored_items(tree, digests), expected) if expected is not None else None
    return RestoredLayer(stored, gzip.content_digest, entries, written)


def _restored_items(tree: Tree, digests: Mapping[int, bytes]) -> Iterator[Item]:
    kept = (entry for entry, _ in _tar_entries(tree, lambda text: None))
    for item in entry_items(kept, lambda entry: digests.get(entry.nid, b"")):
        yield replace(item, xattrs={key: v for key, v in item.xattrs.items() if _can_be_named(key)})


def _tar_entries(tree: Tree, warn: Warn) -> Iterator[tuple[Entry, bytes | None]]:
    """Entries that a layer can hold, each with the name that it is a hard link to."""
    first: dict[int, bytes] = {}
    for entry in tree.walk():
        shown = entry.path.decode("utf-8", "backslashreplace")
        if entry.type == "sock":
            warn(f"{shown}: left out: a tar holds no sockets")
            continue
        if entry.path.rpartition(b"/")[2].startswith(_WHITEOUT):
            warn(f"{shown}: left out: in a layer this name means a deletion")
            continue
        link = None
        if entry.type != "dir" and entry.nlink > 1:
            name = first.setdefault(entry.nid, entry.path)
            link = name if name != entry.path else None
        yield entry, link


def _headers(entry: Entry, link: bytes | None, warn: Warn) -> bytes:
    """The header of *entry*, behind an extended one where it needs that."""
    name = entry.path.lstrip(b"/") or b"."
    if entry.type == "dir":
        name += b"/"
    target = (link.lstrip(b"/") if link is not None else entry.target) or b""
    seconds, nanoseconds = divmod(entry.mtime, 10**9)
    records: list[tuple[bytes, bytes]] = []
    if len(name) > _NAME_MAX or not name.isascii():
        records.append((b"path", name))
    if len(target) > _TARGET_MAX or not target.isascii():
        records.append((b"linkpath", target))
    size = entry.size if entry.type == "reg" and link is None else 0
    for key, value, limit in (
        (b"size", size, _SIZE_MAX),
        (b"uid", entry.uid, _ID_MAX),
        (b"gid", entry.gid, _ID_MAX),
    ):
        if value > limit:
            records.append((key, b"%d" % value))
    if nanoseconds or not 0 <= seconds <= _TIME_MAX:
        records.append((b"mtime", _seconds(entry.mtime)))
    if link is None:
        for key, attribute in sorted(entry.xattrs.items()):
            if not _can_be_named(key):
                shown = entry.path.decode("utf-8", "backslashreplace")
                warn(f"{shown}: attribute {key!r} left out: a layer cannot name it")
                continue
            records.append((b"SCHILY.xattr." + key, attribute))
            # GNU tar with --acls removes a directory's default list unless it finds one in text.
            if key in acl.KEYWORDS and (text := acl.format_acl(attribute)):
                records.append((acl.KEYWORDS[key], text))
    header = _header(
        name[:_NAME_MAX],
        _LINK if link is not None else _TYPES[entry.type],
        target[:_TARGET_MAX],
        mode=entry.mode,
        uid=min(entry.uid, _ID_MAX),
        gid=min(entry.gid, _ID_MAX),
        size=min(size, _SIZE_MAX),
        mtime=min(max(seconds, 0), _TIME_MAX),
        rdev=entry.rdev if entry.type in ("chr", "blk") else 0,
    )
    if not records:
        return header
    # libarchive and Python take values for UTF-8 unless they are told that they are not; others do not ask.
    if any(_is_binary(value) for _, value in records):
        records.insert(0, (b"hdrcharset", b"BINARY"))
    body = b"".join(_record(key, value) for key, value in records)
    pax = _header(b"PaxHeaders/" + name.rstrip(b"/")[-60:], _PAX, b"", mode=0o644, size=len(body))
    return pax + body + bytes(-len(body) % _BLOCK) + header


def _can_be_named(attribute: bytes) -> bool:
    return b"=" not in attribute and b"\0" not in attribute


def _is_binary(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return True
    return False


def _record(key: bytes, value: bytes) -> bytes:
    """``LENGTH KEY=VALUE\\n``, where the length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def _seconds(mtime: int) -> bytes:
    sign, mtime = ("-", -mtime) if mtime < 0 else ("", mtime)
    seconds, nanoseconds = divmod(mtime, 10**9)
    fraction = f".{nanoseconds:09d}".rstrip("0") if nanoseconds else ""
    return f"{sign}{seconds}{fraction}".encode()


def _header(
    name: bytes,
    type_: bytes,
    target: bytes,
    *,
    mode: int,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    mtime: int = 0,
    rdev: int = 0,
) -> bytes:
    raw = bytearray(_BLOCK)
    raw[: len(name)] = name
    raw[100:108] = b"%07o\0" % mode
    raw[108:116] = b"%07o\0" % uid
    raw[116:124] = b"%07o\0" % gid
    raw[124:136] = b"%011o\0" % size
    raw[136:148] = b"%011o\0" % mtime
    raw[148:156] = b" " * 8
    raw[156:157] = type_
    raw[157 : 157 + len(target)] = target
    raw[257:265] = b"ustar\x0000"
    raw[329:337] = b"%07o\0" % os.major(rdev)
    raw[337:345] = b"%07o\0" % os.minor(rdev)
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)
