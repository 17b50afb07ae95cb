"""The socket between keeper and worker."""

from __future__ import annotations

import asyncio
import os

import pytest

from erofsd.daemon import link


def test_a_descriptor_arrives_as_another_number_of_the_same_file() -> None:
    keeper, worker = link.pair()
    read, write = os.pipe()
    link.send(worker, "hold", "blob", fd=write)
    message = link.receive(keeper)
    assert (message.verb, message.name) == ("hold", "blob")
    assert message.fd is not None
    assert not os.get_inheritable(message.fd)
    os.write(message.fd, b"x")
    assert os.read(read, 1) == b"x"


def test_the_end_of_the_other_side_is_told() -> None:
    keeper, worker = link.pair()
    worker.close()
    with pytest.raises(link.LinkLost):
        link.receive(keeper)
    with pytest.raises(link.LinkLost):
        link.send(keeper, "stop")


async def test_hold_returns_when_the_keeper_holds() -> None:
    keeper, worker = link.pair()
    lost, stopped = asyncio.Event(), asyncio.Event()
    end = link.WorkerLink(worker, on_stop=stopped.set, on_lost=lost.set)
    read, _ = os.pipe()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(end.hold("a", read))
        second = group.create_task(end.hold("a", read))
        message = await asyncio.to_thread(link.receive, keeper)
        assert message.verb == "hold"
        assert not first.done()
        link.send(keeper, "held", "a")
        await first
        assert (await asyncio.to_thread(link.receive, keeper)).verb == "hold"
        link.send(keeper, "held", "a")
        await second
    link.send(keeper, "stop")
    await asyncio.wait_for(stopped.wait(), 5)
    keeper.close()
    await asyncio.wait_for(lost.wait(), 5)
