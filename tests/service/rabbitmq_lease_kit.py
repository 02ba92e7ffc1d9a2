"""What the tests of leases share: short ones, and ways to die in the middle of something."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import time
from typing import TYPE_CHECKING, Any

import pytest
from pika import exceptions

from runner.config import RmqLease
from runner.queues import rabbitmq_consumer, rabbitmq_hold
from runner.queues.rabbitmq import RabbitmqBackend
from tests.servers.proxy import proxy
from tests.service.rabbitmq_kit import LIMIT, ref, take, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from runner.queues import base
    from tests.servers.proxy import Proxy
    from tests.servers.rabbitmq import RabbitmqServer

#: Short enough to be waited for. It is renewed after four seconds, and so outlives a process, a broker or a disk that
#: stands still for eight: to lose it then would be right, and is no subject of a test that keeps it.
TERMS = RmqLease(secs=12.0, hand_over_secs=0.3)
#: One that does not run out during a test.
LONG = RmqLease(secs=600.0, hand_over_secs=0.3)

ARGUMENTS = {"classic": {"x-queue-type": "classic"}, "quorum": {"x-queue-type": "quorum"}}

either_type = pytest.mark.parametrize("kind", ["classic", "quorum"])


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that takes its time is waited for, not given up: what is told late is told all the same."""
    monkeypatch.setattr(rabbitmq_consumer, "HANDOVER_SECS", LIMIT)
    monkeypatch.setattr(rabbitmq_hold, "STEP_SECS", LIMIT / 2)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """With short leases, too, an exchange has the time that it has with those of ten minutes.

    Else a disk that takes two seconds for a flush lets no renewal end in time, and a process that stood still for a
    second or two has to believe that it slept, and another runner went on.
    """
    monkeypatch.setattr(rabbitmq_hold, "STEPS_PER_LEASE", 1)


def lease_name(queue: str, body: bytes) -> str:
    return "studio-runner.lease." + hashlib.sha256(queue.encode() + b"\0" + body).hexdigest()[:32]


class Host:
    """A runner's backend on a way of its own to the broker, so that it can be cut off, or die."""

    def __init__(self, server: RabbitmqServer, way: Proxy, *, terms: RmqLease | None, **options: Any) -> None:
        self.way = way
        self.dead = False
        user = options.pop("user", "guest:guest")
        self.backend = RabbitmqBackend(
            f"amqp://{user}@127.0.0.1:{self.way.port}/", server.management_url, lease=terms, **options
        )

    def die(self) -> None:
        """As `kill -9`: the broker sees its connections close, and never hears of it again (unless `way` listens)."""
        self.dead = True
        self.way.refuse()
        self.way.cut()

    async def close(self) -> None:
        """Close the account; who is dead gives nothing back, and does not wait for it."""
        if self.dead:
            self.backend._leases.clear()
        await self.backend.aclose()

    async def take(self, queue: str) -> base.Delivery:
        """The next message of a queue."""
        return await take(await self.backend.consumer(ref(self.backend, queue)))

    async def gets_nothing(self, queue: str, secs: float) -> None:
        """For that long."""
        consumer = await self.backend.consumer(ref(self.backend, queue))
        with contextlib.suppress(TimeoutError):
            delivery = await asyncio.wait_for(consumer.next(), secs)
            raise AssertionError(f"{delivery.body!r} came, redelivered: {delivery.redelivered}")
        await consumer.close()


@contextlib.asynccontextmanager
async def host(
    server: RabbitmqServer, *, terms: RmqLease | None = TERMS, **options: Any
) -> AsyncIterator[Host]:
    with proxy(server.host, server.port) as way:
        one = Host(server, way, terms=terms, **options)
        await one.backend.open()
        try:
            yield one
        finally:
            await one.close()


def depth(server: RabbitmqServer, queue: str) -> int | None:
    """Messages that wait; None when there is no such queue."""
    try:
        return server.depth(queue)
    except exceptions.ChannelClosedByBroker:
        return None


async def reaches(server: RabbitmqServer, queue: str, wanted: int | None) -> None:
    async with asyncio.timeout(LIMIT):
        while (found := await asyncio.to_thread(depth, server, queue)) != wanted:
            await asyncio.sleep(0.05)
    assert found == wanted


def leases(server: RabbitmqServer) -> list[str]:
    """The lease queues of the broker."""
    _, queues = server.api("GET", "/api/queues/%2F")
    return [queue["name"] for queue in queues if queue["name"].startswith("studio-runner.lease.")]


async def leased(server: RabbitmqServer, queue: str, body: bytes) -> str:
    """Wait until the message is in its lease queue, and its original known to be gone; the lease queue's name."""
    name = lease_name(queue, body)
    await reaches(server, name, 1)
    await until(lambda: peek(server, name)[0].headers["seq"] > 0)
    return name


async def in_thread(backend: RabbitmqBackend, func: Callable[[], object]) -> None:
    """Run it in the thread that owns the connections."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def run() -> None:
        func()
        loop.call_soon_threadsafe(done.set)

    backend._lane.post(run)
    await asyncio.wait_for(done.wait(), LIMIT)


def peek(server: RabbitmqServer, queue: str) -> tuple[Any, bytes]:
    """The properties and the body of the first message, which stays."""
    with server.channel() as channel:
        until = time.monotonic() + LIMIT
        while time.monotonic() < until:
            method, properties, body = channel.basic_get(queue)
            if method is not None:  # else it is being renewed
                channel.basic_nack(method.delivery_tag, requeue=True)
                return properties, body
            time.sleep(0.02)
    raise AssertionError(f"{queue} is empty")


hanging = functools.partial(asyncio.sleep, 3600)
