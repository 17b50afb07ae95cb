"""The books of /dev/cachefiles: which objects are open, what is owed, what is void."""

from __future__ import annotations

import errno

import pytest
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from ondemand.errors import AnswerMisuse, MalformedMessage
from ondemand.protocol import cachefiles as protocol
from ondemand.protocol.cachefiles import CachefilesProtocol, Object, Request, SizeChanged, State
from ondemand.provider import ObjectKey
from ondemand.ranges import Range
from ondemand.wire.cachefiles import Close, MsgId, ObjectId, Open, Read

KEY = ObjectKey(b"blob", b"erofs,img")


def open_message(msg_id: int = 0, object_id: int = 1, key: ObjectKey = KEY) -> Open:
    return Open(MsgId(msg_id), ObjectId(object_id), 9, key.volume, key.cookie)


def read_message(msg_id: int, object_id: int = 1, offset: int = 0, length: int = 4096) -> Read:
    return Read(MsgId(msg_id), ObjectId(object_id), offset, length)


def close_message(object_id: int = 1) -> Close:
    return Close(MsgId(77), ObjectId(object_id))


def opened(books: CachefilesProtocol, msg_id: int = 0, object_id: int = 1, size: int = 8192) -> Object:
    opening, _ = books.admit_open(open_message(msg_id, object_id))
    books.opened(opening, size)
    return opening


def test_an_object_goes_through_its_states() -> None:
    books = CachefilesProtocol()
    about, ended = books.admit_open(open_message())
    assert (about.state, ended, books.owed()) == (State.OPENING, None, [about])
    books.opened(about, 8192)
    assert (about.state, about.size, books.owed()) == (State.OPEN, 8192, [])
    request = books.admit_read(read_message(1))
    assert (about.state, books.owed()) == (State.READING, [request])
    assert books.settle(request)
    assert (about.state, books.owed()) == (State.OPEN, [])
    assert books.admit_close(close_message()) is about
    assert about.state is State.CLOSING
    assert list(books.objects()) == []


def test_a_refused_object_is_gone_and_can_be_opened_again() -> None:
    books = CachefilesProtocol()
    about, _ = books.admit_open(open_message())
    books.refused(about)
    assert (about.state, books.owed_count) == (State.CLOSING, 0)
    assert opened(books, msg_id=1, object_id=2).state is State.OPEN


def test_every_answer_is_given_once() -> None:
    books = CachefilesProtocol()
    about = opened(books)
    request = books.admit_read(read_message(1))
    assert books.settle(request)
    with pytest.raises(AnswerMisuse):
        books.settle(request)
    for again in (lambda: books.opened(about, 8192), lambda: books.refused(about)):
        with pytest.raises(AnswerMisuse):
            again()


def test_the_size_of_a_key_never_changes() -> None:
    books = CachefilesProtocol()
    opened(books, size=8192)
    books.admit_close(close_message())
    again, _ = books.admit_open(open_message(1, 2))
    with pytest.raises(SizeChanged) as changed:
        books.opened(again, 8193)
    assert changed.value.errno == errno.ESTALE
    assert again.state is State.OPENING
    books.opened(again, 8192)
    assert books.size_of(KEY) == 8192


def test_sizes_of_open_keys_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SIZES_MAX", 3)
    books = CachefilesProtocol()
    opened(books)
    for n in range(1, 9):
        opening, _ = books.admit_open(open_message(n, n + 1, ObjectKey(b"%d" % n, b"v")))
        books.opened(opening, n)
        books.admit_close(close_message(n + 1))
    assert books.size_of(KEY) == 8192
    assert [n for n in range(1, 9) if books.size_of(ObjectKey(b"%d" % n, b"v"))] == [7, 8]


@pytest.mark.parametrize(
    ("offset", "length", "want"),
    [(0, 4096, Range(0, 4096)), (100, 1, Range(0, 4096)), (4096, 0, Range(4096, 4096))],
)
def test_what_is_wanted_is_whole_blocks(offset: int, length: int, want: Range) -> None:
    books = CachefilesProtocol()
    opened(books)
    assert books.admit_read(read_message(1, 1, offset, length)).want == want


def test_reads_of_what_is_not_open_are_not_understood() -> None:
    books = CachefilesProtocol()
    with pytest.raises(MalformedMessage):
        books.admit_read(read_message(0))
    books.admit_open(open_message())
    with pytest.raises(MalformedMessage):
        books.admit_read(read_message(1))
    with pytest.raises(MalformedMessage):
        books.admit_open(open_message(2, 1, ObjectKey(b"other", b"v")))


def test_a_close_makes_what_is_owed_void() -> None:
    books = CachefilesProtocol()
    about = opened(books)
    requests = [books.admit_read(read_message(n)) for n in (1, 2)]
    assert books.admit_close(close_message()) is about
    assert about.reads == set(requests)
    assert books.owed() == []
    assert [books.settle(request) for request in requests] == [False, False]


def test_a_close_of_something_unknown_means_nothing() -> None:
    books = CachefilesProtocol()
    about = opened(books)
    assert books.admit_close(close_message(0xFFFFFFFF)) is None
    assert books.admit_close(close_message(5)) is None
    assert about.state is State.OPEN


def test_an_id_that_comes_again_makes_the_older_request_void() -> None:
    books = CachefilesProtocol()
    opened(books)
    older = books.admit_read(read_message(1))
    newer = books.admit_read(read_message(1, offset=4096))
    assert books.owed() == [newer]
    assert not books.settle(older)
    assert books.settle(newer)


