"""Leases when the broker is away, restarts or loses patience, and when this process sleeps (docs/leases.md)."""

from __future__ import annotations

import asyncio
import time

import pytest

from runner.config import RmqLease
from runner.queues import rabbitmq_connection, rabbitmq_consumer, rabbitmq_hold, rabbitmq_lease
from tests.servers.rabbitmq import rabbitmq_server
from tests.service.rabbitmq_kit import LIMIT, name, until
from tests.service.rabbitmq_lease_kit import (
    ARGUMENTS,
    LONG,
    TERMS,
    _patient,
    depth,
    either_type,
    hanging,
    host,
    lease_name,
    leased,
    peek,
    reaches,
    steady,
)

__all__ = ["_patient", "name", "steady"]  # fixtures

pytestmark = [pytest.mark.service, pytest.mark.slow]

BODY = b'{"experiment": {}}'


async def test_a_short_outage_is_outlived(rabbitmq, name, monkeypatch):
    """One in which a renewal fails, and that is over before the lease is."""
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    monkeypatch.setattr(rabbitmq_connection, "UNREACHABLE_DELAY_SECS", 1.0)
    failed = asyncio.Event()
    loop = asyncio.get_running_loop()
    real = rabbitmq_hold.Hold._look_after

    async def look_after(hold):
        if (finding := await real(hold)) is None:
            loop.call_soon_threadsafe(failed.set)
        return finding

    monkeypatch.setattr(rabbitmq_hold.Hold, "_look_after", look_after)
    async with host(rabbitmq, terms=RmqLease(secs=30.0, hand_over_secs=0.3)) as one, host(rabbitmq) as other:
        held = await one.take(name)
        where = await leased(rabbitmq, name, BODY)
        renewed = peek(rabbitmq, where)[0].headers["seq"]
        coming = asyncio.create_task(other.take(name))
        one.die()
        await asyncio.wait_for(failed.wait(), LIMIT)
        one.way.listen()
        await until(lambda: peek(rabbitmq, where)[0].headers["seq"] > renewed)
        assert not coming.done()
        coming.cancel()
        await asyncio.wait((coming,))
        assert not held.lost.is_set()
        assert await held.ack() is True
        assert depth(rabbitmq, where) is None


async def test_an_outage_longer_than_the_lease_gives_the_message_back_to_who_still_runs_it(
    rabbitmq, name, steady
):
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


async def test_what_was_settled_during_an_outage_is_told_when_it_is_over(rabbitmq, name, monkeypatch):
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq, terms=RmqLease(secs=60.0, hand_over_secs=0.3)) as one:
        held = await one.take(name)
        where = await leased(rabbitmq, name, BODY)
        one.die()
        monkeypatch.setattr(rabbitmq_consumer, "HANDOVER_SECS", 1.0)
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
        await reaches(rabbitmq, name, 1)
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
    async with host(rabbitmq, terms=RmqLease(secs=24.0, hand_over_secs=0.3)) as one:
        held = await one.take(name)
        where = await leased(rabbitmq, name, BODY)
        renewed = peek(rabbitmq, where)[0].headers["seq"]
        one.backend._lane.post(time.sleep, 11.0)  # past the next renewal, which is eight seconds away
        await until(lambda: peek(rabbitmq, where)[0].headers["seq"] > renewed)
        assert not held.lost.is_set()
        assert await held.ack() is True


async def test_one_whose_message_another_host_took_has_to_stop(rabbitmq, name):
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq) as one, host(rabbitmq, terms=RmqLease(secs=12.0, hand_over_secs=99.0)) as other:
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
async def test_a_broker_that_is_away_for_longer_than_the_lease_loses_nothing_either(
    own_rabbitmq, name, steady
):
    own_rabbitmq.declare(name, durable=True)
    own_rabbitmq.publish(name, BODY, persistent=True)
    async with host(own_rabbitmq) as one:
        held = await one.take(name)
        await held.began(1)
        await leased(own_rabbitmq, name, BODY)
        await asyncio.to_thread(own_rabbitmq.stop)
        await asyncio.sleep(TERMS.secs)
        await asyncio.to_thread(own_rabbitmq.start)
        again = await one.take(name)
        assert held.lost.is_set()
        assert not held.superseded
        assert (again.redelivered, again.attempts) == (True, 1)
        assert await again.ack() is True


@pytest.mark.timeout(180)
@either_type
async def test_messages_are_held_past_the_brokers_limit(name, kind):
    limited = "consumer_timeout = 15000\n"
    often = "[{rabbit, [{channel_tick_interval, 2000}]}]."
    with rabbitmq_server(extra=limited, advanced=often) as server:
        server.declare(name, durable=True, arguments=ARGUMENTS[kind])
        server.publish(name, BODY, persistent=True)
        async with host(server, terms=RmqLease(secs=12.0, hand_over_secs=2.0)) as one, host(server) as other:
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
            assert one.backend._leases["/"].hand_over_secs == 7.5
            assert again.redelivered
            await again.began(1)  # which is tried again, and so leased at once
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
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= rabbitmq_hold.now() <= time.clock_gettime(time.CLOCK_BOOTTIME)
