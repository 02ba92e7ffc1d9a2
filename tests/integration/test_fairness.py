"""Who gets the machine, and what it costs: deliveries and put-backs are counted (DESIGN.md 5.1)."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import math
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from runner.daemon import dispatch, gates, queuestate
from runner.queues.memory import MemoryBackend
from tests.integration.harness import LIMIT_SECS, Daemon, daemon

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner.queues.base import Consumer, Delivery, QueueInfo, QueueRef

#: Waits until a file is there.
WAIT = "import pathlib, time; print('begun', flush=True)\nwhile not pathlib.Path('{go}').exists(): time.sleep(0.02)"
TWO = {"cpus": 2}


class Counting(MemoryBackend):
    """Counts, by the key of the experiment, how often a message was delivered, and how often given back."""

    def __init__(self) -> None:
        super().__init__()
        self.delivered: collections.Counter[str] = collections.Counter()
        self.returned: collections.Counter[str] = collections.Counter()
        self.counts = False  #: as a broker that counts, and tells
        self.most_held = 0

    def hold(self, queue: QueueRef, message: Any) -> Delivery:
        delivery = super().hold(queue, message)
        if self.counts:
            delivery.deliveries = self.delivered[key_of(delivery.body)]
        self.delivered[key_of(delivery.body)] += 1
        self.most_held = max(self.most_held, len(self.held))
        return delivery

    def give_back(self, name: str, message: Any, delay_secs: float = 0) -> bool:
        self.returned[key_of(message.body)] += 1
        return super().give_back(name, message, delay_secs)


class Slow(Counting):
    """A broker that takes its time: room that was seen may be gone when the message is here."""

    async def consumer(self, queue: QueueRef) -> Consumer:
        consumer = await super().consumer(queue)
        at_once = consumer.next

        async def later() -> Delivery:
            await asyncio.sleep(0.2)
            return await at_once()

        consumer.next = later  # type: ignore[method-assign]
        return consumer


class Leaving(Counting):
    """A broker that takes its time to end a consumer, and an account that loses the sight of a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = ""
        self.closing, self.may_close = asyncio.Event(), asyncio.Event()

    async def discover(self) -> list[QueueInfo]:
        return [info for info in await super().discover() if info.ref.name != self.hidden]

    async def consumer(self, queue: QueueRef) -> Consumer:
        consumer = await super().consumer(queue)

        async def close() -> None:
            self.closing.set()
            await self.may_close.wait()

        consumer.close = close  # type: ignore[method-assign]
        return consumer


def key_of(body: bytes) -> str:
    return str(json.loads(body)["experiment"]["key"])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "LINGER_SECS", 0.05)
    monkeypatch.setattr(dispatch, "RECONSUME_SECS", 0.05)
    monkeypatch.setattr(
        queuestate, "PARK_SECS", 600.0
    )  # on a slow machine, too, nothing is put back for that


@pytest.fixture
def queue() -> Counting:
    return Counting()


def ended(it: Daemon) -> list[str]:
    """The experiments that have completed, in the order in which they began."""
    found = [
        (each["runner"]["start"], each["studioml"]["experiment"])
        for each in it.documents()
        if each["studioml"]["status"] == "completed"
    ]
    return [key for _, key in sorted(found)]


async def begun(it: Daemon, count: int = 1) -> None:
    """Wait until so many workloads wait for their files."""
    await it.until(lambda: it.printed().count(b"begun") == count)


@contextlib.asynccontextmanager
async def half_taken(tmp_path, queue):
    """A machine of which a long run of rmq_a has one core, until the file is there that comes with it."""
    go = tmp_path / "go"
    async with daemon(tmp_path, queue, drain=False) as it:
        await it.submit(WAIT.format(go=go), key="long")
        await begun(it)
        yield it, go


async def test_small_ones_pass_a_parked_one_and_each_is_delivered_once(tmp_path, queue):
    async with half_taken(tmp_path, queue) as (it, go):
        await it.submit("print()", key="big", resources_needed=TWO)
        for number in range(3):
            await it.submit("print()", key=f"small{number}")
        await it.until(lambda: len(ended(it)) == 3 and len(queue.held) == 2)  # long and big: parked
        assert set(ended(it)) == {"small0", "small1", "small2"}
        go.touch()
        await it.settled()
        assert len(ended(it)) == 5
        assert set(queue.delivered.values()) == {1}
        assert not queue.returned


