"""The Pub/Sub backend against Google's own emulator, which is no part of the contract suite: it cannot tell a queue's depth."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

import pytest

from runner.queues import base
from tests.service.pubsub_kit import STEADY, opened, ref, stopped, take

if TYPE_CHECKING:
    from tests.servers.pubsub import PubsubServer

pytestmark = pytest.mark.service


@pytest.fixture(params=[False, True], ids=["plain", "exactly-once"])
def name(request: pytest.FixtureRequest, pubsub_emulator: PubsubServer) -> str:
    name = f"pubsub_{uuid.uuid4()}"  # as the client names its queues
    pubsub_emulator.declare(name, exactly_once=request.param)
    return name


async def test_messages_are_published_taken_and_acknowledged(
    pubsub_emulator: PubsubServer, name: str
) -> None:
    async with opened(pubsub_emulator) as backend:
        assert ref(name) in [info.ref for info in await backend.discover()]
        consumer = await backend.consumer(ref(name))
        bodies = {b"%d" % number for number in range(20)} | {b""}
        for body in bodies:
            await backend.publish(ref(name), body)
        got = set()
        for _ in bodies:
            delivery = await take(consumer)
            got.add(delivery.body)
            assert await delivery.ack()
        assert got == bodies


async def test_a_message_is_held_for_longer_than_any_deadline_that_was_asked_for(
    pubsub_emulator: PubsubServer, name: str
) -> None:
    async with opened(pubsub_emulator, times=STEADY) as here, opened(pubsub_emulator) as there:
        await here.publish(ref(name), b"long")
        delivery = await take(await here.consumer(ref(name)))
        other = asyncio.create_task((await there.consumer(ref(name))).next())
        await asyncio.wait((other,), timeout=16)  # the stream's deadline is 10 s, the lease 14 s
        assert not other.done()
        assert not delivery.lost.is_set()
        assert await delivery.ack()
        await stopped(other)


async def test_what_is_given_back_comes_again(pubsub_emulator: PubsubServer, name: str) -> None:
    async with opened(pubsub_emulator) as backend:
        consumer = await backend.consumer(ref(name))
        await backend.publish(ref(name), b"again")
        first = await take(consumer)
        assert await first.requeue()
        second = await take(consumer)
        assert (second.body, second.redelivered) == (b"again", True)
        assert await second.ack()


async def test_what_a_closed_backend_held_goes_to_another(pubsub_emulator: PubsubServer, name: str) -> None:
    async with opened(pubsub_emulator) as there:
        async with opened(pubsub_emulator) as here:
            await here.publish(ref(name), b"x")
            held = await take(await here.consumer(ref(name)))
        assert held.lost.is_set()
        again = await take(await there.consumer(ref(name)))
        assert again.body == b"x"
        assert await again.ack()


async def test_a_queue_that_is_deleted_ends_the_wait_and_is_gone(
    pubsub_emulator: PubsubServer, name: str
) -> None:
    async with opened(pubsub_emulator) as backend:
        waiting = asyncio.create_task((await backend.consumer(ref(name))).next())
        await asyncio.sleep(0.5)
        assert await backend.existence(ref(name)) is base.Existence.HERE
        await asyncio.to_thread(pubsub_emulator.delete, name)
        with pytest.raises(base.QueueGone):
            await asyncio.wait_for(waiting, 60)
        assert await backend.existence(ref(name)) is base.Existence.GONE
        with pytest.raises(base.QueueGone):
            await backend.publish(ref(name), b"x")
