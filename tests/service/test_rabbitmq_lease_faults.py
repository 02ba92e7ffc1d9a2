"""Leases when something dies, sleeps or is cut off: one copy is left, and it returns (docs/leases.md)."""

from __future__ import annotations

import asyncio
import time

import pytest

from runner.config import RmqLease
from runner.queues import rabbitmq_channels, rabbitmq_connection, rabbitmq_hold, rabbitmq_lease
from tests.servers.rabbitmq import rabbitmq_server
from tests.service.rabbitmq_kit import LIMIT, name
from tests.service.rabbitmq_lease_kit import (
    ARGUMENTS,
    LONG,
    TERMS,
    depth,
    either_type,
    hanging,
    host,
    lease_name,
    leased,
    reaches,
)

__all__ = ["name"]  # fixtures

pytestmark = [pytest.mark.service, pytest.mark.slow]

BODY = b'{"experiment": {}}'


async def exactly_one_comes(server, name: str, *, attempts: int) -> None:
    """To another host, within the lease time; and nothing more after that, and no lease queue stays."""
    async with host(server, terms=TERMS) as other:
        begun = time.monotonic()
        again = await other.take(name)
        assert time.monotonic() - begun < TERMS.secs + 30  # the machine may be busy
        assert (again.body, again.redelivered, again.attempts) == (BODY, True, attempts)
        await again.began(attempts + 1)
        await other.gets_nothing(name, TERMS.secs + 2)
        assert await again.ack() is True
        assert depth(server, lease_name(name, BODY)) is None
        assert depth(server, name) == 0


@either_type
async def test_the_work_of_a_dead_host_returns_within_its_lease_time(rabbitmq, name, kind):
    rabbitmq.declare(name, durable=True, arguments=ARGUMENTS[kind])
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq) as one:
        held = await one.take(name)
        await held.began(1)
        await leased(rabbitmq, name, BODY)
        one.die()
        await exactly_one_comes(rabbitmq, name, attempts=1)


@either_type
async def test_dead_after_the_queue_was_declared(rabbitmq, name, kind, monkeypatch):
    rabbitmq.declare(name, durable=True, arguments=ARGUMENTS[kind])
    rabbitmq.publish(name, BODY, persistent=True)
    with monkeypatch.context() as patch:
        patch.setattr(rabbitmq_lease, "renew", lambda *_, **__: hanging())
        async with host(rabbitmq) as one:
            await one.take(name)
            await reaches(rabbitmq, lease_name(name, BODY), 0)
            one.die()
            patch.undo()
            await exactly_one_comes(rabbitmq, name, attempts=0)


@either_type
async def test_dead_after_the_copy_was_published_but_the_original_not_acknowledged(
    rabbitmq, name, kind, monkeypatch
):
    rabbitmq.declare(name, durable=True, arguments=ARGUMENTS[kind])
    rabbitmq.publish(name, BODY, persistent=True)
    with monkeypatch.context() as patch:
        patch.setattr(rabbitmq_channels.Held, "ack", lambda _: hanging())
        async with host(rabbitmq, terms=RmqLease(secs=8.0, hand_over_secs=0.3)) as one:
            held = await one.take(name)
            await held.began(1)
            await reaches(rabbitmq, lease_name(name, BODY), 1)
            one.die()
            patch.undo()
            # The original comes back at once, and is one too many.
            await exactly_one_comes(rabbitmq, name, attempts=1)


@either_type
async def test_dead_in_the_middle_of_a_renewal(rabbitmq, name, kind, monkeypatch):
    rabbitmq.declare(name, durable=True, arguments=ARGUMENTS[kind])
    rabbitmq.publish(name, BODY, persistent=True)
    in_between = asyncio.Event()
    loop = asyncio.get_running_loop()
    real = rabbitmq_lease._Found.end

    def end(found, channel):
        real(found, channel)
        if found.ours:
            loop.call_soon_threadsafe(in_between.set)
            raise RuntimeError("killed")  # published and acknowledged, not committed

    async with host(rabbitmq) as one:
        held = await one.take(name)
        await held.began(1)
        await leased(rabbitmq, name, BODY)
        with monkeypatch.context() as patch:
            patch.setattr(rabbitmq_lease._Found, "end", end)
            patch.setattr(rabbitmq_connection, "discard", lambda _channel: None)
            await asyncio.wait_for(in_between.wait(), LIMIT)
            assert depth(rabbitmq, lease_name(name, BODY)) == 0
            one.die()
        await exactly_one_comes(rabbitmq, name, attempts=1)