async def test_no_more_than_two_of_a_queue_are_parked_and_told_of(tmp_path, queue):
    async with half_taken(tmp_path, queue) as (it, go):
        await it.submit("print()", key="big0", queue="rmq_b", resources_needed=TWO)
        told = await explained(it, "rmq_b", lambda told: told["parked"])
        assert len(queue.held) == 2
        assert told["closed_because"] is None
        assert told["parked"].startswith(
            "1 message is parked for want of room: 2 cores are asked for, 1 are there (for "
        )
        for number in (1, 2, 3):
            await it.submit("print()", key=f"big{number}", queue="rmq_b", resources_needed=TWO)
        told = await explained(it, "rmq_b", lambda told: told["closed_because"])
        assert len(queue.held) == 3
        assert told["closed_because"].startswith("2 messages are parked for want of room: 2 cores are asked")
        go.touch()
        await it.settled("rmq_b")
        assert queue.most_held == 3
        assert set(queue.delivered.values()) == {1}


async def explained(
    it: Daemon, name: str, wanted: Callable[[dict[str, Any]], object] = bool
) -> dict[str, Any]:
    """What it tells of a queue, once that is as `wanted`."""
    await it.until((it.config.paths.working_dir / "studio-runner.json").exists)
    address = json.loads((it.config.paths.working_dir / "studio-runner.json").read_text())["address"]
    url = f"http://{address}/api/queues?queue={name}"

    def get() -> list[dict[str, Any]]:
        with urllib.request.urlopen(url, timeout=LIMIT_SECS) as answer:
            queues: list[dict[str, Any]] = json.load(answer)["queues"]
            return queues

    async with asyncio.timeout(LIMIT_SECS):
        while not (found := await asyncio.to_thread(get)) or not wanted(found[0]):
            await asyncio.sleep(0.02)  # between questions
        (told,) = found
        return told


async def test_after_it_was_put_back_no_change_of_capacity_costs_a_delivery(tmp_path, queue, monkeypatch):
    monkeypatch.setattr(queuestate, "PARK_SECS", 0.1)
    monkeypatch.setattr(queuestate, "REST", 1e6)
    async with half_taken(tmp_path, queue) as (it, go):
        await it.submit("print()", key="big", queue="rmq_b", resources_needed=TWO)
        await it.until(lambda: queue.returned["big"])
        for number in range(10):  # each takes a core, and gives it back
            await it.submit("print()", key=f"small{number}", queue="rmq_c")
        await it.until(lambda: len(ended(it)) == 10 and len(queue.held) == 1)
        assert (queue.delivered["big"], queue.returned["big"]) == (1, 1)
        assert queue.depth("rmq_b") == 1
        go.touch()
        await it.settled("rmq_b")
        assert (queue.delivered["big"], queue.returned["big"]) == (2, 1)
        assert len(ended(it)) == 12


async def test_of_many_that_would_fit_only_the_one_that_gets_the_room_is_delivered(tmp_path, monkeypatch):
    monkeypatch.setattr(queuestate, "PARK_SECS", 0.1)
    monkeypatch.setattr(queuestate, "REST", 1e6)
    queue = Slow()
    async with half_taken(tmp_path, queue) as (it, go):
        keys = [f"big{number}" for number in range(4)]
        for key in keys:
            await it.submit("import time; time.sleep(0.5)", key=key, queue=f"rmq_{key}", resources_needed=TWO)
        await it.until(lambda: all(queue.returned[key] for key in keys))
        go.touch()
        await it.until(lambda: len(ended(it)) == 5)
        assert {key: queue.delivered[key] for key in keys} == dict.fromkeys(keys, 2)
        assert {key: queue.returned[key] for key in keys} == dict.fromkeys(keys, 1)


async def test_what_never_fits_for_long_is_delivered_ever_more_rarely(tmp_path, queue, monkeypatch):
    """Hours of crowding, at the scale of 45 s to 20 ms."""
    monkeypatch.setattr(queuestate, "PARK_SECS", 0.02)
    queue.counts = True
    async with half_taken(tmp_path, queue) as (it, go):
        since = time.monotonic()
        await it.submit("print()", key="big", queue="rmq_b", resources_needed=TWO)
        for number in range(10):
            await it.submit("print()", key=f"small{number}", queue="rmq_b")
        await it.until(lambda: len(ended(it)) == 10)
        await it.until(lambda: queue.delivered["big"] >= 4)
        assert queue.delivered["big"] <= math.log2((time.monotonic() - since) / queuestate.PARK_SECS) + 2
        go.touch()
        await it.settled("rmq_b")
        assert len(ended(it)) == 12
        assert not it.dead()


