"""Tar headers: bytes to values, without I/O.

Python's tarfile takes pax values for text (values of xattrs are not) and refuses blank device numbers, which
GNU tar writes for FIFOs; so this reads the records itself. It accepts what Go's archive/tar accepts, which
is what containerd unpacks layers with, and the sparse files that Go leaves to others.

Sources: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar 1.34, src/tar.h and
doc "Storing Sparse Files"; libarchive tar(5); Go archive/tar, reader.go and strconv.go.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from erofsd.build import acl

BLOCK_SIZE = 512
#: Extended headers and long names are taken whole: what is larger is no header.
META_SIZE_MAX = 16 << 20
SPARSE_EXTENTS_MAX = 1 << 20

REGULAR_FLAGS = frozenset(b"0\x007")  # '7' is a contiguous file
TYPES = {
    ord("0"): "reg",
    0: "reg",
    ord("7"): "reg",
    ord("S"): "reg",
    ord("1"): "link",
    ord("2"): "lnk",
    ord("3"): "chr",
    ord("4"): "blk",
    ord("5"): "dir",
    ord("6"): "fifo",
}
PAX, PAX_GLOBAL, PAX_SOLARIS, LONG_NAME, LONG_TARGET, GNU_SPARSE, VOLUME_LABEL = b"xgXLKSV"

_USTAR, _GNU, _STAR, _V7 = range(4)
_SECONDS = re.compile(rb"(-?)([0-9]{1,18})(?:\.([0-9]*))?")
_INTEGER = re.compile(rb"-?[0-9]{1,20}")
_XATTR, _LIBARCHIVE_XATTR = b"SCHILY.xattr.", b"LIBARCHIVE.xattr."
_TEXT_KEYS = (b"path", b"linkpath", b"uname", b"gname")


class MalformedHeader(ValueError):
    """Bytes that are no tar header; says which field. Whoever reads the archive adds name and offset."""


@dataclass(slots=True)
class Header:
    """One header, with what extended headers before it said.

    Attributes:
        flag: Type flag, a byte.
        name, target: As stored; names are bytes.
        size: Stored bytes that follow, without padding.
        mtime: Nanoseconds since 1970.
        device: Major and minor number.
        xattrs: Full name to value.
        real_size: Of a sparse file; else None.
        extents: Of a sparse file: offset and length of data, as far as the headers say.
        map_in_data: The extents stand before the data (GNU sparse 1.0).
        map_continues: The extents go on in the blocks that follow (old GNU format).
    """

    flag: int
    name: bytes
    target: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    real_size: int | None = None
    extents: list[tuple[int, int]] = field(default_factory=list)
    map_in_data: bool = False
    map_continues: bool = False


def parse_header(block: bytes) -> Header | None:
    """Read a block of 512 bytes; None if it is all zeros, as at the end of an archive.

    Raises:
        MalformedHeader: It is none.
    """
    if not block.strip(b"\0"):
        return None
    _check_sum(block)
    kind = _kind(block)
    flag = block[156]
    name = _text(block[:100])
    if kind in (_USTAR, _STAR) and (prefix := _text(block[345 : 500 if kind == _USTAR else 476])):
        name = prefix + b"/" + name
    header = Header(
        flag=flag,
        name=name,
        target=_text(block[157:257]),
        mode=_number("mode", block[100:108]) & 0o7777,
        uid=_number("uid", block[108:116]),
        gid=_number("gid", block[116:124]),
        size=_number("size", block[124:136]),
        mtime=_number("mtime", block[136:148]) * 10**9,
    )
    if header.size < 0:
        raise MalformedHeader(f"size: {header.size}")
    if TYPES.get(flag) in ("chr", "blk") and kind != _V7:
        header.device = _number("devmajor", block[329:337]), _number("devminor", block[337:345])
    if flag == GNU_SPARSE:
        header.extents, ends = _old_sparse(block[386:482])
        header.map_continues = bool(block[482]) and not ends
        header.real_size = _number("realsize", block[483:495])
    return header


def parse_sparse_block(block: bytes) -> tuple[list[tuple[int, int]], bool]:
    """Extents from a continuation block of the old GNU format, and whether another follows.

    Raises:
        MalformedHeader: A number in it is none.
    """
    extents, ends = _old_sparse(block[:504])
    return extents, bool(block[504]) and not ends


def parse_pax(data: bytes) -> list[tuple[bytes, bytes]]:
    """The records of an extended header, in order.

    Raises:
        MalformedHeader: A record's length is wrong, or its key; names the offset in the header.
    """
    records = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        digits = data[at:space]
        if space < 0 or not digits.isdigit():
            if not data[at:].strip(b"\0"):  # some writers pad the size instead of the block
                break
            raise MalformedHeader(f"pax record at byte {at}: no length")
        end = at + int(digits)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end > len(data) or end <= space + 1 or data[end - 1] != 0x0A or not equals or not key:
            raise MalformedHeader(f"pax record at byte {at}: not of the form 'length key=value'")
        if b"\0" in (value if key in _TEXT_KEYS else key):
            raise MalformedHeader(f"pax record at byte {at}: {key.decode('latin-1')}: NUL in a name")
        records.append((key, value))
        at = end
    return records


def apply_pax(header: Header, records: Iterable[tuple[bytes, bytes]]) -> None:
    """Let the records of extended headers replace what *header* says; later ones win.

    An empty value takes back what an earlier record said, but for xattrs, whose values may be empty.

    Raises:
        MalformedHeader: A value that is none; names the key.
    """
    pax: dict[bytes, bytes] = {}
    acls: dict[bytes, bytes] = {}
    offsets: list[int] = []  # the keys of GNU sparse 0.0 repeat
    lengths: list[int] = []
    xattrs: dict[bytes, bytes] = {}
    others: dict[bytes, bytes] = {}
    for key, value in records:
        if key.startswith(_XATTR):
            xattrs[key[len(_XATTR) :]] = value
        elif key.startswith(_LIBARCHIVE_XATTR):
            others[unquote_to_bytes(key[len(_LIBARCHIVE_XATTR) :])] = _base64(key, value)
        elif key in acl.ATTRIBUTES:
            acls[key] = value
        elif key == b"GNU.sparse.offset":
            offsets.append(_decimal(key, value))
        elif key == b"GNU.sparse.numbytes":
            lengths.append(_decimal(key, value))
        elif value:
            pax[key] = value
        else:
            pax.pop(key, None)
    # GNU tar writes lists both ways, and in text it names users by this machine's names.
    acls = {key: text for key, text in acls.items() if acl.ATTRIBUTES[key] not in xattrs}
    header.xattrs = {**_acls(acls), **others, **xattrs}
    header.name = pax.get(b"path", header.name)
    header.target = pax.get(b"linkpath", header.target)
    for key in (b"uid", b"gid", b"size"):
        if key in pax:
            setattr(header, key.decode(), _decimal(key, pax[key]))
    if b"mtime" in pax:
        header.mtime = _nanoseconds(pax[b"mtime"])
    _apply_sparse(header, pax, offsets, lengths)


def parse_sparse_map(text: bytes) -> list[tuple[int, int]]:
    """Extents from the lines of a GNU sparse 1.0 map, the count of extents left out.

    Raises:
        MalformedHeader: A line is no number.
    """
    return _pairs(_decimal(b"sparse map", line) for line in text.split(b"\n")[:-1])


def check_extents(extents: list[tuple[int, int]], real_size: int, stored: int) -> list[tuple[int, int]]:
    """The data of a sparse file, checked, without empty extents.

    Raises:
        MalformedHeader: They overlap, go backwards, pass the end, or are not what is stored.
    """
    end = 0
    total = 0
    for offset, length in extents:
        if offset < end or length < 0 or offset + length > real_size:
            raise MalformedHeader(f"sparse map: {length} bytes at {offset} in a file of {real_size}")
        end = offset + length
        total += length
    if total != stored:
        raise MalformedHeader(f"sparse map: {total} bytes of data, {stored} are stored")
    return [extent for extent in extents if extent[1]]


# --- fields ---


def _check_sum(block: bytes) -> None:
    if len(block) != BLOCK_SIZE:
        raise MalformedHeader(f"{len(block)} bytes")
    stated = _number("checksum", block[148:156])
    unsigned = sum(block) - sum(block[148:156]) + 8 * 0x20
    if stated == unsigned:
        return
    # Old Sun tars summed signed bytes; POSIX asks readers to take both.
    high = sum(1 for byte in block[:148] + block[156:] if byte >= 0x80)
    if stated != unsigned - 256 * high:
        raise MalformedHeader(f"checksum: {stated:o} stated, {unsigned:o} counted")


def _kind(block: bytes) -> int:
    magic = block[257:265]
    if magic == b"ustar  \0":
        return _GNU
    if magic[:6] == b"ustar\0":
        return _STAR if block[508:512] == b"tar\0" else _USTAR
    return _V7


def _text(raw: bytes) -> bytes:
    return raw.partition(b"\0")[0]


def _number(what: str, raw: bytes) -> int:
    """Octal digits, or two's complement with the top bit as a mark (base-256)."""
    if raw[0] & 0x80:
        value = int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
        return value - (1 << 8 * len(raw) - 1) if raw[0] & 0x40 else value
    digits = _text(raw.strip(b" \0")).rstrip(b" ")
    if not digits:
        return 0
    try:
        if not digits.isdigit():
            raise ValueError
        return int(digits, 8)
    except ValueError:
        raise MalformedHeader(f"{what}: {raw!r} is no octal number") from None


