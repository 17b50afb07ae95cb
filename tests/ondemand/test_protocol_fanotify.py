"""Who may be answered when: against a model of the kernel's list of waiting events."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from ondemand.errors import AnswerMisuse
from ondemand.protocol.fanotify import FanotifyProtocol, Identity, Request, Slot, narrow
from ondemand.provider import ObjectKey
from ondemand.ranges import Range
from ondemand.wire.fanotify import EventFd, PreAccess

PAGE = 4096
SIZE = 10 * PAGE
FIRST, SECOND = ObjectKey(b"first"), ObjectKey(b"second")
IDENTITIES: dict[ObjectKey, Identity] = {FIRST: (1, 10), SECOND: (1, 20)}


def event(fd: int, offset: int = 0, count: int = PAGE) -> PreAccess:
    return PreAccess(EventFd(fd), 77, offset, count)


@pytest.fixture
def protocol() -> FanotifyProtocol:
    protocol = FanotifyProtocol()
    for key, identity in IDENTITIES.items():
        protocol.guard(key, identity, SIZE)
    return protocol


def test_an_event_needs_its_range_of_its_file(protocol: FanotifyProtocol) -> None:
    request = protocol.admit(event(5, PAGE, 3 * PAGE), Slot(0), IDENTITIES[SECOND])
    assert request.needs == ((SECOND, Range.of(PAGE, 3 * PAGE)),)
    assert not request.refused
    assert protocol.settle(request, 0) == [request]
    assert request.verdict == 0
    assert not list(protocol.owed())


def test_a_range_is_cut_off_at_the_end_of_the_file(protocol: FanotifyProtocol) -> None:
    across = protocol.admit(event(5, SIZE - PAGE, 32 * PAGE), Slot(0), IDENTITIES[FIRST])
    assert across.needs == ((FIRST, Range(SIZE - PAGE, SIZE)),)
    beyond = protocol.admit(event(6, SIZE, PAGE), Slot(1), IDENTITIES[FIRST])
    assert beyond.needs == ()
    assert not beyond.refused


@pytest.mark.parametrize("identity", [*IDENTITIES.values(), (9, 9)])
def test_an_event_without_bytes_needs_nothing(protocol: FanotifyProtocol, identity: Identity) -> None:
    request = protocol.admit(event(5, SIZE, 0), Slot(0), identity)
    assert request.needs == ()
    assert not request.refused


def test_an_event_of_an_unknown_file_is_refused(protocol: FanotifyProtocol) -> None:
    assert protocol.admit(event(5), Slot(0), (9, 9)).refused


def test_an_event_of_a_file_that_was_just_completed_is_allowed(protocol: FanotifyProtocol) -> None:
    protocol.unguard(FIRST)
    late = protocol.admit(event(5), Slot(0), IDENTITIES[FIRST])
    assert late.needs == ()
    assert not late.refused
    assert protocol.guarded(FIRST) is None
    protocol.guard(SECOND, IDENTITIES[SECOND], SIZE)


def test_a_file_that_is_vouched_for_is_allowed_and_can_be_guarded_again() -> None:
    fresh = FanotifyProtocol()
    assert fresh.admit(event(3), Slot(0), IDENTITIES[FIRST]).refused
    fresh.vouch(IDENTITIES[FIRST])
    assert not fresh.admit(event(4), Slot(1), IDENTITIES[FIRST]).refused
    fresh.guard(FIRST, IDENTITIES[FIRST], SIZE)
    assert fresh.admit(event(5), Slot(2), IDENTITIES[FIRST]).needs


def test_a_released_inode_number_may_come_back_as_another_file(protocol: FanotifyProtocol) -> None:
    protocol.unguard(FIRST)
    third = ObjectKey(b"third")
    protocol.guard(third, IDENTITIES[FIRST], SIZE)
    assert protocol.admit(event(5), Slot(0), IDENTITIES[FIRST]).needs == ((third, Range(0, PAGE)),)


def test_guarding_twice_is_once_and_never_something_else(protocol: FanotifyProtocol) -> None:
    protocol.guard(FIRST, IDENTITIES[FIRST], SIZE)
    for key, identity, size in [(FIRST, (1, 30), SIZE), (SECOND, (1, 10), SIZE), (FIRST, (1, 10), PAGE)]:
        with pytest.raises(ValueError, match="contradicts"):
            protocol.guard(key, identity, size)
    protocol.unguard(FIRST)
    with pytest.raises(KeyError):
        protocol.unguard(FIRST)


def test_settling_twice_is_a_bug(protocol: FanotifyProtocol) -> None:
    request = protocol.admit(event(5), Slot(0), IDENTITIES[FIRST])
    protocol.settle(request, 0)
    with pytest.raises(AnswerMisuse):
        protocol.settle(request, 0)


def test_what_is_owed_outlives_the_guard(protocol: FanotifyProtocol) -> None:
    request = protocol.admit(event(5), Slot(0), IDENTITIES[FIRST])
    protocol.unguard(FIRST)
    assert list(protocol.owed()) == [request]
    assert protocol.settle(request, 0) == [request]


def test_a_stale_event_of_an_unknown_file_needs_every_guarded_one(protocol: FanotifyProtocol) -> None:
    protocol.guard(ObjectKey(b"short"), (1, 30), PAGE)
    stale = protocol.admit_stale(event(5, PAGE, PAGE), Slot(0))
    protocol.resolve(stale, event(5, PAGE, PAGE), None)
    assert stale.needs == ((FIRST, Range.of(PAGE, PAGE)), (SECOND, Range.of(PAGE, PAGE)))
    assert not stale.refused


def test_a_stale_event_is_refused_where_nothing_is_guarded() -> None:
    protocol = FanotifyProtocol()
    stale = protocol.admit_stale(event(5), Slot(0))
    assert stale.refused
    protocol.resolve(stale, event(5), None)
    assert stale.refused


def test_a_stale_number_stays_taken_until_it_is_answered(protocol: FanotifyProtocol) -> None:
    stale = protocol.admit_stale(event(5), Slot(0))
    fresh = protocol.admit(event(6), Slot(1), IDENTITIES[FIRST])
    assert protocol.stale_numbers() == {5}
    protocol.settle(fresh, 0)
    protocol.settle(stale, 0)
    assert protocol.stale_numbers() == set()


def test_events_of_one_number_are_released_together(protocol: FanotifyProtocol) -> None:
    stale = protocol.admit_stale(event(5), Slot(0))
    protocol.resolve(stale, event(5), IDENTITIES[FIRST])
    fresh = protocol.admit(event(5, PAGE, PAGE), Slot(1), IDENTITIES[SECOND])
    assert protocol.settle(fresh, 0) == []
    assert protocol.settle(stale, 0) == [stale, fresh]


@pytest.mark.parametrize("order", [(0, errno.ENOSPC), (errno.ENOSPC, 0)])
def test_if_one_of_a_number_fails_all_are_denied(protocol: FanotifyProtocol, order: tuple[int, int]) -> None:
    both = [protocol.admit_stale(event(5), Slot(n)) for n in range(2)]
    assert protocol.settle(both[0], order[0]) == []
    assert protocol.settle(both[1], order[1]) == both
    assert [request.verdict for request in both] == [errno.ENOSPC] * 2


def test_only_errnos_that_a_denial_can_carry() -> None:
    accepted = {"EPERM", "EIO", "EBUSY", "ETXTBSY", "EAGAIN", "ENOSPC", "EDQUOT"}
    for number, name in errno.errorcode.items():
        assert errno.errorcode[narrow(number)] in accepted
        if name in accepted:
            assert narrow(number) == number
    assert narrow(errno.EACCES) == errno.EPERM
    assert narrow(errno.ETIMEDOUT) == narrow(0) == narrow(-5) == narrow(1 << 20) == errno.EIO


@dataclass(eq=False)
class Reader:
    """One event as the kernel sees it."""

    fd: int
    filled: bool = False
    verdict: int | None = None


@dataclass(eq=False)
class Served:
    """One event as the worker sees it."""

    reader: Reader
    request: Request
    event: PreAccess


@dataclass
class Kernel:
    """Matches answers by number, the oldest first, as fanotify does."""

    waiting: list[Reader] = field(default_factory=list)

    def answer(self, fd: int, verdict: int) -> bool:
        for reader in self.waiting:
            if reader.fd == fd:
                self.waiting.remove(reader)
                reader.verdict = verdict
                return True
        return False


class Workers(RuleBasedStateMachine):
    """Workers that are killed at any moment, and whose numbers may collide."""

    served = Bundle("served")

    def __init__(self) -> None:
        super().__init__()
        self.kernel = Kernel()
        self.journal: dict[int, tuple[Reader, PreAccess]] = {}
        self.slots = 0
        self.alive: list[Served] = []
        self.new_worker()

    def new_worker(self) -> None:
        self.protocol = FanotifyProtocol()
        for key, identity in IDENTITIES.items():
            self.protocol.guard(key, identity, SIZE)
        self.open_fds: set[int] = set()

    @rule(target=served, fd=st.integers(3, 5), key=st.sampled_from([FIRST, SECOND]))
    def read(self, fd: int, key: ObjectKey) -> Served:
        return self.event(fd, key)

    def event(self, fd: int, key: ObjectKey) -> Served:
        """The kernel gives any number that this process has no descriptor at; a stale one too."""
        while fd in self.open_fds:
            fd += 1
        self.open_fds.add(fd)
        reader = Reader(fd)
        self.kernel.waiting.append(reader)
        self.slots += 1
        self.journal[self.slots] = (reader, event(fd))
        request = self.protocol.admit(event(fd), Slot(self.slots), IDENTITIES[key])
        self.alive.append(Served(reader, request, event(fd)))
        return self.alive[-1]

    @rule(
        one=consumes(served), error=st.sampled_from([0, 0, 0, errno.EIO, errno.ENOENT]), clears=st.booleans()
    )
    def settle(self, one: Served, error: int, clears: bool) -> None:
        """Fill or fail; where *clears* is false the worker is killed between the answer and the clearing."""
        if one not in self.alive or one.request.verdict is not None:
            return  # its worker is dead, or it waits for others of its number
        one.reader.filled |= not error
        released = self.protocol.settle(one.request, error)
        fresh = [request for request in released if not request.stale]
        found = [self.kernel.answer(request.fd, request.verdict or 0) for request in released]
        assert sum(found) >= len(fresh), "a reader waits whose answer went nowhere"
        self.open_fds -= {request.fd for request in fresh}
        self.alive = [served for served in self.alive if served.request not in released]
        if released and not clears:
            self.kill(False)
        else:
            for request in released:
                del self.journal[request.slot]

    @precondition(lambda self: self.journal)
    @rule(identified=st.booleans())
    def kill(self, identified: bool) -> None:
        """The successor finds what is in the journal."""
        self.new_worker()
        self.alive = []
        for slot, (reader, noted) in self.journal.items():
            request = self.protocol.admit_stale(noted, Slot(slot))
            self.protocol.resolve(request, noted, IDENTITIES[FIRST] if identified else None)
            self.alive.append(Served(reader, request, noted))

    @rule(target=served, number=st.integers(0, 20))
    def take_up(self, number: int) -> Served:
        """Any event of the present worker, stale ones too, may be settled next."""
        if not self.alive:
            return self.event(3, FIRST)
        return self.alive[number % len(self.alive)]

    @invariant()
    def nobody_reads_what_is_not_there(self) -> None:
        for reader, _ in self.journal.values():
            assert reader.verdict != 0 or reader.filled

    @invariant()
    def whoever_waits_is_in_the_journal_and_owed(self) -> None:
        noted = {id(reader) for reader, _ in self.journal.values()}
        assert {id(reader) for reader in self.kernel.waiting} <= noted
        unsettled = {id(request) for request in self.protocol.owed()}
        for one in self.alive:
            assert one.request.verdict is not None or id(one.request) in unsettled

    def teardown(self) -> None:
        for one in list(self.alive):
            if one.request.verdict is None:
                self.settle(one, 0, True)
        assert not self.kernel.waiting, "a reader waits for ever"
        assert not list(self.protocol.owed())


TestWorkers = Workers.TestCase
