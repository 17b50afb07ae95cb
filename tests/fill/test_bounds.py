"""Who gets memory first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from erofsd.blobs.store import Binding
from erofsd.fill.bounds import Budget
from erofsd.fill.flight import Flight
from erofsd.fill.plan import Run
from ondemand.ranges import Range


class Rider:
    """Something that wants memory, tells when it got it, and keeps it until told."""

    def __init__(self, budget: Budget, size: int, *, background: bool, source: object = None) -> None:
        binding = SimpleNamespace(source=source)
        self.flight = Flight(cast(Binding, binding), Run((0,), Range(0, 1)), background=background)
        self.has = False
        self._let_go = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(self._ride(budget, size))

    async def _ride(self, budget: Budget, size: int) -> None:
        async with budget.held(self.flight, size):
            self.has = True
            await self._let_go.wait()
        self.has = False

    async def let_go(self) -> None:
        self._let_go.set()
        await self.task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # a budget looks at clocks
            await asyncio.sleep(0.01)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_background_gets_half_and_readers_all() -> None:
    budget = Budget(100)
    first = Rider(budget, 50, background=True)
    second = Rider(budget, 1, background=True)
    reader = Rider(budget, 50, background=False)
    await settle()
    assert (first.has, second.has, reader.has) == (True, False, True)
    await first.let_go()
    await reader.let_go()
    await settle()
    assert second.has
    await second.let_go()


async def test_readers_are_served_before_the_background_that_came_first() -> None:
    budget = Budget(100)
    holder = Rider(budget, 100, background=False)
    await settle()
    background = Rider(budget, 40, background=True)
    reader = Rider(budget, 80, background=False)
    await holder.let_go()
    await settle()
    assert (background.has, reader.has) == (False, True)
    await reader.let_go()
    await settle()
    assert background.has
    await background.let_go()


async def test_what_a_reader_joins_is_hurried() -> None:
    budget = Budget(100)
    holder = Rider(budget, 60, background=False)
    await settle()
    background = Rider(budget, 40, background=True)
    await settle()
    assert not background.has
    background.flight.join()
    await settle()
    assert background.has
    await background.let_go()
    await holder.let_go()


async def test_what_is_larger_than_all_goes_alone() -> None:
    budget = Budget(100)
    small = Rider(budget, 1, background=False)
    await settle()
    large = Rider(budget, 1000, background=False)
    await settle()
    assert not large.has
    await small.let_go()
    await settle()
    assert large.has
    await large.let_go()


async def test_a_silent_source_holds_up_nobody_but_itself() -> None:
    budget = Budget(100)
    silent, other = object(), object()
    stuck = Rider(budget, 90, background=False, source=silent)
    await settle()
    second = Rider(budget, 90, background=False, source=silent)
    reader = Rider(budget, 90, background=False, source=other)
    await settle()
    assert not reader.has  # it has only just asked
    stuck.flight.began_at = stuck.flight.moved_at = time.monotonic() - 1
    await until(lambda: reader.has)
    assert not second.has
    await reader.let_go()
    await stuck.let_go()
    await settle()
    assert second.has
    await second.let_go()


async def test_silent_sources_together_do_not_hold_any_amount() -> None:
    budget = Budget(100)
    riders = [Rider(budget, 100, background=False, source=object()) for _ in range(6)]
    for count in range(1, 5):
        await until(lambda count=count: sum(rider.has for rider in riders) == count)
        for rider in riders:
            if rider.has:
                rider.flight.began_at = rider.flight.moved_at = time.monotonic() - 1
    await asyncio.sleep(0.6)  # longer than it takes to notice
    assert [rider.has for rider in riders] == [True] * 4 + [False] * 2
    for rider in riders:
        await rider.let_go()


@pytest.mark.parametrize("when", ["waiting", "granted", "holding"])
async def test_cancelled_at_any_time_it_gives_back(when: str) -> None:
    budget = Budget(100)
    holder = Rider(budget, 100, background=False)
    await settle()
    victim = Rider(budget, 100, background=False)
    await settle()
    if when == "waiting":
        victim.task.cancel()
    holder._let_go.set()
    if when == "granted":
        await asyncio.wait([holder.task])
        victim.task.cancel()
    elif when == "holding":
        await settle()
        assert victim.has
        victim.task.cancel()
    await settle()
    assert victim.task.cancelled()
    last = Rider(budget, 100, background=False)
    await settle()
    assert last.has
    await last.let_go()
