"""Access control lists: as archives write them, text; and what they are as extended attributes.

Sources: star's extended headers SCHILY.acl.access and SCHILY.acl.default, as libarchive and GNU tar write
them; acl(5), "TEXT FORMS"; Linux include/uapi/linux/posix_acl_xattr.h.
"""

from __future__ import annotations

import re
import struct

ATTRIBUTES = {
    b"SCHILY.acl.access": b"system.posix_acl_access",
    b"SCHILY.acl.default": b"system.posix_acl_default",
}
KEYWORDS = {attribute: keyword for keyword, attribute in ATTRIBUTES.items()}
_VERSION = 2
_NO_ID = 0xFFFFFFFF
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_OWN_TAGS = {"user": 0x01, "group": 0x04, "mask": 0x10, "other": 0x20}
_NAMED_TAGS = {"user": 0x02, "group": 0x08}
_OWN_NAMES = {tag: name for name, tag in _OWN_TAGS.items()}
_NAMED_NAMES = {tag: name for name, tag in _NAMED_TAGS.items()}
_RULE = re.compile(
    r"(?:d(?:efault)?:)?(?P<tag>u(?:ser)?|g(?:roup)?|m(?:ask)?|o(?:ther)?):(?:(?P<name>[^:]*):)?"
    r"(?P<mode>[r-][w-][x-])(?::(?P<id>[0-9]+))?\s*(?:#.*)?"
)
_TAGS = {"u": "user", "g": "group", "m": "mask", "o": "other"}


def parse_acl(text: bytes) -> bytes | None:
    """The value of the attribute; empty where the text says no more than a mode does.

    Returns:
        None if *text* is not understood, or names somebody without a number: names mean nothing elsewhere.
    """
    entries: set[tuple[int, int, int]] = set()
    for line in re.split("[,\n]", text.decode("utf-8", "replace")):
        if not line.strip():
            continue
        rule = _RULE.fullmatch(line.strip())
        if rule is None:
            return None
        tag, name = _TAGS[rule["tag"][0]], rule["name"]
        mode = sum(bit for letter, bit in zip(rule["mode"], (4, 2, 1), strict=True) if letter != "-")
        if not name:
            entries.add((_OWN_TAGS[tag], _NO_ID, mode))
            continue
        number = rule["id"] or name
        if tag not in _NAMED_TAGS or not number.isdecimal() or int(number) >= _NO_ID:
            return None
        entries.add((_NAMED_TAGS[tag], int(number), mode))
    if len(entries) <= 3 and all(tag in (0x01, 0x04, 0x20) for tag, _, _ in entries):
        return b""
    # The kernel wants them by tag, and by number within.
    return _HEADER.pack(_VERSION) + b"".join(
        _ENTRY.pack(tag, mode, number) for tag, number, mode in sorted(entries)
    )


def format_acl(value: bytes) -> bytes:
    """The text of an attribute, with numbers for names; empty where the kernel would not take it."""
    if len(value) < _HEADER.size or (len(value) - _HEADER.size) % _ENTRY.size:
        return b""
    if _HEADER.unpack_from(value) != (_VERSION,):
        return b""
    rules = []
    for tag, mode, number in _ENTRY.iter_unpack(value[_HEADER.size :]):
        if mode > 7:
            return b""
        letters = "".join(letter if mode & bit else "-" for letter, bit in zip("rwx", (4, 2, 1), strict=True))
        if tag in _OWN_NAMES:
            rules.append(f"{_OWN_NAMES[tag]}::{letters}")
        elif tag in _NAMED_NAMES:
            rules.append(f"{_NAMED_NAMES[tag]}:{number}:{letters}")
        else:
            return b""
    return ",".join(rules).encode()