async def test_room_is_kept_for_what_has_waited_for_long(tmp_path, queue, monkeypatch):
    monkeypatch.setattr(queuestate, "keeping", lambda _: (True, 3600.0))
    go = [tmp_path / "go0", tmp_path / "go1"]
    async with daemon(tmp_path, queue, drain=False) as it:
        for number in (0, 1):
            await it.submit(WAIT.format(go=go[number]), key=f"long{number}")
        await begun(it, 2)
        monkeypatch.setattr(gates, "LINGER_SECS", 600.0)
        go[0].touch()
        await it.until(lambda: len(ended(it)) == 1)
        await it.submit("print()", key="big", queue="rmq_b", resources_needed=TWO)
        await it.until(lambda: queue.delivered["big"])
        queue.declare("rmq_c")
        kept = "room is kept for a message that has waited for long"
        await explained(it, "rmq_c", lambda told: told["closed_because"] == kept)
        await it.submit("print()", key="small", queue="rmq_c")
        go[1].touch()
        await it.until(lambda: len(ended(it)) == 4)
        await it.settled("rmq_c")
        assert ended(it).index("big") < ended(it).index("small")


async def test_on_a_full_machine_the_queue_that_had_the_least_is_served_first(tmp_path, queue, monkeypatch):
    monkeypatch.setattr(gates, "STEP_SECS", 3600.0)  # one queue at a time, however slow the machine is
    made = made_gates(monkeypatch)
    go = tmp_path / "go"
    async with daemon(tmp_path, queue, drain=False) as it:
        for number in range(4):
            await it.submit(WAIT.format(go=f"{go}{number}"), key=f"a{number}", queue="rmq_a")
        await begun(it, 2)  # the machine is full of A's long runs, and A has more of them
        for number in range(3):
            await it.submit("print()", key=f"b{number}", queue="rmq_b")
        told = await explained(it, "rmq_b")
        assert told["closed_because"] == "no core is free"
        (tmp_path / "go0").touch()
        await it.until(lambda: not queue.depth("rmq_b") and len(ended(it)) == 4)
        assert set(ended(it)) == {"a0", "b0", "b1", "b2"}
        for number in (1, 2, 3):
            (tmp_path / f"go{number}").touch()
        monkeypatch.setattr(gates, "STEP_SECS", 0.02)
        made[0]._step = 0  # its next step is not in an hour
        made[0].notify()
        await it.settled("rmq_a")
        assert len(ended(it)) == 7
        assert set(queue.delivered.values()) == {1}
        assert not queue.returned


def made_gates(monkeypatch) -> list[gates.Gates]:
    """The gates of the daemons that are made from now on."""
    made, really = list[gates.Gates](), gates.Gates.__init__

    def init(self: gates.Gates, **more: Any) -> None:
        really(self, **more)
        made.append(self)

    monkeypatch.setattr(gates.Gates, "__init__", init)
    return made


async def test_what_this_host_can_never_run_is_left_to_others_and_costs_one_delivery(tmp_path, queue):
    async with daemon(tmp_path, queue, drain=False) as it:
        await it.submit("print()", key="huge", queue="rmq_b", resources_needed={"cpus": 4096})
        await it.until(lambda: queue.returned["huge"])
        for number in range(10):
            await it.submit("print()", key=f"small{number}")
        await it.until(lambda: len(ended(it)) == 10)
        assert (queue.delivered["huge"], queue.returned["huge"]) == (1, 1)
        told = await explained(it, "rmq_b")
        assert told["closed_because"].startswith("backing off for ")
        assert "4096 cores are asked for" in told["closed_because"]
        queue.delete("rmq_b")