async def test_another_message_of_the_same_bytes_is_no_original(rabbitmq, name):
    """One is leased, and its original long gone; the other comes again, and has to run."""
    rabbitmq.declare(name, durable=True)
    async with host(rabbitmq, terms=LONG) as one, host(rabbitmq, terms=RmqLease()) as other:
        rabbitmq.publish(name, BODY, persistent=True)
        held = await one.take(name)
        where = await leased(rabbitmq, name, BODY)
        assert depth(rabbitmq, where) == 1
        rabbitmq.publish(name, BODY, persistent=True)
        assert await (await other.take(name)).requeue() is True
        again = await other.take(name)
        assert again.redelivered
        assert await again.ack() is True
        assert await held.ack() is True
        assert depth(rabbitmq, name) == 0


async def test_cut_off_in_the_middle_of_the_hand_over_and_back(rabbitmq, name, monkeypatch):
    """The copy is there, and nobody told us: it is found, and the original that came back is one too many."""
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    published = asyncio.Event()
    loop = asyncio.get_running_loop()
    real = rabbitmq_lease._replace

    async def replace(*arguments):
        await real(*arguments)
        if not published.is_set():
            loop.call_soon_threadsafe(published.set)
            await hanging()

    monkeypatch.setattr(rabbitmq_lease, "_replace", replace)
    async with host(rabbitmq, terms=RmqLease(secs=30.0, hand_over_secs=0.3)) as one:
        held = await one.take(name)
        await asyncio.wait_for(published.wait(), LIMIT)
        one.way.cut()
        await one.gets_nothing(name, 8.0)
        assert not held.lost.is_set()
        assert depth(rabbitmq, name) == 0
        assert await held.ack() is True
        assert depth(rabbitmq, lease_name(name, BODY)) is None


async def test_cut_off_before_the_copy_was_published(rabbitmq, name, monkeypatch):
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    about = asyncio.Event()
    loop = asyncio.get_running_loop()
    real = rabbitmq_lease._search

    async def search(*arguments):
        found = await real(*arguments)
        if not about.is_set():
            loop.call_soon_threadsafe(about.set)
            await hanging()
        return found

    monkeypatch.setattr(rabbitmq_lease, "_search", search)
    async with host(rabbitmq, terms=RmqLease(secs=30.0, hand_over_secs=0.3)) as one:
        held = await one.take(name)
        await asyncio.wait_for(about.wait(), LIMIT)
        one.way.cut()
        again = await one.take(name)  # adopted by the run
        assert held.lost.is_set()
        assert not held.superseded
        assert again.redelivered
        await again.began(1)
        assert depth(rabbitmq, lease_name(name, BODY)) == 1
        assert await again.ack() is True


async def test_a_short_outage_is_outlived(rabbitmq, name):
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    terms = RmqLease(secs=20.0, hand_over_secs=0.3)
    async with host(rabbitmq, terms=terms) as one, host(rabbitmq) as other:
        held = await one.take(name)
        where = await leased(rabbitmq, name, BODY)
        one.die()
        await asyncio.sleep(9.0)
        one.way.listen()
        await other.gets_nothing(name, 15.0)
        assert not held.lost.is_set()
        assert await held.ack() is True
        assert depth(rabbitmq, where) is None


async def test_an_outage_longer_than_the_lease_gives_the_message_back_to_who_still_runs_it(rabbitmq, name):
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq) as one:
        held = await one.take(name)
        await held.began(1)
        await leased(rabbitmq, name, BODY)
        one.die()
        await reaches(rabbitmq, name, 1)
        one.way.listen()
        again = await one.take(name)
        # It is told before the message is handed out: else it would be taken for a second copy.
        assert held.lost.is_set()
        assert not held.superseded
        assert (again.redelivered, again.attempts) == (True, 1)
        assert await held.ack() is False
        await again.began(1)
        await leased(rabbitmq, name, BODY)
        assert await again.ack() is True


async def test_what_was_settled_during_an_outage_is_told_when_it_is_over(rabbitmq, name):
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq, terms=RmqLease(secs=60.0, hand_over_secs=0.3)) as one:
        held = await one.take(name)
        where = await leased(rabbitmq, name, BODY)
        one.die()
        assert await held.ack() is False  # not in time
        one.way.listen()
        await reaches(rabbitmq, where, None)
        assert depth(rabbitmq, name) == 0


async def test_a_process_that_slept_past_its_lease_has_to_stop(rabbitmq, name):
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq) as one:
        held = await one.take(name)
        await leased(rabbitmq, name, BODY)
        one.backend._lane.post(time.sleep, TERMS.secs + 2)
        await asyncio.wait_for(held.lost.wait(), LIMIT)
        assert held.superseded
        assert depth(rabbitmq, name) == 1
        assert await held.ack() is False


