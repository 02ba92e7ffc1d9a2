"""What the tests of the Pub/Sub backend share."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING

import pytest

from runner.queues import base
from runner.queues.pubsub import PubsubBackend
from runner.queues.pubsub_account import PubsubAccount, PubsubTimes
from tests.servers.proxy import Proxy, proxy
from tests.servers.pubsub import PubsubServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

LIMIT = 60.0  # generous: nothing here is about speed
#: Where a hold is lost: who stands still for a second has lost it.
QUICK = PubsubTimes(lease_secs=2, call_secs=20, keepalive_secs=1)
#: Where it is kept: renewed after seven seconds, and so kept by a machine that stands still for six.
STEADY = PubsubTimes(lease_secs=14, call_secs=20, keepalive_secs=1)


@contextlib.asynccontextmanager
async def opened(
    server: PubsubServer, *, times: PubsubTimes | None = None, port: int | None = None
) -> AsyncIterator[PubsubBackend]:
    address = f"127.0.0.1:{port or server.port}"
    account = PubsubAccount(label="account", project=server.project, emulator=address)
    backend = PubsubBackend(account, times=times)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.aclose()


@pytest.fixture
def server(pubsub: PubsubServer) -> Iterator[PubsubServer]:
    """A project of the test's own."""
    with contextlib.closing(PubsubServer(pubsub.port, project=f"p-{uuid.uuid4().hex[:12]}")) as own:
        yield own


@pytest.fixture
def way(server: PubsubServer) -> Iterator[Proxy]:
    with proxy(server.host, server.port) as one:
        yield one


def ref(name: str = "pubsub_q") -> base.QueueRef:
    return base.QueueRef(account="account", name=name)


async def take(consumer: base.Consumer) -> base.Delivery:
    return await asyncio.wait_for(consumer.next(), LIMIT)


async def until(claim: Callable[[], bool]) -> None:
    """Wait for something that only asking tells."""
    async with asyncio.timeout(LIMIT):
        while not await asyncio.to_thread(claim):
            await asyncio.sleep(0.02)


async def stopped(task: asyncio.Task[base.Delivery]) -> None:
    """Cancel a wait for a message."""
    task.cancel()
    await asyncio.wait((task,))