def test_opening_a_key_again_ends_the_older_object() -> None:
    books = CachefilesProtocol()
    older = opened(books)
    request = books.admit_read(read_message(1))
    newer, ended = books.admit_open(open_message(2, 2))
    assert (ended, older.state) == (older, State.CLOSING)
    assert not books.settle(request)
    books.opened(newer, 8192)
    assert list(books.objects()) == [newer]


@pytest.mark.parametrize(
    ("opened_at", "asked_at", "stale"),
    [(5, 6, False), (5, 4, True), (0xFFFFFFFF, 0, False), (0, 0xFFFFFFFF, True), (3, 3 + (1 << 30), False)],
)
def test_a_read_older_than_its_opening_is_stale(opened_at: int, asked_at: int, stale: bool) -> None:
    books = CachefilesProtocol()
    opened(books, msg_id=opened_at)
    assert books.admit_read(read_message(asked_at)).stale == stale


def test_a_lost_object_is_regained_with_the_size_it_had() -> None:
    books = CachefilesProtocol()
    about, _ = books.admit_open(open_message())
    assert books.adopted(about, 12288) == 12288
    assert about.state is State.LOST
    books.admit_read(read_message(1))
    assert about.state is State.LOST
    books.regained(about, 9000)
    assert (about.state, about.size, books.size_of(KEY)) == (State.READING, 9000, 9000)
    books.regained(about, 9000)
    with pytest.raises(SizeChanged):
        books.regained(about, 9001)


def test_a_lost_object_whose_size_was_known_keeps_it() -> None:
    books = CachefilesProtocol()
    opened(books, size=9000)
    about, _ = books.admit_open(open_message(1, 2))
    assert books.adopted(about, 12288) == 9000


@pytest.mark.parametrize(("cookie", "servable"), [(b"x" * 200, True), (b"x" * 201, False), (b"", False)])
def test_keys_without_a_file_of_their_own_are_told(cookie: bytes, servable: bool) -> None:
    about, _ = CachefilesProtocol().admit_open(open_message(key=ObjectKey(cookie, b"v")))
    assert about.is_servable == servable


class Device(RuleBasedStateMachine):
    """A kernel that opens, reads and closes at will, and its own idea of what is owed."""

    openings = Bundle("openings")
    reads = Bundle("reads")

    def __init__(self) -> None:
        super().__init__()
        self.books = CachefilesProtocol()
        self.next_id = 0
        self.open: dict[ObjectKey, Object] = {}
        self.owed: set[Object | Request] = set()
        self.void: set[Request] = set()
        self.sizes: dict[ObjectKey, int] = {}

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    def end(self, ended: Object) -> None:
        gone = {owed for owed in self.owed if owed is ended or getattr(owed, "object", None) is ended}
        self.owed -= gone
        self.void |= {owed for owed in gone if isinstance(owed, Request)}
        del self.open[ended.key]

    @rule(target=openings, name=st.sampled_from([b"a", b"b", b"c"]))
    def ask_open(self, name: bytes) -> Object:
        key = ObjectKey(name, b"v")
        about, ended = self.books.admit_open(open_message(self.new_id(), self.new_id(), key))
        assert ended is self.open.get(key)
        if ended is not None:
            self.end(ended)
        self.open[key] = about
        self.owed.add(about)
        return about

    @rule(about=openings, size=st.integers(1, 3))
    def answer_open(self, about: Object, size: int) -> None:
        assume(about in self.owed)
        try:
            self.books.opened(about, size)
        except SizeChanged:
            assert self.sizes[about.key] != size
            self.books.refused(about)
            del self.open[about.key]
        else:
            assert self.sizes.setdefault(about.key, size) == size
        self.owed.remove(about)

    @rule(about=openings)
    def adopt(self, about: Object) -> None:
        assume(about in self.owed)
        assert self.books.adopted(about, 4096) == self.sizes.get(about.key, 4096)
        self.owed.remove(about)

    @rule(target=reads, about=openings)
    def ask_read(self, about: Object) -> Request:
        assume(self.open.get(about.key) is about and about not in self.owed)
        request = self.books.admit_read(read_message(self.new_id(), about.object_id))
        self.owed.add(request)
        return request

    @rule(target=reads, older=reads)
    def ask_again(self, older: Request) -> Request:
        about = older.object
        assume(older in self.owed and self.open.get(about.key) is about)
        request = self.books.admit_read(read_message(older.msg_id, about.object_id, 4096))
        self.owed.remove(older)
        self.void.add(older)
        self.owed.add(request)
        return request

    @rule(request=consumes(reads))
    def answer_read(self, request: Request) -> None:
        if request not in self.owed and request not in self.void:
            with pytest.raises(AnswerMisuse):
                self.books.settle(request)
            return
        assert self.books.settle(request) == (request in self.owed)
        self.owed.discard(request)
        self.void.discard(request)

    @rule(about=openings)
    def close(self, about: Object) -> None:
        known = self.open.get(about.key) is about
        assert self.books.admit_close(close_message(about.object_id)) is (about if known else None)
        if known:
            self.end(about)

    @invariant()
    def the_books_are_right(self) -> None:
        assert set(self.books.owed()) == self.owed
        assert self.books.owed_count == len(self.owed)
        assert set(self.books.objects()) == set(self.open.values())
        for about in self.open.values():
            assert (about.state is State.OPENING) == (about in self.owed)
            assert about.state is not State.CLOSING


TestDevice = Device.TestCase
