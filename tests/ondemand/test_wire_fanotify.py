"""fanotify's records as bytes."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondemand import syscalls
from ondemand.errors import MalformedMessage
from ondemand.wire import fanotify as wire

# Read from a group on Linux 6.18.44, x86_64: 16 pages from page 64 of a file, for process 21685.
SEEN = bytes.fromhex(
    "30000000 03 00 1800 0000100000000000 07000000 b5540000"
    "06 00 1800 00000000 0000040000000000 0000010000000000"
)
OVERFLOWED = bytes.fromhex("18000000 03 00 1800 0040000000000000 ffffffff 00000000")

events = st.builds(
    wire.PreAccess,
    st.integers(0, (1 << 31) - 1).map(wire.EventFd),
    st.integers(0, (1 << 31) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
)


def test_constants_are_those_of_the_header() -> None:
    assert wire.FAN_PRE_ACCESS == syscalls.FAN_PRE_ACCESS


def test_an_event_as_the_kernel_writes_it() -> None:
    assert wire.parse(SEEN) == wire.PreAccess(wire.EventFd(7), 21685, 64 * 4096, 16 * 4096)
    assert len(SEEN) == wire.EVENT_SIZE


def test_the_overflow_record() -> None:
    assert wire.parse(OVERFLOWED) == wire.Overflow()
    assert wire.encode(wire.Overflow()) == OVERFLOWED


@given(events)
def test_events_survive_the_wire(event: wire.PreAccess) -> None:
    assert wire.parse(wire.encode(event)) == event


@given(st.binary(max_size=96))
def test_any_bytes_parse_or_are_refused(buf: bytes) -> None:
    try:
        message = wire.parse(buf)
    except MalformedMessage:
        return
    assert wire.parse(wire.encode(message)) == message


@given(st.data())
def test_a_changed_byte_is_refused_or_changes_the_message(data: st.DataObject) -> None:
    buf = bytearray(SEEN)
    at = data.draw(st.integers(0, len(buf) - 1))
    buf[at] ^= data.draw(st.integers(1, 255))
    try:
        message = wire.parse(buf)
    except MalformedMessage:
        return
    assert message != wire.parse(SEEN) or at in {25, 28, 29, 30, 31}  # padding


@given(st.lists(st.tuples(st.sampled_from([1, 4, 5, 77]), st.binary(max_size=20)), max_size=3))
def test_other_records_are_stepped_over_by_their_length(others: list[tuple[int, bytes]]) -> None:
    records = b"".join(struct.pack("=BBH", kind, 0, 4 + len(body)) + body for kind, body in others)
    buf = bytearray(SEEN[:24] + records + SEEN[24:])
    struct.pack_into("=I", buf, 0, len(buf))
    assert wire.parse(buf) == wire.parse(SEEN)


def changed(offset: int, value: bytes) -> bytes:
    return SEEN[:offset] + value + SEEN[offset + len(value) :]


@pytest.mark.parametrize(
    "buf",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(SEEN[:23], id="cut in the metadata"),
        pytest.param(SEEN[:47], id="cut in the range"),
        pytest.param(SEEN + SEEN, id="two events"),
        pytest.param(changed(4, b"\x04"), id="another version"),
        pytest.param(changed(6, b"\x20"), id="longer metadata"),
        pytest.param(changed(8, b"\x01"), id="another event as well"),
        pytest.param(changed(16, b"\xff\xff\xff\xff"), id="no descriptor"),
        pytest.param(changed(24, b"\x04"), id="no range"),
        pytest.param(changed(26, b"\x00\x00"), id="record without length"),
        pytest.param(changed(26, b"\x19\x00"), id="record longer than the event"),
        pytest.param(changed(0, b"\x18")[:24], id="metadata only"),
    ],
)
def test_what_is_not_understood_is_refused(buf: bytes) -> None:
    with pytest.raises(MalformedMessage):
        wire.parse(buf)


def test_answers_as_the_kernel_reads_them() -> None:
    assert wire.encode_response(wire.Response(wire.EventFd(25), 0)) == bytes.fromhex("19000000 01000000")
    denied = wire.Response(wire.EventFd(25), errno.EIO)
    assert wire.encode_response(denied) == bytes.fromhex("19000000 02000005")


@given(st.integers(0, 1 << 20).map(wire.EventFd), st.integers(0, 255))
def test_answers_survive_the_wire(fd: wire.EventFd, error: int) -> None:
    response = wire.Response(fd, error)
    assert wire.parse_response(wire.encode_response(response)) == response


@pytest.mark.parametrize("verdict", [0, 2, 3, 4, 5 << 24 | 1, 5 << 24])
def test_an_answer_that_is_neither_allow_nor_deny_with_errno_is_refused(verdict: int) -> None:
    with pytest.raises(MalformedMessage):
        wire.parse_response(struct.pack("=iI", 5, verdict))
