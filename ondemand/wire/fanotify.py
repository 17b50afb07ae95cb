"""fanotify's event metadata, info records and responses <-> dataclasses.

Source: include/uapi/linux/fanotify.h, structs fanotify_event_metadata, fanotify_event_info_header,
fanotify_event_info_range and fanotify_response. All of it is in native byte order.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NewType, TypeAlias

from ondemand.errors import MalformedMessage

Buffer: TypeAlias = bytes | bytearray | memoryview

EventFd = NewType("EventFd", int)
"""The number of an event's descriptor: the only thing by which the kernel matches answers to events."""

FANOTIFY_METADATA_VERSION = 3
FAN_PRE_ACCESS = 0x00100000
FAN_Q_OVERFLOW = 0x00004000
FAN_NOFD = -1
FAN_EVENT_INFO_TYPE_RANGE = 6
FAN_ALLOW = 0x01
FAN_DENY = 0x02

METADATA = struct.Struct("=IBBHQii")  # event_len, vers, reserved, metadata_len, mask, fd, pid
INFO_HEADER = struct.Struct("=BBH")  # info_type, pad, len
RANGE = struct.Struct("=BBHIQQ")  # the header, pad, offset, count
RESPONSE = struct.Struct("=iI")  # fd, response

EVENT_SIZE = METADATA.size + RANGE.size
"""Bytes of an event in a group that asked for nothing but the range: 48."""


@dataclass(frozen=True, slots=True)
class PreAccess:
    """Somebody is about to read ``[offset, offset + count)`` of a marked file, and waits.

    Attributes:
        fd: An open descriptor of the file in the process that read the event; ours to close.
        pid: The reader's process (thread group), 0 if it is not visible from here.
        count: May be 0, and may reach past the end of the file.
    """

    fd: EventFd
    pid: int
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class Overflow:
    """The queue was full: an event was dropped, and its reader let go with zeros. Wants no answer."""


Message: TypeAlias = PreAccess | Overflow


@dataclass(frozen=True, slots=True)
class Response:
    """The answer to one event.

    Attributes:
        errno: 0 to allow; else what a direct reader of the file sees. A reader behind EROFS sees EIO.
    """

    fd: EventFd
    errno: int


def parse(buf: Buffer) -> Message:
    """The one event that *buf* holds, all of it.

    Raises:
        MalformedMessage: Not exactly one event, of a version, a kind or a shape that is not known here.
    """
    view = memoryview(buf)
    if len(view) < METADATA.size:
        raise MalformedMessage(f"an event has at least {METADATA.size} bytes, got {len(view)}")
    event_len, version, reserved, metadata_len, mask, fd, pid = METADATA.unpack_from(view)
    if (event_len, version, reserved, metadata_len) != (
        len(view),
        FANOTIFY_METADATA_VERSION,
        0,
        METADATA.size,
    ):
        raise MalformedMessage(
            f"event of version {version}: {len(view)} bytes, says {event_len} with {metadata_len} of metadata"
        )
    if mask == FAN_PRE_ACCESS:
        if fd < 0:
            raise MalformedMessage(f"event without a descriptor: {fd}")
        offset, count = _parse_range(view[METADATA.size :])
        return PreAccess(EventFd(fd), pid, offset, count)
    if mask == FAN_Q_OVERFLOW and (fd, pid) == (FAN_NOFD, 0) and event_len == METADATA.size:
        return Overflow()
    raise MalformedMessage(f"event mask {mask:#x} with descriptor {fd}, {event_len} bytes")


def _parse_range(records: memoryview) -> tuple[int, int]:
    found: tuple[int, int] | None = None
    while records:
        if len(records) < INFO_HEADER.size:
            raise MalformedMessage(f"{len(records)} bytes after the last info record")
        kind, _, length = INFO_HEADER.unpack_from(records)
        if not INFO_HEADER.size <= length <= len(records):
            raise MalformedMessage(f"info record {kind} of {length} bytes where {len(records)} are left")
        if kind == FAN_EVENT_INFO_TYPE_RANGE:
            if length != RANGE.size or found is not None:
                raise MalformedMessage(f"range record of {length} bytes, or a second one")
            *_, offset, count = RANGE.unpack_from(records)
            found = (offset, count)
        records = records[length:]  # other records may come first: their own lengths lead past them
    if found is None:
        raise MalformedMessage("event without a range record")
    return found


def encode(message: Message) -> bytes:
    """The bytes that a kernel would write for *message*."""
    match message:
        case PreAccess(fd, pid, offset, count):
            return METADATA.pack(
                EVENT_SIZE, FANOTIFY_METADATA_VERSION, 0, METADATA.size, FAN_PRE_ACCESS, fd, pid
            ) + RANGE.pack(FAN_EVENT_INFO_TYPE_RANGE, 0, RANGE.size, 0, offset, count)
        case Overflow():
            return METADATA.pack(
                METADATA.size, FANOTIFY_METADATA_VERSION, 0, METADATA.size, FAN_Q_OVERFLOW, FAN_NOFD, 0
            )


def encode_response(response: Response) -> bytes:
    """Eight bytes for one write: the kernel looks at no more than one answer per call.

    The errno sits in the top byte of a denial (FAN_DENY_ERRNO); which ones the kernel takes is
    `ondemand.protocol.fanotify.narrow`'s business.
    """
    verdict = FAN_DENY | response.errno << 24 if response.errno else FAN_ALLOW
    return RESPONSE.pack(response.fd, verdict)


def parse_response(buf: Buffer) -> Response:
    """What the kernel understands of an answer.

    Raises:
        MalformedMessage: Not eight bytes, neither allow nor deny, or a bare denial, which we never send.
    """
    if len(memoryview(buf)) != RESPONSE.size:
        raise MalformedMessage(f"an answer is {RESPONSE.size} bytes, got {len(memoryview(buf))}")
    fd, verdict = RESPONSE.unpack(buf)
    error = verdict >> 24
    if verdict != (FAN_DENY | error << 24 if error else FAN_ALLOW):
        raise MalformedMessage(f"answer {verdict:#x}")
    return Response(EventFd(fd), error)
