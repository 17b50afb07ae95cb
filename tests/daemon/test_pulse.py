"""When a silent worker is given up."""

from __future__ import annotations

from erofsd.daemon.pulse import Due, Pulse


def looks(pulse: Pulse, *times: float) -> list[Due]:
    return [pulse.look(now) for now in times]


def test_a_worker_that_answers_is_asked_again_and_again() -> None:
    pulse = Pulse(30, now=0)
    for now in range(0, 300, 10):
        assert pulse.look(now) is Due.ASK
        pulse.answered()


def test_a_silent_worker_is_told_to_abort_when_patience_ends_and_killed_after_that() -> None:
    pulse = Pulse(30, now=0)
    assert looks(pulse, 0, 10, 20, 30, 40) == [Due.ASK, Due.NOTHING, Due.NOTHING, Due.ABORT, Due.KILL]


def test_nothing_is_due_between_looks() -> None:
    pulse = Pulse(30, now=0)
    pulse.look(0)
    assert pulse.wait_s(3) == 7
    assert looks(pulse, 3, 9.9) == [Due.NOTHING, Due.NOTHING]
    assert pulse.wait_s(12) == 0


def test_a_keeper_that_was_stopped_itself_does_not_blame_the_worker() -> None:
    pulse = Pulse(30, now=0)
    assert looks(pulse, 0, 10, 1000, 1001) == [Due.ASK, Due.NOTHING, Due.NOTHING, Due.NOTHING]
    pulse.answered()
    assert pulse.look(1010) is Due.ASK
