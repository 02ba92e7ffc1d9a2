from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import pytest

from runner import config
from runner.queues.catalog import Added, Catalog, Change, Removed
from runner.queues.memory import MemoryBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner.queues.base import QueueInfo


class Counted:
    def __init__(self):
        self.refreshes: list[tuple[str, bool]] = []
        self.seen: list[tuple[str, str]] = []

    def refresh(self, account: str, ok: bool) -> None:
        self.refreshes.append((account, ok))

    def checked(self, kind: str, queue: str) -> None:
        self.seen.append(("checked", queue))

    def ignored(self, kind: str, queue: str) -> None:
        self.seen.append(("ignored", queue))


class Watched:
    """A catalog with what it has told."""

    def __init__(self, *backends: MemoryBackend, queues: config.Queues | None = None):
        self.told: list[Change] = []
        self.counted = Counted()
        self.catalog = Catalog(
            queues or config.Queues(), counters=self.counted, changed=self.told.extend, backends=backends
        )

    def changes(self) -> list[tuple[str, str]]:
        told = [(type(change).__name__, change.queue.name) for change in self.told]
        self.told.clear()
        return told


async def test_queues_come_and_go():
    backend = MemoryBackend()
    watched = Watched(backend)
    backend.declare("rmq_a")
    backend.declare("local_b")
    await watched.catalog.refresh()
    assert watched.told == [
        Added(queue=backend.ref("local_b"), backend=backend),
        Added(queue=backend.ref("rmq_a"), backend=backend),
    ]
    watched.told.clear()
    await watched.catalog.refresh()
    assert watched.told == []
    backend.delete("rmq_a")
    await watched.catalog.refresh()
    assert watched.told == [Removed(queue=backend.ref("rmq_a"), backend=backend)]
    assert watched.catalog.queues() == {backend.ref("local_b"): backend}


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("rmq_x", True),
        ("sqs_x", True),
        ("local_x", True),
        ("pubsub_x", True),
        ("xrmq_x", False),
        ("local", False),
        ("rmq_x_response", False),
    ],
)
def test_the_default_filter(name, taken):
    assert Watched().catalog.matches(name) is taken


def test_patterns_match_anywhere_as_go_does_and_mismatch_wins():
    catalog = Watched(queues=config.Queues(match=re.compile("demo"), mismatch=re.compile("old$"))).catalog
    assert catalog.matches("my-demo-queue")
    assert not catalog.matches("my-demo-old")
    assert not catalog.matches("demo_response")
    assert not catalog.matches("other")


async def test_ignored_queues_are_counted():
    backend = MemoryBackend()
    backend.declare("rmq_a")
    backend.declare("private")
    watched = Watched(backend)
    await watched.catalog.refresh()
    assert watched.counted.seen == [("checked", "rmq_a"), ("ignored", "private")]
    (status,) = watched.catalog.status()
    assert (status.taken, status.ignored, status.ok) == (1, 1, True)


def test_patterns_of_an_account_leave_names_out_of_that_account_alone():
    catalog = Watched(MemoryBackend("all")).catalog
    catalog.add(MemoryBackend("team"), match=re.compile("^rmq_team"), mismatch=re.compile("old$"))
    assert catalog.kept_out("rmq_team_a") == []
    assert catalog.kept_out("rmq_team_old") == catalog.kept_out("rmq_b") == ["team"]


async def test_an_account_that_is_away_keeps_its_queues_and_stops_no_other():
    good, bad = MemoryBackend("good"), MemoryBackend("bad")
    bad.declare("rmq_bad")
    watched = Watched(bad, good)
    assert [status.ok for status in watched.catalog.status()] == [False, False]
    await watched.catalog.refresh()
    watched.told.clear()
    bad.set_away(True)
    good.declare("rmq_good")
    await watched.catalog.refresh()
    assert watched.changes() == [("Added", "rmq_good")]
    assert {ref.name for ref in watched.catalog.queues()} == {"rmq_good", "rmq_bad"}
    away, here = watched.catalog.status()
    assert (away.ok, here.ok) == (False, True)
    assert away.error
    since = away.unavailable_since
    assert since is not None
    await watched.catalog.refresh()
    assert watched.catalog.status()[0].unavailable_since == since
    assert watched.counted.refreshes == [("bad", True), ("good", True), *[("bad", False), ("good", True)] * 2]
    bad.set_away(False)
    await watched.catalog.refresh()
    assert watched.catalog.status()[0].ok
    assert watched.changes() == []


