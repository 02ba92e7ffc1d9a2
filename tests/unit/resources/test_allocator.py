from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runner import errors
from runner.request.model import Resources
from runner.resources.allocator import Allocation, Allocator

GIB = 1 << 30
MACHINE = Resources(cpus=4, ram_bytes=8 * GIB, hdd_bytes=100 * GIB)


def allocator(disk_free: int = 100 * GIB) -> Allocator:
    return Allocator(MACHINE, lambda: disk_free)


def test_what_is_granted_is_missing_until_it_is_released_once():
    machine = allocator()
    first = machine.allocate(Resources(cpus=3, ram_bytes=GIB))
    assert machine.free == Resources(cpus=1, ram_bytes=7 * GIB, hdd_bytes=100 * GIB)
    first.release()
    first.release()
    assert machine.free == MACHINE


def test_what_has_ended_keeps_its_disk_only():
    machine = allocator()
    over = machine.allocate(Resources(cpus=4, ram_bytes=8 * GIB, hdd_bytes=60 * GIB))
    heard: list[int] = []
    machine.on_change(lambda: heard.append(machine.free.cpus))
    over.keep_disk()
    assert heard == [4]
    assert machine.free == Resources(cpus=4, ram_bytes=8 * GIB, hdd_bytes=40 * GIB)
    with pytest.raises(errors.NoCapacity, match="disk"):  # it will be there again, so no other host is meant
        machine.allocate(Resources(hdd_bytes=50 * GIB))
    over.keep_disk()
    over.release()
    over.release()
    over.keep_disk()
    assert machine.free == MACHINE


def test_too_little_of_one_thing_takes_nothing_of_the_others():
    machine = allocator()
    machine.allocate(Resources(cpus=1, ram_bytes=8 * GIB))
    with pytest.raises(errors.NoCapacity, match="memory"):
        machine.allocate(Resources(cpus=1, ram_bytes=1))
    assert machine.free.cpus == 3


@pytest.mark.parametrize(
    "ask",
    [Resources(cpus=5), Resources(ram_bytes=9 * GIB), Resources(hdd_bytes=101 * GIB), Resources(gpus=1)],
)
def test_more_than_the_machine_has_never_fits(ask):
    with pytest.raises(errors.NeverFits):
        allocator().allocate(ask)


def test_disk_that_is_short_is_not_now_while_something_runs_and_for_other_hosts_when_nothing_does():
    machine = allocator(disk_free=GIB)
    held = machine.allocate(Resources())
    with pytest.raises(errors.NoCapacity, match="disk"):
        machine.allocate(Resources(hdd_bytes=2 * GIB))
    held.release()
    with pytest.raises(errors.NeverFits, match="disk"):
        machine.allocate(Resources(hdd_bytes=2 * GIB))


def test_gpu_memory_without_gpus_asks_for_no_gpu():
    assert allocator().allocate(Resources(cpus=1, gpu_mem_bytes=GIB, gpu_count=1)).gpus == ()


def test_a_request_for_no_core_gets_one():
    assert allocator().allocate(Resources()).amounts.cpus == 1


async def test_waiters_are_served_lowest_rank_first_and_looked_past_when_they_do_not_fit():
    machine = allocator()
    held = [machine.allocate(Resources(cpus=1)) for _ in range(4)]
    order: list[str] = []

    async def wait(name: str, cpus: int, rank: float) -> Allocation:
        granted = await machine.acquire(Resources(cpus=cpus), rank=lambda: rank, timeout_secs=30)
        order.append(name)
        return granted

    tasks = [
        asyncio.create_task(wait(*each)) for each in (("late", 1, 5.0), ("big", 4, 0.0), ("early", 1, 1.0))
    ]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    held[0].release()
    await asyncio.wait({tasks[2]})
    held[1].release()
    await asyncio.wait({tasks[0]})
    assert order == ["early", "late"]
    for allocation in [*held[2:], tasks[0].result(), tasks[2].result()]:
        allocation.release()
    assert (await tasks[1]).amounts.cpus == 4


async def test_a_wait_that_is_cancelled_or_times_out_leaks_nothing():
    machine = allocator()
    everything = machine.allocate(Resources(cpus=4))
    with pytest.raises(errors.NoCapacity):
        await machine.acquire(Resources(cpus=1), rank=lambda: 0, timeout_secs=0.01)
    waiting = asyncio.create_task(machine.acquire(Resources(cpus=1), rank=lambda: 0, timeout_secs=30))
    await asyncio.sleep(0)
    everything.release()  # grants it in the same moment in which the wait is cancelled
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert machine.free == MACHINE


class Promises(RuleBasedStateMachine):
    """Whatever is asked and released, nothing is promised twice, nothing leaks, and what fits is granted."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = allocator()
        self.held: list[Allocation] = []

    @rule(cpus=st.integers(0, 6), ram=st.integers(0, 9), hdd=st.integers(0, 110))
    def ask(self, cpus: int, ram: int, hdd: int) -> None:
        free = self.machine.free
        wanted = Resources(cpus=cpus, ram_bytes=ram * GIB, hdd_bytes=hdd * GIB)
        fits = max(1, cpus) <= free.cpus and ram * GIB <= free.ram_bytes and hdd * GIB <= free.hdd_bytes
        try:
            self.held.append(self.machine.allocate(wanted))
        except (errors.NoCapacity, errors.NeverFits):
            assert not fits
        else:
            assert fits

    @rule(index=st.integers(0, 1000), times=st.integers(1, 3))
    def release(self, index: int, times: int) -> None:
        if self.held:
            allocation = self.held.pop(index % len(self.held))
            for _ in range(times):
                allocation.release()

    @invariant()
    def nothing_twice(self) -> None:
        assert sum(each.amounts.cpus for each in self.held) + self.machine.free.cpus == MACHINE.cpus
        assert (
            sum(each.amounts.ram_bytes for each in self.held) + self.machine.free.ram_bytes
            == MACHINE.ram_bytes
        )
        assert sum(each.amounts.hdd_bytes for each in self.held) <= MACHINE.hdd_bytes


TestPromises = Promises.TestCase
TestPromises.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)