async def test_its_own_message_is_not_handed_out_before_that_is_said(rabbitmq, name, monkeypatch):
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq) as one:
        held = await one.take(name)
        await leased(rabbitmq, name, BODY)
        waiting = asyncio.create_task(one.take(name))
        monkeypatch.setattr(rabbitmq_lease, "renew", lambda *_, **__: hanging())  # what is slow to find out
        one.backend._lane.post(time.sleep, TERMS.secs + 2)
        again = await asyncio.wait_for(waiting, LIMIT)
        assert held.superseded
        assert held.lost.is_set()
        assert await again.ack() is True


async def test_a_process_that_slept_for_less_has_not(rabbitmq, name):
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq, terms=RmqLease(secs=20.0, hand_over_secs=0.3)) as one:
        held = await one.take(name)
        await leased(rabbitmq, name, BODY)
        one.backend._lane.post(time.sleep, 11.0)
        await asyncio.sleep(16.0)
        assert not held.lost.is_set()
        assert await held.ack() is True


async def test_one_whose_message_another_host_took_has_to_stop(rabbitmq, name):
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq) as one, host(rabbitmq, terms=RmqLease(secs=6.0, hand_over_secs=100.0)) as other:
        held = await one.take(name)
        await held.began(1)
        await leased(rabbitmq, name, BODY)
        one.die()
        again = await other.take(name)
        await again.began(2)  # tried before: leased at once
        one.way.listen()
        await asyncio.wait_for(held.lost.wait(), LIMIT)
        async with asyncio.timeout(LIMIT):
            while not held.superseded:
                await asyncio.sleep(0.05)
        assert not again.lost.is_set()
        assert await again.ack() is True


@pytest.mark.timeout(300)
@either_type
@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_broker_restart_loses_no_leased_message(own_rabbitmq, name, how, kind):
    own_rabbitmq.declare(name, durable=True, arguments=ARGUMENTS[kind])
    own_rabbitmq.publish(name, BODY, persistent=True)
    async with host(own_rabbitmq, terms=LONG) as one:
        held = await one.take(name)
        await held.began(1)
        await leased(own_rabbitmq, name, BODY)
        await asyncio.to_thread(getattr(own_rabbitmq, how))
        await asyncio.to_thread(own_rabbitmq.start)
        await leased(own_rabbitmq, name, BODY)
        assert depth(own_rabbitmq, name) == 0
        assert await held.ack() is True
        await reaches(own_rabbitmq, lease_name(name, BODY), None)


@pytest.mark.timeout(300)
async def test_a_broker_that_is_away_for_longer_than_the_lease_loses_nothing_either(own_rabbitmq, name):
    own_rabbitmq.declare(name, durable=True)
    own_rabbitmq.publish(name, BODY, persistent=True)
    async with host(own_rabbitmq, terms=RmqLease(secs=4.0, hand_over_secs=0.3)) as one:
        held = await one.take(name)
        await held.began(1)
        await leased(own_rabbitmq, name, BODY)
        await asyncio.to_thread(own_rabbitmq.stop)
        await asyncio.sleep(4.0)
        await asyncio.to_thread(own_rabbitmq.start)
        again = await one.take(name)
        assert held.lost.is_set()
        assert not held.superseded
        assert (again.redelivered, again.attempts) == (True, 1)
        assert await again.ack() is True


@pytest.mark.timeout(180)
@either_type
async def test_messages_are_held_past_the_brokers_limit(name, kind):
    limited = "consumer_timeout = 6000\n"
    often = "[{rabbit, [{channel_tick_interval, 2000}]}]."
    with rabbitmq_server(extra=limited, advanced=often) as server:
        server.declare(name, durable=True, arguments=ARGUMENTS[kind])
        server.publish(name, BODY, persistent=True)
        async with host(server, terms=RmqLease(secs=4.0, hand_over_secs=2.0)) as one, host(server) as other:
            held = await one.take(name)
            await other.gets_nothing(name, 20.0)
            assert not held.lost.is_set()
            assert await held.ack() is True
            assert depth(server, lease_name(name, BODY)) is None
        # Without being told, the limit is learned from the first message that it takes from us.
        server.publish(name, BODY, persistent=True)
        async with host(server, terms=RmqLease()) as one:
            held = await one.take(name)
            await asyncio.wait_for(held.lost.wait(), LIMIT)
            again = await one.take(name)
            assert one.backend._leases["/"].hand_over_secs == 3.0
            assert again.redelivered
            await leased(server, name, BODY)
            assert await again.ack() is True


async def test_a_broker_short_of_memory_still_hears_that_a_run_has_ended(rabbitmq, name, monkeypatch):
    """It stops listening to connections that publish."""
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq, terms=LONG) as one:
        held = await one.take(name)
        where = await leased(rabbitmq, name, BODY)
        monkeypatch.setattr(one.backend._leases["/"].publishing, "channel", hanging)
        assert await held.ack() is True
        assert depth(rabbitmq, where) is None


def test_time_passes_while_the_machine_sleeps():
    assert abs(rabbitmq_hold.now() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1.0
