"""Leases when something dies or is cut off: one copy is left, and it returns (docs/leases.md)."""

from __future__ import annotations

import asyncio
import time

import pytest
import structlog.testing

from runner.config import RmqLease
from runner.queues import rabbitmq_channels, rabbitmq_connection, rabbitmq_lease
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
    reaches,
)

__all__ = ["_patient", "name"]  # fixtures

pytestmark = [pytest.mark.service, pytest.mark.slow]

BODY = b'{"experiment": {}}'


async def exactly_one_comes(server, name: str, *, attempts: int) -> None:
    """To another host, within the lease time of the one that died just now; and nothing more, and no lease queue stays."""
    died = time.monotonic()
    async with host(server) as other:
        again = await other.take(name)
        assert time.monotonic() - died < TERMS.secs + 30  # the machine may be busy
        assert (again.body, again.redelivered, again.attempts) == (BODY, True, attempts)
        await again.began(attempts + 1)
        # Whatever else the dead one had in a lease would have returned by then.
        await other.gets_nothing(name, max(3.0, died + TERMS.secs + 3.0 - time.monotonic()))
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
        async with host(rabbitmq) as one:
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

    async def replace(channel, queue, properties, body, found):
        channel.basic_publish("", queue, body, properties, mandatory=True)
        found.end(channel)
        loop.call_soon_threadsafe(in_between.set)
        await hanging()  # published and acknowledged, not committed

    async with host(rabbitmq) as one:
        held = await one.take(name)
        await held.began(1)
        await leased(rabbitmq, name, BODY)
        with monkeypatch.context() as patch:
            patch.setattr(rabbitmq_lease, "_replace", replace)
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
    with structlog.testing.capture_logs() as told:
        async with host(rabbitmq, terms=RmqLease(secs=30.0, hand_over_secs=0.3)) as one:
            held = await one.take(name)
            await asyncio.wait_for(published.wait(), LIMIT)
            one.way.cut()
            coming = asyncio.create_task(one.take(name))
            seen = "acknowledged a redelivery of what is held in a lease"
            await until(lambda: any(each["event"] == seen for each in list(told)))
            assert not coming.done()
            coming.cancel()
            await asyncio.wait((coming,))
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
        await reaches(rabbitmq, lease_name(name, BODY), 1)
        assert await again.ack() is True
