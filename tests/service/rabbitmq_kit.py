"""What the tests of the RabbitMQ backend share."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import pathlib
import uuid
from typing import TYPE_CHECKING

import pytest

from runner.queues import base
from runner.queues.rabbitmq import RabbitmqBackend
from tests.servers.proxy import Proxy, proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.servers.rabbitmq import RabbitmqServer

CAPTURED = pathlib.Path(__file__).parents[1] / "data" / "captured"
LIMIT = 60.0  # generous: nothing here is about speed


@contextlib.asynccontextmanager
async def opened(url: str, management_url: str | None) -> AsyncIterator[RabbitmqBackend]:
    backend = RabbitmqBackend(url, management_url)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.aclose()


@pytest.fixture
async def backend(rabbitmq: RabbitmqServer) -> AsyncIterator[RabbitmqBackend]:
    async with opened(rabbitmq.amqp_url, rabbitmq.management_url) as one:
        yield one


@pytest.fixture
def name() -> str:
    return f"rmq_{uuid.uuid4().hex[:12]}"


@pytest.fixture
def wire(rabbitmq: RabbitmqServer) -> Iterator[Proxy]:
    with proxy(rabbitmq.host, rabbitmq.port) as one:
        yield one


def through(wire: Proxy, query: str = "") -> str:
    return f"amqp://guest:guest@127.0.0.1:{wire.port}/{query}"


def ref(backend: RabbitmqBackend, name: str, vhost: str = "/") -> base.QueueRef:
    return base.QueueRef(account=backend.account, name=name, vhost=vhost)


async def take(consumer: base.Consumer) -> base.Delivery:
    return await asyncio.wait_for(consumer.next(), LIMIT)


async def until(claim: Callable[[], bool]) -> None:
    """Wait for something that only asking tells."""
    async with asyncio.timeout(LIMIT):
        while not await asyncio.to_thread(claim):
            await asyncio.sleep(0.05)


async def consuming(server: RabbitmqServer, *names: str, count: int = 1) -> None:
    for name in names:
        await until(functools.partial(lambda name: server.consumers(name) == count, name))


def written(server: RabbitmqServer, queue: str) -> bool:
    """Whether the broker has written a durable queue down: one that is killed before forgets it."""
    files = [path for path in (server.directory / "mnesia").glob("*/*") if path.is_file()]
    return any(queue.encode() in path.read_bytes() for path in files)