async def test_a_bug_in_one_adapter_stops_no_other():
    class Broken(MemoryBackend):
        async def discover(self) -> list[QueueInfo]:
            raise ZeroDivisionError

    good = MemoryBackend("good")
    good.declare("rmq_good")
    watched = Watched(Broken("bad"), good)
    await watched.catalog.refresh()
    assert watched.changes() == [("Added", "rmq_good")]
    assert watched.catalog.status()[0].error == "ZeroDivisionError"


async def test_a_slow_account_does_not_hold_up_the_changes_of_others():
    release = asyncio.Event()

    class Slow(MemoryBackend):
        async def discover(self) -> list[QueueInfo]:
            await release.wait()
            return await super().discover()

    good, slow = MemoryBackend("good"), Slow("slow")
    good.declare("rmq_good")
    slow.declare("rmq_slow")
    watched = Watched(slow, good)
    refreshing = asyncio.create_task(watched.catalog.refresh())
    async with asyncio.timeout(60):
        while not watched.told:
            await asyncio.sleep(0)
    assert watched.changes() == [("Added", "rmq_good")]
    watched.catalog.remove(
        "slow"
    )  # its credentials were taken away while it was asked: its answer comes too late
    release.set()
    await refreshing
    assert watched.changes() == []


async def test_an_account_that_does_not_answer_delays_no_new_one_and_is_not_asked_twice_at_a_time():
    class Silent(MemoryBackend):
        asked = 0
        told: Callable[[], None]

        def on_queues_changed(self, told: Callable[[], None]) -> None:
            self.told = told

        async def discover(self) -> list[QueueInfo]:
            self.asked += 1
            await asyncio.Event().wait()
            return []

    silent, new = Silent("silent"), MemoryBackend("new")
    new.declare("rmq_new")
    watched = Watched(silent)
    running = asyncio.create_task(watched.catalog.run(0.01))
    try:
        async with asyncio.timeout(60):
            while not silent.asked:
                await asyncio.sleep(0.01)
            watched.catalog.add(new)
            silent.told()
            while ("new", True) not in watched.counted.refreshes[5:]:  # again and again
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
    assert watched.changes() == [("Added", "rmq_new")]
    assert silent.asked == 1


async def test_what_changes_while_an_account_is_asked_is_asked_for_again():
    class Late(MemoryBackend):
        told: Callable[[], None]

        def on_queues_changed(self, told: Callable[[], None]) -> None:
            self.told = told

        async def discover(self) -> list[QueueInfo]:
            found = await super().discover()
            if not found:
                self.declare("rmq_late")  # it has been listed already
                self.told()
            return found

    watched = Watched(Late())
    running = asyncio.create_task(watched.catalog.run(3600))
    try:
        async with asyncio.timeout(60):
            while not watched.told:
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
    assert watched.changes() == [("Added", "rmq_late")]


async def test_removing_an_account_removes_its_queues():
    backend = MemoryBackend()
    backend.declare("rmq_a")
    watched = Watched(backend)
    await watched.catalog.refresh()
    watched.told.clear()
    watched.catalog.remove(backend.account)
    watched.catalog.remove(backend.account)
    assert watched.changes() == [("Removed", "rmq_a")]
    assert watched.catalog.queues() == {}


async def test_the_loop_refreshes_again_and_sees_a_new_account_soon():
    first, second = MemoryBackend("first"), MemoryBackend("second")
    watched = Watched(first)
    running = asyncio.create_task(watched.catalog.run(0.01))
    try:
        async with asyncio.timeout(60):
            while len(watched.counted.refreshes) < 3:
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
    running = asyncio.create_task(watched.catalog.run(3600))
    second.declare("rmq_second")
    watched.catalog.add(second)
    try:
        async with asyncio.timeout(60):
            while not watched.told:
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
    assert watched.changes() == [("Added", "rmq_second")]


async def test_of_the_accounts_of_one_broker_a_queue_is_of_its_own_or_of_one_that_sees_it():
    class Blind(MemoryBackend):  # its user sees other queues alone
        async def discover(self) -> list[QueueInfo]:
            return [info for info in await super().discover() if info.ref.name == "rmq_other"]

    first, second = Blind("first"), MemoryBackend("second")
    first.broker = second.broker
    second.declare("rmq_a")
    catalog = Watched(first, second).catalog
    assert catalog.backend_of(second.identity, second.ref("rmq_a")) is second
    assert catalog.backend_of(second.identity, first.ref("rmq_a")) is first
    await catalog.refresh()
    assert catalog.backend_of(second.identity, MemoryBackend("renamed").ref("rmq_a")) is second
    assert catalog.backend_of("", second.ref("rmq_a")) is None
