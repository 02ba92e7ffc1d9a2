"""Who is woken by what."""

from __future__ import annotations

import asyncio

import pytest

from runner.daemon import gates
from runner.daemon.gates import Gates
from runner.daemon.queuestate import Asking, QueueState
from runner.queues.base import QueueRef
from runner.queues.memory import MemoryBackend
from runner.request.model import Resources

ONE, TWO = Resources(cpus=1), Resources(cpus=2)
LIMIT_SECS = 30.0


class Machine:
    """What the gates ask; counts the questions."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.shut = False
        self.asked = 0
        self.gates = Gates(shut=lambda: self.shut, lacks=self.lacks)

    def lacks(self, asking: Asking) -> bool:
        self.asked += 1
        return self.room < (asking.ask.cpus if asking.ask else 1)


def queue(number: int, ask: Resources | None = None) -> QueueState:
    state = QueueState(ref=QueueRef(account="a", name=f"rmq_{number}"), backend=MemoryBackend())
    if ask is not None:
        state.remember(ask)
    state.holding = number  # its rank
    return state


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_change_that_leaves_room_wakes_nobody_who_listens_and_asks_once_for_all():
    machine = Machine(2)
    wish: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    listening = [asyncio.create_task(machine.gates.closing(queue(number), wish)) for number in range(100)]
    await turns()
    for machine.room in (1, 2, 1):
        machine.asked = 0
        machine.gates.notify()
        machine.gates.notify()
        await turns()
        assert machine.asked == 1
    assert not any(task.done() for task in listening)
    wish.set_result(None)
    assert await asyncio.gather(*listening) == [False] * 100


async def test_those_without_room_are_closed_after_a_while(monkeypatch):
    monkeypatch.setattr(gates, "LINGER_SECS", 0.05)
    machine = Machine(1)
    wish: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    large = asyncio.create_task(machine.gates.closing(queue(0, TWO), wish))
    small = asyncio.create_task(machine.gates.closing(queue(1, ONE), wish))
    await turns()
    machine.gates.notify()
    assert await asyncio.wait_for(large, LIMIT_SECS)
    assert not small.done()
    wish.set_result(None)
    assert not await small


async def test_closed_ones_open_in_the_order_of_their_use_and_only_while_there_is_room(monkeypatch):
    monkeypatch.setattr(gates, "STEP_SECS", 0.01)
    machine = Machine(0)
    order: list[int] = []

    async def wait(number: int) -> None:
        await machine.gates.opened(queue(number), None, None)
        order.append(number)
        if number == 10:
            machine.room = 0

    waiting = [asyncio.create_task(wait(number)) for number in (*range(50, 0, -1),)]
    await turns()
    machine.gates.notify()
    await turns()
    assert not order
    machine.room = 1
    machine.gates.notify()
    await turns()
    assert order[0] == 1
    async with asyncio.timeout(LIMIT_SECS):
        while len(order) < 21:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)  # several steps, if there were any more
    assert sorted(order) == list(range(1, 22))  # 1, 4 and 16 of them
    for task in waiting:
        task.cancel()


async def test_news_of_its_own_do_not_bring_a_queue_past_others_that_wait_for_room():
    machine = Machine(0)
    state = queue(1)
    waiting = asyncio.create_task(machine.gates.opened(state, None, None))
    await turns()
    machine.gates.changed(state, needs_room=True)
    await turns()
    assert not waiting.done()
    machine.gates.changed(state, needs_room=False)
    await asyncio.wait_for(waiting, LIMIT_SECS)


async def test_what_is_barred_by_something_else_is_asked_itself():
    machine = Machine(0)
    away = [True]
    waiting = asyncio.create_task(machine.gates.opened(queue(1), lambda: not away[0], None))
    await turns()
    machine.gates.notify()
    await turns()
    assert not waiting.done()
    away[0] = False
    machine.gates.notify()
    await asyncio.wait_for(waiting, LIMIT_SECS)


@pytest.mark.parametrize("reserved", [True, False])
async def test_when_all_are_shut_those_that_listen_are_woken(reserved):
    machine = Machine(4)
    wish: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    machine.shut = True
    if reserved:
        with machine.gates.reserved(queue(1)) as news:
            machine.gates.notify()
            assert await asyncio.wait_for(news, LIMIT_SECS)
    else:
        listening = asyncio.create_task(machine.gates.closing(queue(1), wish))
        await turns()
        machine.gates.notify()
        assert await asyncio.wait_for(listening, LIMIT_SECS)