def _decimal(key: bytes, value: bytes) -> int:
    if not _INTEGER.fullmatch(value):
        raise MalformedHeader(f"{key.decode('latin-1')}: {value[:40]!r} is no number")
    number = int(value)
    if number < 0 and key not in (b"uid", b"gid"):
        raise MalformedHeader(f"{key.decode('latin-1')}: {number}")
    return number


def _nanoseconds(value: bytes) -> int:
    match = _SECONDS.fullmatch(value)
    if match is None:
        raise MalformedHeader(f"mtime: {value[:40]!r} is no time")
    total = int(match[2]) * 10**9 + int((match[3] or b"").ljust(9, b"0")[:9])
    return -total if match[1] else total


def _base64(key: bytes, value: bytes) -> bytes:
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error:
        raise MalformedHeader(f"{key.decode('latin-1')}: no base64") from None


def _acls(texts: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Attributes from ACLs in text; what is not understood keeps its key, under which it is refused later."""
    attributes: dict[bytes, bytes] = {}
    for key, text in texts.items():
        value = acl.parse_acl(text)
        if value is None:
            attributes[key] = text
        elif value:
            attributes[acl.ATTRIBUTES[key]] = value
    return attributes


# --- sparse files ---


def _old_sparse(raw: bytes) -> tuple[list[tuple[int, int]], bool]:
    extents: list[tuple[int, int]] = []
    for at in range(0, len(raw) - 23, 24):
        if not raw[at]:
            return extents, True
        offset, length = raw[at : at + 12], raw[at + 12 : at + 24]
        extents.append((_number("sparse offset", offset), _number("sparse length", length)))
    return extents, False


def _apply_sparse(header: Header, pax: dict[bytes, bytes], offsets: list[int], lengths: list[int]) -> None:
    if header.flag not in REGULAR_FLAGS:
        return
    version = pax.get(b"GNU.sparse.major", b"0"), pax.get(b"GNU.sparse.minor", b"0")
    if version == (b"1", b"0"):
        header.map_in_data = True
    elif version[0] not in (b"0",):
        raise MalformedHeader(f"GNU sparse format {b'.'.join(version).decode('latin-1')} is unknown")
    elif b"GNU.sparse.map" in pax:
        header.extents = _pairs(_decimal(b"GNU.sparse.map", n) for n in pax[b"GNU.sparse.map"].split(b","))
    elif offsets or lengths:
        if len(offsets) != len(lengths):
            raise MalformedHeader(f"GNU.sparse: {len(offsets)} offsets, {len(lengths)} lengths")
        header.extents = list(zip(offsets, lengths, strict=True))
    elif b"GNU.sparse.numblocks" not in pax:
        return
    if b"GNU.sparse.name" in pax:
        header.name = pax[b"GNU.sparse.name"]
    size = pax.get(b"GNU.sparse.realsize" if header.map_in_data else b"GNU.sparse.size")
    size = size or pax.get(b"GNU.sparse.size") or pax.get(b"GNU.sparse.realsize")
    if size is None:
        raise MalformedHeader("GNU.sparse: a map, but no size")
    header.real_size = _decimal(b"GNU.sparse.size", size)


def _pairs(numbers: Iterator[int]) -> list[tuple[int, int]]:
    flat = list(numbers)
    if len(flat) % 2 or len(flat) > 2 * SPARSE_EXTENTS_MAX:
        raise MalformedHeader(f"sparse map: {len(flat)} numbers")
    return list(zip(flat[::2], flat[1::2], strict=True))
