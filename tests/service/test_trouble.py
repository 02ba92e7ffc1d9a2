"""A broker that is listed well and gives nothing: consumers say why, as long as it is so (`explain`)."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING

import pytest

from runner.queues.base import QueueRef
from runner.queues.rabbitmq import RabbitmqBackend
from runner.queues.sqs import SqsBackend
from tests.servers.proxy import proxy
from tests.servers.pubsub import PubsubServer
from tests.service.pubsub_kit import opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from runner.queues.base import Consumer, QueueBackend
    from tests.servers.moto_sqs import SqsServer
    from tests.servers.rabbitmq import RabbitmqServer

pytestmark = pytest.mark.service
LIMIT = 60.0  # generous: nothing here is about speed


@contextlib.asynccontextmanager
async def waiting(
    backend: QueueBackend, queue: QueueRef
) -> AsyncIterator[tuple[Consumer, asyncio.Task[bytes]]]:
    """A consumer, and what it waits for: acknowledged."""
    await backend.open()
    consumer = await backend.consumer(queue)

    async def take() -> bytes:
        delivery = await consumer.next()
        assert await delivery.ack()
        return delivery.body

    taking = asyncio.create_task(take())
    try:
        yield consumer, taking
    finally:
        taking.cancel()
        await asyncio.wait({taking})
        await backend.aclose()


async def says(consumer: Consumer, what: str) -> str:
    async with asyncio.timeout(LIMIT):
        while what not in consumer.trouble:
            await asyncio.sleep(0.02)
        return consumer.trouble


async def test_a_broker_whose_amqp_port_is_closed(rabbitmq: RabbitmqServer) -> None:
    name = f"rmq_{uuid.uuid4().hex[:12]}"
    rabbitmq.declare(name)
    with proxy(rabbitmq.host, rabbitmq.port) as way:
        way.refuse()
        backend = RabbitmqBackend(f"amqp://guest:guest@127.0.0.1:{way.port}/", rabbitmq.management_url)
        queue = QueueRef(account=backend.account, name=name, vhost="/")
        async with waiting(backend, queue) as (consumer, taking):
            assert queue in [info.ref for info in await backend.discover()]
            assert "(for " in await says(consumer, "refused")
            way.listen()
            rabbitmq.publish(name, b"1")
            assert await asyncio.wait_for(taking, LIMIT) == b"1"
            assert not consumer.trouble
    rabbitmq.delete(name)


async def test_queues_that_are_only_watched_say_what_is_wrong_with_their_broker(
    rabbitmq: RabbitmqServer,
) -> None:
    name = f"rmq_{uuid.uuid4().hex[:12]}"
    with proxy(rabbitmq.host, rabbitmq.port) as way:
        way.refuse()
        url = f"amqp://guest:guest@127.0.0.1:{way.port}/"
        backend = RabbitmqBackend(url, rabbitmq.management_url, standing=1)
        queues = [QueueRef(account=backend.account, name=f"{name}_{n}", vhost="/") for n in range(2)]
        async with waiting(backend, queues[0]) as (first, _):
            await says(first, "refused")
            second = await backend.consumer(queues[1])
            taking = asyncio.create_task(second.next())
            await says(second, "refused")
            taking.cancel()
            await asyncio.wait({taking})


async def test_a_queue_that_somebody_has_for_himself(rabbitmq: RabbitmqServer) -> None:
    name = f"rmq_{uuid.uuid4().hex[:12]}"
    rabbitmq.declare(name)
    backend = RabbitmqBackend(rabbitmq.amqp_url, rabbitmq.management_url)
    with rabbitmq.channel() as channel:
        tag = channel.basic_consume(name, lambda *_: None, exclusive=True)
        queue = QueueRef(account=backend.account, name=name, vhost="/")
        async with waiting(backend, queue) as (consumer, taking):
            await says(consumer, "exclusive")
            channel.basic_cancel(tag)
            rabbitmq.publish(name, b"1")
            assert await asyncio.wait_for(taking, LIMIT) == b"1"
            assert not consumer.trouble
    rabbitmq.delete(name)


async def test_an_sqs_key_that_may_not_receive(sqs_server: SqsServer) -> None:
    sqs_server.create("sqs_trouble")
    backend = SqsBackend(sqs_server.account(keys=sqs_server.stranger))
    async with waiting(backend, QueueRef(account=backend.account, name="sqs_trouble")) as (consumer, _):
        await says(consumer, "do not allow it")
    sqs_server.clear()


async def test_a_subscription_that_may_not_be_pulled(pubsub: PubsubServer) -> None:
    with contextlib.closing(PubsubServer(pubsub.port, project=f"p-{uuid.uuid4().hex[:12]}")) as server:
        server.declare("pubsub_q")
        server.fail(StreamingPull="PERMISSION_DENIED")
        async with opened(server) as backend:
            consumer = await backend.consumer(QueueRef(account=backend.account, name="pubsub_q"))
            taking = asyncio.create_task(consumer.next())
            assert [info.ref.name for info in await backend.discover()] == ["pubsub_q"]
            await says(consumer, "PERMISSION_DENIED")
            server.fail()
            server.publish("pubsub_q", b"x")
            assert await (await asyncio.wait_for(taking, LIMIT)).ack()
            assert not consumer.trouble
