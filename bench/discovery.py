"""Finding ten thousand queues on one broker, with one request."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from bench.figures import Bar, Figure, median
from runner.queues.rabbitmq import RabbitmqBackend
from tests.servers.rabbitmq import EXCHANGE, rabbitmq_server

if TYPE_CHECKING:
    from bench.lab import Lab
    from tests.servers.rabbitmq import RabbitmqServer


def measure(lab: Lab) -> list[Figure]:
    """The time of a refresh. The broker is one of its own: so many queues slow it down."""
    count = 1000 if lab.quick else 10_000
    with rabbitmq_server() as broker:
        _declare(broker, count)
        secs = asyncio.run(_discover(broker, count, 3 if lab.quick else 7))
    return [
        Figure(
            name=f"refresh of {count:,} queues", value=secs, unit="s", bar=Bar(limit=2), note="one request"
        ),
    ]


def _declare(broker: RabbitmqServer, count: int) -> None:
    with broker.channel() as channel:
        channel.exchange_declare(EXCHANGE, "topic", durable=True, auto_delete=True)
        for number in range(count):
            name = f"rmq_{number:05}"
            channel.queue_declare(name)
            channel.queue_bind(name, EXCHANGE, f"StudioML.{name}")


async def _discover(broker: RabbitmqServer, count: int, rounds: int) -> float:
    backend = RabbitmqBackend(broker.amqp_url, broker.management_url)
    await backend.open()
    secs = []
    try:
        for _ in range(rounds):
            began = time.perf_counter()
            found = await backend.discover()
            secs.append(time.perf_counter() - began)
            assert len(found) == count, len(found)
    finally:
        await backend.aclose()
    return median(secs)
