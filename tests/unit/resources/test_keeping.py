"""Room that is kept for one that has waited for long."""

from __future__ import annotations

import asyncio

import pytest

from runner import errors
from runner.request.model import Resources
from runner.resources.allocator import Allocation, Allocator

GIB = 1 << 30
MACHINE = Resources(cpus=4, ram_bytes=8 * GIB, hdd_bytes=100 * GIB)


async def waiting(
    machine: Allocator, ask: Resources, *, rank: float = 0.0, keeps: bool = True
) -> asyncio.Task[Allocation]:
    task = asyncio.create_task(machine.acquire(ask, rank=lambda: rank, timeout_secs=60, keeps=keeps))
    await asyncio.sleep(0)  # it waits now
    return task


async def test_what_becomes_free_is_kept_and_what_is_not_needed_is_granted():
    machine = Allocator(MACHINE, lambda: 100 * GIB)
    held = [machine.allocate(Resources(cpus=1)) for _ in range(3)]
    big = await waiting(machine, Resources(cpus=2, ram_bytes=4 * GIB))
    small = await waiting(machine, Resources(cpus=1), rank=-1, keeps=False)
    assert machine.room == Resources(cpus=0, ram_bytes=4 * GIB, hdd_bytes=100 * GIB)
    with pytest.raises(errors.NoCapacity, match="kept"):
        machine.allocate(Resources(cpus=1))
    held[0].release()
    assert (await big).amounts.cpus == 2
    assert not small.done()
    held[1].release()
    assert (await small).amounts.cpus == 1


async def test_a_wait_that_ends_gives_the_kept_room_to_others():
    told: list[Resources] = []
    machine = Allocator(MACHINE, lambda: 100 * GIB)
    machine.on_change(lambda: told.append(machine.room))
    machine.allocate(Resources(cpus=1))
    big = await waiting(machine, Resources(cpus=4))
    small = await waiting(machine, Resources(cpus=3), keeps=False)
    assert not small.done()
    assert told[-1].cpus == 0
    big.cancel()
    assert (await small).amounts.cpus == 3
    with pytest.raises(asyncio.CancelledError):
        await big


async def test_of_two_that_keep_room_the_lowest_rank_gets_it():
    machine = Allocator(MACHINE, lambda: 100 * GIB)
    held = machine.allocate(Resources(cpus=2))
    late = await waiting(machine, Resources(cpus=3), rank=2)
    early = await waiting(machine, Resources(cpus=4), rank=1)
    held.release()
    assert (await early).amounts.cpus == 4
    assert not late.done()
    early.result().release()
    assert (await late).amounts.cpus == 3


async def test_one_allocation_is_exchanged_for_another_before_anybody_else_gets_it():
    machine = Allocator(MACHINE, lambda: 100 * GIB)
    room = machine.allocate(Resources(cpus=4))
    small = await waiting(machine, Resources(cpus=2), rank=-1)
    assert machine.allocate(Resources(cpus=3), instead_of=room).amounts.cpus == 3
    assert not small.done()
    room.release()  # has been given up already
    assert machine.free.cpus == 1
    small.cancel()


async def test_an_exchange_that_fails_gives_up_the_first():
    machine = Allocator(MACHINE, lambda: 100 * GIB)
    room = machine.allocate(Resources(cpus=2))
    machine.allocate(Resources(cpus=1))
    small = await waiting(machine, Resources(cpus=2))
    with pytest.raises(errors.NoCapacity):
        machine.allocate(Resources(cpus=4), instead_of=room)
    assert (await small).amounts.cpus == 2


async def test_a_wait_ends_when_something_else_does():
    machine = Allocator(MACHINE, lambda: 100 * GIB)
    machine.allocate(Resources(cpus=4))
    news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    wait = asyncio.create_task(
        machine.acquire(Resources(cpus=1), rank=lambda: 0, timeout_secs=60, unless=news)
    )
    await asyncio.sleep(0)
    news.set_result(None)
    with pytest.raises(errors.NoCapacity):
        await wait
