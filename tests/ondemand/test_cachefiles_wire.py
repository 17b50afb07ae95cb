"""Messages and commands of /dev/cachefiles, byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondemand.errors import MalformedMessage
from ondemand.wire import cachefiles as wire
from ondemand.wire.cachefiles import Close, Copen, MsgId, ObjectId, Open, Read

# Seen on Linux 6.12.117 and 6.1.192: a mount with fsid=img1, its first READ, and its CLOSE.
SEEN = {
    bytes.fromhex("00000000000000002f00000001000000")
    + bytes.fromhex("0b000000040000000700000000000000")
    + b"erofs,img1\0img1": Open(MsgId(0), ObjectId(1), 7, b"erofs,img1", b"img1"),
    bytes.fromhex("01000000020000002000000001000000")
    + bytes.fromhex("00000000000000000010000000000000"): Read(MsgId(1), ObjectId(1), 0, 4096),
    bytes.fromhex("05000000010000001000000001000000"): Close(MsgId(5), ObjectId(1)),
}

ids = st.integers(0, 0xFFFFFFFF)
keys = st.binary(max_size=220)
messages = st.one_of(
    st.builds(
        Open,
        ids,
        ids,
        st.integers(0, 0x7FFFFFFF),
        st.binary(max_size=200).map(lambda key: key.replace(b"\0", b"x")),
        keys,
    ),
    st.builds(Read, ids, ids, st.integers(0, 1 << 62), st.integers(0, (1 << 62) - 1)),
    st.builds(Close, ids, ids),
)


@pytest.mark.parametrize(("buf", "message"), SEEN.items(), ids=lambda value: type(value).__name__)
def test_bytes_that_kernels_sent_are_understood(buf: bytes, message: wire.Message) -> None:
    assert wire.parse(buf) == message
    assert wire.encode(message) == buf


@given(messages)
def test_what_is_encoded_is_parsed(message: wire.Message) -> None:
    buf = wire.encode(message)
    assert len(buf) <= wire.MSG_MAX_SIZE
    assert wire.parse(buf) == message
    assert wire.parse(memoryview(bytearray(buf))) == message


@given(st.one_of(st.binary(max_size=80), messages.map(wire.encode)), st.binary(max_size=3), st.integers(0, 8))
def test_any_bytes_parse_or_are_refused(buf: bytes, more: bytes, cut: int) -> None:
    buf = buf[: len(buf) - cut] + more
    try:
        message = wire.parse(buf)
    except MalformedMessage:
        return
    assert wire.encode(message) == buf


@pytest.mark.parametrize(
    "buf",
    [
        b"",
        wire.HEADER.pack(0, 3, 16, 1),
        wire.HEADER.pack(0, 1, 17, 1) + b"x",
        wire.HEADER.pack(0, 2, 24, 1) + bytes(8),
        wire.HEADER.pack(0, 2, 32, 1) + wire.READ.pack(1 << 63, 4096),
        wire.HEADER.pack(0, 0, 20, 1) + bytes(4),
        wire.HEADER.pack(0, 0, 36, 1) + wire.OPEN.pack(2, 2, 7, 1) + b"v\0cc",
        wire.HEADER.pack(0, 0, 36, 1) + wire.OPEN.pack(3, 1, 7, 0) + b"vvvc",
        wire.HEADER.pack(0, 0, 36, 1) + wire.OPEN.pack(3, 1, 7, 0) + b"v\0\0c",
        wire.HEADER.pack(0, 0, 36, 1) + wire.OPEN.pack(0, 4, 7, 0) + b"cccc",
        wire.HEADER.pack(0, 0, 36, 1) + wire.OPEN.pack(2, 2, 0xFFFFFFFF, 0) + b"v\0cc",
    ],
)
def test_what_is_not_understood_is_refused(buf: bytes) -> None:
    with pytest.raises(MalformedMessage):
        wire.parse(buf)


COMMANDS = {
    wire.Dir(b"/var/lib/a b"): b"dir /var/lib/a b",
    wire.Tag("erofsd"): b"tag erofsd",
    wire.Limit("brun", 7): b"brun 7%",
    wire.Limit("fstop", 0): b"fstop 0%",
    wire.Bind(): b"bind ondemand",
    Copen(MsgId(0), 8192): b"copen 0,8192",
    Copen(MsgId(0xFFFFFFFF), (1 << 63) - 1): b"copen 4294967295,9223372036854775807",
    Copen(MsgId(3), -2): b"copen 3,-2",
    wire.Restore(): b"restore",
    wire.Cull(b"Dname"): b"cull Dname",
    wire.InUse(b"Dname"): b"inuse Dname",
}


@pytest.mark.parametrize(("command", "text"), COMMANDS.items())
def test_commands_read_as_the_kernel_wants_them(command: wire.Command, text: bytes) -> None:
    assert wire.encode_command(command) == text
    assert wire.parse_command(text) == command


@pytest.mark.parametrize(
    "command",
    [
        wire.Dir(b""),
        wire.Dir(b" /leading"),
        wire.Dir(b"/line\nbreak"),
        wire.Dir(b"/" + b"x" * 4096),
        wire.Tag("a\0b"),
        wire.Limit("brun", 100),
        wire.Limit("run", 7),
        Copen(MsgId(1), -4096),
        Copen(MsgId(1), 1 << 63),
        Copen(MsgId(1 << 32), 0),
        wire.Cull(b"a/b"),
        wire.InUse(b""),
    ],
    ids=lambda command: type(command).__name__,
)
def test_commands_that_the_kernel_would_misunderstand_are_not_written(command: wire.Command) -> None:
    with pytest.raises(ValueError):
        wire.encode_command(command)


@given(st.binary(max_size=40))
def test_any_text_is_a_command_or_refused(text: bytes) -> None:
    try:
        command = wire.parse_command(text)
    except MalformedMessage:
        return
    assert wire.encode_command(command) == text


@pytest.mark.parametrize("text", [b"copen 1", b"copen 1, 2", b"copen 01,2", b"brun 7", b"bind", b"unbind"])
def test_commands_that_nobody_writes_are_refused(text: bytes) -> None:
    with pytest.raises(MalformedMessage):
        wire.parse_command(text)


@pytest.mark.parametrize(
    ("key", "servable"),
    [
        (b"", False),
        (b"a", True),
        (b"x" * 200, True),
        (b"x" * 201, False),
        (b"sha256:" + b"0" * 64, True),
        (b"a b" + b"x" * 186, True),
        (b"a b" + b"x" * 187, False),
        (b"a/b" + b"x" * 186, True),
        (b"a/b" + b"x" * 187, False),
        (b"\xff" * 189, True),
        (b"\xff" * 190, False),
        (b"a\0", False),
    ],
)
def test_only_keys_with_a_file_of_their_own_are_served(key: bytes, servable: bool) -> None:
    assert wire.is_servable(key) == servable


def cooked(key: bytes) -> bytes:
    """The file name of *key*, as fs/cachefiles/key.c makes it, without the cut."""
    if all(33 <= c <= 46 or 48 <= c <= 127 for c in key):
        return b"D" + key
    padded = key + bytes(-len(key) % 4)
    words = [padded[i : i + 4] for i in range(0, len(padded), 4)]
    big = [b"%x" % n if (n := int.from_bytes(word, "big")) else b"" for word in words]
    little = [b"%x" % n if (n := int.from_bytes(word, "little")) else b"" for word in words]
    nbe, nle = (sum(1 + len(digits) for digits in each) for each in (big, little))
    if min(nbe, nle) < 2 + -(-len(key) // 3) * 4:
        return b"S" + b",".join(big) if nbe <= nle else b"T" + b",".join(little)
    charmap = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-"
    name = b"E%d" % (-len(key) % 3)
    for i in range(0, len(key), 3):
        acc = int.from_bytes(key[i : i + 3], "little")
        name += bytes(charmap[acc >> shift & 63] for shift in (0, 6, 12, 18))
    return name


@given(
    st.one_of(st.binary(max_size=210), st.text(st.characters(codec="ascii"), max_size=210).map(str.encode))
)
def test_file_names_of_servable_keys_fit_into_eight_bits(key: bytes) -> None:
    if wire.is_servable(key):
        assert len(cooked(key)) <= 255
        assert wire.file_name(key) in (None, cooked(key))
        assert (wire.file_name(key) is None) == (cooked(key)[:1] != b"D")
    else:
        assert wire.file_name(key) is None


@given(st.lists(st.binary(min_size=1, max_size=6).filter(wire.is_servable), unique=True, max_size=40))
def test_servable_keys_have_different_file_names(keys: list[bytes]) -> None:
    assert len({cooked(key) for key in keys}) == len(keys)
