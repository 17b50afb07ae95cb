"""Tars of our own making: header by header, as nasty as wanted."""

from __future__ import annotations

from collections.abc import Iterable

END = bytes(1024)


def header(
    name: bytes,
    flag: bytes = b"0",
    size: int = 0,
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 1_600_000_000,
    target: bytes = b"",
    device: tuple[int, int] | None = None,
    prefix: bytes = b"",
    magic: bytes = b"ustar\x0000",
    patch: Iterable[tuple[int, bytes]] = (),
) -> bytes:
    """One header.

    Args:
        device: None leaves the fields blank, as GNU tar does for FIFOs.
        patch: Offset and bytes to overwrite before the checksum is made.
    """
    raw = bytearray(512)
    raw[: len(name)] = name
    for at, width, value in ((100, 8, mode), (108, 8, uid), (116, 8, gid), (124, 12, size), (136, 12, mtime)):
        raw[at : at + width] = number(value, width)
    raw[156:157] = flag
    raw[157 : 157 + len(target)] = target
    raw[257:265] = magic
    if device is not None:
        raw[329:337], raw[337:345] = number(device[0], 8), number(device[1], 8)
    raw[345 : 345 + len(prefix)] = prefix
    for at, data in patch:
        raw[at : at + len(data)] = data
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def number(value: int, width: int) -> bytes:
    """Octal where it fits, else base-256."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    raw = bytearray((value % (1 << 8 * width)).to_bytes(width, "big"))
    raw[0] |= 0x80
    return bytes(raw)


def padded(data: bytes) -> bytes:
    """*data* and zeros up to a whole block."""
    return data + bytes(-len(data) % 512)


def file(name: bytes, data: bytes, **fields: object) -> bytes:
    """Header and content of a regular file."""
    return header(name, b"0", len(data), **fields) + padded(data)  # type: ignore[arg-type]


def records(*pairs: tuple[bytes, bytes]) -> bytes:
    """The records of an extended header."""
    out = b""
    for key, value in pairs:
        body = b" " + key + b"=" + value + b"\n"
        length = len(body)
        while length != len(body) + len(str(length)):
            length = len(body) + len(str(length))
        out += b"%d" % length + body
    return out


def pax(*pairs: tuple[bytes, bytes], flag: bytes = b"x") -> bytes:
    """An extended header."""
    data = records(*pairs)
    return header(b"PaxHeaders/x", flag, len(data)) + padded(data)


def gnu_long(data: bytes, flag: bytes = b"L") -> bytes:
    """GNU tar's header for a name (or, with K, a target) that is too long."""
    raw = data + b"\0"
    return header(b"././@LongLink", flag, len(raw), magic=b"ustar  \0") + padded(raw)
