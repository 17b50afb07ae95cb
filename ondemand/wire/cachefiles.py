"""struct cachefiles_msg and the text commands of /dev/cachefiles <-> dataclasses.

Requests come from the device as one binary message per read(), in native byte order; commands and the answer
to an OPEN go to it as text, one per write(). The answer to a READ is an ioctl and has no bytes.

Source: include/uapi/linux/cachefiles.h; fs/cachefiles/daemon.c, cachefiles_daemon_write;
fs/cachefiles/ondemand.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NewType, TypeAlias

from ondemand.errors import MalformedMessage

Buffer: TypeAlias = bytes | bytearray | memoryview

MsgId = NewType("MsgId", int)
"""Names a request until it is answered; given out cyclically from 0 to 2^32 - 1."""

ObjectId = NewType("ObjectId", int)
"""Names one opening of one object; another opening of the same object has another one."""

MSG_MAX_SIZE = 1024
"""Room for every message; a smaller buffer makes read() fail with EMSGSIZE, and the message stay."""

COMMAND_MAX_SIZE = 4095
POSITION_MAX = (1 << 63) - 1

HEADER = struct.Struct("=IIII")  # msg_id, opcode, len, object_id
OPEN = struct.Struct("=IIII")  # volume_key_size, cookie_key_size, fd, flags; then both keys
READ = struct.Struct("=QQ")  # off, len

NOT_OPEN = ObjectId(0xFFFFFFFF)
"""The object of a CLOSE that was queued before its last descriptor was closed (ondemand_id -1)."""


class Opcode(IntEnum):
    """enum cachefiles_opcode."""

    OPEN = 0
    CLOSE = 1
    READ = 2


# -- requests -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Open:
    """A mount looks an object up, and waits beyond SIGKILL until it is answered.

    Attributes:
        fd: Already open in the process that read this, not close-on-exec; ours to close.
        volume_key: Without the NUL that ends it on the wire.
        cookie_key: As it is.
    """

    msg_id: MsgId
    object_id: ObjectId
    fd: int
    volume_key: bytes
    cookie_key: bytes


@dataclass(frozen=True, slots=True)
class Read:
    """A reader waits for ``[offset, offset + length)`` of an object, in whole pages."""

    msg_id: MsgId
    object_id: ObjectId
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Close:
    """The object was let go of: close its descriptor. Wants no answer."""

    msg_id: MsgId
    object_id: ObjectId


Message: TypeAlias = Open | Read | Close


def parse(buf: Buffer) -> Message:
    """The one message that *buf* holds, all of it.

    Raises:
        MalformedMessage: Not exactly one message of a known kind and shape.
    """
    view = memoryview(buf)
    if len(view) < HEADER.size:
        raise MalformedMessage(f"a message has at least {HEADER.size} bytes, got {len(view)}")
    msg_id, opcode, length, object_id = HEADER.unpack_from(view)
    if length != len(view):
        raise MalformedMessage(f"a message of {len(view)} bytes says that it has {length}")
    payload = view[HEADER.size :]
    match opcode:
        case Opcode.OPEN:
            return _parse_open(MsgId(msg_id), ObjectId(object_id), payload)
        case Opcode.READ:
            return _parse_read(MsgId(msg_id), ObjectId(object_id), payload)
        case Opcode.CLOSE:
            if payload:
                raise MalformedMessage(f"CLOSE with {len(payload)} bytes of payload")
            return Close(MsgId(msg_id), ObjectId(object_id))
    raise MalformedMessage(f"opcode {opcode} in a message of {length} bytes")


def _parse_open(msg_id: MsgId, object_id: ObjectId, payload: memoryview) -> Open:
    if len(payload) < OPEN.size:
        raise MalformedMessage(f"OPEN with {len(payload)} bytes of payload")
    volume_key_size, cookie_key_size, fd, flags = OPEN.unpack_from(payload)
    keys = bytes(payload[OPEN.size :])
    if len(keys) != volume_key_size + cookie_key_size or flags or fd > 0x7FFFFFFF:
        raise MalformedMessage(
            f"OPEN with {len(keys)} bytes of keys, says {volume_key_size} + {cookie_key_size}; "
            f"descriptor {fd}, flags {flags:#x}"
        )
    volume_key, cookie_key = keys[:volume_key_size], keys[volume_key_size:]
    if not volume_key or volume_key.find(b"\0") != volume_key_size - 1:
        raise MalformedMessage(f"volume key {volume_key!r} does not end with its only NUL")
    return Open(msg_id, object_id, fd, volume_key[:-1], cookie_key)


def _parse_read(msg_id: MsgId, object_id: ObjectId, payload: memoryview) -> Read:
    if len(payload) != READ.size:
        raise MalformedMessage(f"READ with {len(payload)} bytes of payload")
    offset, length = READ.unpack(payload)
    if offset + length > POSITION_MAX:
        raise MalformedMessage(f"READ of {length} bytes at {offset}")
    return Read(msg_id, object_id, offset, length)


def encode(message: Message) -> bytes:
    """The bytes that a kernel would write for *message*."""
    match message:
        case Open(_, _, fd, volume_key, cookie_key):
            opcode = Opcode.OPEN
            sizes = OPEN.pack(len(volume_key) + 1, len(cookie_key), fd, 0)
            payload = sizes + volume_key + b"\0" + cookie_key
        case Read(_, _, offset, length):
            opcode, payload = Opcode.READ, READ.pack(offset, length)
        case Close():
            opcode, payload = Opcode.CLOSE, b""
    return HEADER.pack(message.msg_id, opcode, HEADER.size + len(payload), message.object_id) + payload


# -- commands -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dir:
    """Where the cache lies. Before `Bind`, mandatory."""

    path: bytes


@dataclass(frozen=True, slots=True)
class Tag:
    """The cache's name. Before `Bind`."""

    name: str