async def test_what_is_behind_a_message_that_no_host_can_run_is_served(tmp_path, queue, monkeypatch):
    """It is put back to the head of its queue each time, where it would be the only one ever to be seen."""
    monkeypatch.setattr(queuestate, "ELSEWHERE_SECS", 0.05)
    async with daemon(tmp_path, queue, drain=False) as it:
        await it.submit("print()", key="huge", queue="rmq_b", resources_needed={"cpus": 4096})
        await it.until(lambda: queue.returned["huge"])
        for number in range(10):
            await it.submit("print()", key=f"small{number}", queue="rmq_b")
        await it.until(lambda: len(ended(it)) == 10)
        assert (queue.delivered["huge"], queue.returned["huge"]) == (2, 1)  # held, while the others ran
        monkeypatch.setattr(queuestate, "PARK_SECS", 0.1)
        queue.break_connection()  # its time is over, and it comes again
        await it.until(lambda: queue.returned["huge"] >= 4)
        assert not it.dead()
        queue.delete("rmq_b")


async def test_a_queue_that_goes_and_comes_again_starts_nothing_that_it_has_to_put_back(tmp_path):
    queue = Leaving()
    async with half_taken(tmp_path, queue) as (it, go):
        await it.submit("print()", key="big", queue="rmq_b", resources_needed=TWO)
        await it.until(lambda: queue.delivered["big"])
        queue.hidden = "rmq_b"
        await asyncio.wait_for(queue.closing.wait(), LIMIT_SECS)
        go.touch()  # room for it
        await it.submit("print()", key="small", queue="rmq_c")
        await it.until(lambda: len(ended(it)) == 2)
        queue.hidden = ""
        await it.until(lambda: sum(task.get_name().endswith(" rmq_b") for task in asyncio.all_tasks()) == 2)
        await it.submit("print()", key="small2", queue="rmq_c")
        await it.until(lambda: len(ended(it)) == 3)
        assert (queue.delivered["big"], queue.returned["big"]) == (1, 0)
        queue.may_close.set()
        await it.settled("rmq_b")
        assert len(ended(it)) == 4
        assert (queue.delivered["big"], queue.returned["big"]) == (2, 1)


async def test_a_parked_message_that_is_lost_comes_again_and_runs_once(tmp_path, queue, monkeypatch):
    monkeypatch.setattr(queuestate, "PARK_SECS", 0.2)
    async with half_taken(tmp_path, queue) as (it, go):
        await it.submit("print()", key="big", queue="rmq_b", resources_needed=TWO)
        await it.until(lambda: queue.delivered["big"])
        queue.break_connection()
        await it.until(lambda: queue.delivered["long"] == 2)  # adopted
        go.touch()
        await it.settled("rmq_b")
        assert len(ended(it)) == 2


async def test_a_deleted_queue_takes_its_parked_messages_with_it(tmp_path, queue):
    async with half_taken(tmp_path, queue) as (it, go):
        await it.submit("print()", key="big", queue="rmq_b", resources_needed=TWO)
        await it.until(lambda: queue.delivered["big"])
        queue.delete("rmq_b")
        await it.until(lambda: queue.returned["big"])
        go.touch()
        await it.settled("rmq_a")
        assert len(ended(it)) == 1


async def test_draining_gives_back_what_is_parked(tmp_path, queue):
    async with half_taken(tmp_path, queue) as (it, go):
        await it.submit("print()", key="big", queue="rmq_b", resources_needed=TWO)
        await it.until(lambda: queue.delivered["big"])
        it.service.stop.ask(15)
        await it.until(lambda: queue.depth("rmq_b"))
        assert not it.task.done()
        go.touch()
        assert await asyncio.wait_for(it.task, LIMIT_SECS) == 0


async def test_a_run_that_loses_its_message_while_draining_gets_it_back_and_nothing_else(tmp_path, queue):
    async with half_taken(tmp_path, queue) as (it, go):
        it.service.stop.ask(15)
        await it.until(lambda: all("queue" not in task.get_name() for task in asyncio.all_tasks()))
        await it.submit("print()", key="other")
        queue.break_connection()
        queue.broker.queues["rmq_a"].ready.rotate(1)  # the other one comes first
        await it.until(lambda: queue.delivered["long"] == 2 and queue.returned["other"])
        assert queue.delivered["other"] == queue.returned["other"] == 1
        assert len(it.runs) == 1
        go.touch()
        assert await asyncio.wait_for(it.task, LIMIT_SECS) == 0
        assert ended(it) == ["long"]
        assert [key_of(each.body) for each in queue.broker.queues["rmq_a"].ready] == ["other"]