@dataclass(frozen=True, slots=True)
class Limit:
    """One of the six limits of free space: ``brun``, ``bcull``... ``fstop``. Before `Bind`."""

    name: str
    percent: int


@dataclass(frozen=True, slots=True)
class Bind:
    """Begin, in on-demand mode."""


@dataclass(frozen=True, slots=True)
class Copen:
    """The answer to an OPEN.

    Attributes:
        size: Of the object in bytes, or a negative errno down to -4095.
    """

    msg_id: MsgId
    size: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Offer every request again that a dead process has read and not answered."""


@dataclass(frozen=True, slots=True)
class Cull:
    """Delete the object called *name* in the writing thread's working directory."""

    name: bytes


@dataclass(frozen=True, slots=True)
class InUse:
    """Fail with EBUSY if the object called *name* in the writing thread's working directory is in use."""

    name: bytes


Command: TypeAlias = Dir | Tag | Limit | Bind | Copen | Restore | Cull | InUse

LIMITS = ("brun", "bcull", "bstop", "frun", "fcull", "fstop")
ERRNO_MAX = 4095
_SPACE = b" \t\n\v\f\r"


def encode_command(command: Command) -> bytes:
    """The text of *command*, for one write().

    Raises:
        ValueError: The kernel would take it for something else: a name with a line break, an errno that is
            none. A `Copen` like that would fail its OPEN.
    """
    match command:
        case Dir(path):
            text = b"dir " + _argument(path)
        case Tag(name):
            text = b"tag " + _argument(name.encode())
        case Limit(name, percent):
            if name not in LIMITS or not 0 <= percent < 100:
                raise ValueError(f"limit {name} of {percent}%")
            text = b"%s %d%%" % (name.encode(), percent)
        case Bind():
            text = b"bind ondemand"
        case Copen(msg_id, size):
            if not 0 <= msg_id < 1 << 32 or not -ERRNO_MAX <= size <= POSITION_MAX:
                raise ValueError(f"answer {size} to OPEN {msg_id}")
            text = b"copen %d,%d" % (msg_id, size)  # no padding: a leading zero means octal
        case Restore():
            text = b"restore"
        case Cull(name):
            text = b"cull " + _file_name(name)
        case InUse(name):
            text = b"inuse " + _file_name(name)
    if len(text) > COMMAND_MAX_SIZE:
        raise ValueError(f"a command of {len(text)} bytes")
    return text


def _argument(text: bytes) -> bytes:
    # Leading blanks are skipped, a line break ends the command.
    if not text or text[:1] in (bytes([c]) for c in _SPACE) or b"\n" in text or b"\0" in text:
        raise ValueError(f"{text!r} cannot be said to the device")
    return text


def _file_name(name: bytes) -> bytes:
    if b"/" in name:
        raise ValueError(f"{name!r} is no file name")
    return _argument(name)


def parse_command(buf: Buffer) -> Command:
    """What the kernel understands of a command that `encode_command` wrote.

    Raises:
        MalformedMessage: Nobody here writes that.
    """
    text = bytes(buf)
    word, _, argument = text.partition(b" ")
    try:
        command = _command(word.decode("ascii", "replace"), argument)
        if encode_command(command) == text:
            return command
    except ValueError:
        pass
    raise MalformedMessage(f"command {text!r}")


def _command(word: str, argument: bytes) -> Command:
    match word:
        case "dir":
            return Dir(argument)
        case "tag":
            return Tag(argument.decode())
        case "bind":
            return Bind()
        case "copen":
            msg_id, _, size = argument.partition(b",")
            return Copen(MsgId(int(msg_id)), int(size))
        case "restore":
            return Restore()
        case "cull":
            return Cull(argument)
        case "inuse":
            return InUse(argument)
        case _:
            return Limit(word, int(argument.removesuffix(b"%")))


# -- names --------------------------------------------------------------------------------------------------

PLAIN_KEY_MAX = 200
ENCODED_KEY_MAX = 189

_PLAIN = frozenset(range(33, 128)) - {ord("/")}


def is_servable(cookie_key: bytes) -> bool:
    """True if the object has a cache file of its own.

    A cache file is named after the key: ``D`` and the key itself if that is a plain file name, else an
    encoding of it that takes four bytes for three. The kernel keeps the length of that name in eight bits: a
    longer one is cut modulo 256, and the objects that then share a file read each other's bytes. Keys that
    differ only in NULs at their end may be encoded alike.

    Source: fs/cachefiles/key.c, cachefiles_cook_key ("need to cut the cooked key into 252 char lengths (189
    raw bytes)"); struct cachefiles_object, d_name_len.
    """
    longest = PLAIN_KEY_MAX if _PLAIN.issuperset(cookie_key) else ENCODED_KEY_MAX
    return 0 < len(cookie_key) <= longest and b"\0" not in cookie_key


def file_name(cookie_key: bytes) -> bytes | None:
    """The name of the object's cache file; None if the key is not a plain file name."""
    return b"D" + cookie_key if _PLAIN.issuperset(cookie_key) and is_servable(cookie_key) else None


def directory_name(volume_key: bytes) -> bytes:
    """The name of a volume's directory. Source: fs/cachefiles/volume.c, cachefiles_acquire_volume."""
    return b"I" + volume_key
