"""The queue backends under the contract suite: how each is started, and what only its other side can do.

To add a backend: a `QueueHarness`, a factory, a line in `BACKENDS`.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import dataclasses
import functools
import shutil
import socket
import uuid
from typing import TYPE_CHECKING

import pytest

from runner.queues import pubsub_stream
from runner.queues.base import QueueRef
from runner.queues.file_messages import FileSettings
from runner.queues.file_names import is_message_name
from runner.queues.filequeue import FileBackend
from runner.queues.memory import MemoryBackend, MemoryBroker
from runner.queues.pubsub import PubsubBackend
from runner.queues.pubsub_account import PubsubAccount, PubsubTimes
from runner.queues.pubsub_wire import FIRST_LEASE_SECS
from runner.queues.rabbitmq import RabbitmqBackend
from runner.queues.sqs import SqsBackend
from runner.queues.sqs_access import SqsTiming
from tests.servers.proxy import Proxy, proxy
from tests.servers.pubsub import PubsubServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from runner.queues.base import QueueBackend
    from tests.servers.moto_sqs import SqsServer
    from tests.servers.rabbitmq import RabbitmqServer


class QueueHarness(abc.ABC):
    """One broker, or directory, with what experimenters and accidents do to it."""

    delays: bool = True  #: `requeue(delay_secs)` is honoured by the backend
    redelivers_at_head: bool = True  #: what is given back comes before what was published later
    any_bytes: bool = True  #: bodies may be empty or binary; else they are text
    limit_secs: float = (
        0.0  #: how long the broker lets a message be held that nobody extends; 0: as long as the connection
    )

    @abc.abstractmethod
    def connect(self) -> QueueBackend:
        """Another daemon's backend for this account, not opened yet. The tests open and close it."""

    @abc.abstractmethod
    async def declare(self, name: str) -> QueueRef:
        """Make a durable queue, as an experimenter does. The ref is valid for every backend of `connect`."""

    @abc.abstractmethod
    async def delete(self, queue: QueueRef) -> None:
        """Remove a queue, as an experimenter does."""

    @abc.abstractmethod
    async def depth(self, queue: QueueRef) -> int:
        """How many messages wait, those held not counted."""

    @abc.abstractmethod
    async def break_connection(self, backend: QueueBackend) -> None:
        """From outside, take from a backend what it holds, in whatever way can happen to this kind."""


class MemoryHarness(QueueHarness):
    def __init__(self) -> None:
        self.broker = MemoryBroker()

    def connect(self) -> QueueBackend:
        return MemoryBackend("account", broker=self.broker)

    async def declare(self, name: str) -> QueueRef:
        return MemoryBackend("account", broker=self.broker).declare(name)

    async def delete(self, queue: QueueRef) -> None:
        self.broker.delete(queue.name)

    async def depth(self, queue: QueueRef) -> int:
        return len(self.broker.queues[queue.name].ready)

    async def break_connection(self, backend: QueueBackend) -> None:
        assert isinstance(backend, MemoryBackend)
        backend.break_connection()


class FileHarness(QueueHarness):
    """Each backend is a host of its own, as on a shared file system; a "broken connection" is a host asleep for long."""

    SETTINGS = FileSettings(heartbeat_secs=0.1, sweep_secs=0.1)

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hosts = 0

    def connect(self) -> QueueBackend:
        self.hosts += 1
        return FileBackend(
            self.root, account="account", host=f"{socket.gethostname()}-{self.hosts}", settings=self.SETTINGS
        )

    async def declare(self, name: str) -> QueueRef:
        backend = FileBackend(self.root, account="account")
        ref = await backend.declare(name)
        await backend.aclose()
        return ref

    async def delete(self, queue: QueueRef) -> None:
        shutil.rmtree(self.root / queue.name)

    async def depth(self, queue: QueueRef) -> int:
        return sum(is_message_name(path.name) for path in (self.root / queue.name).iterdir())

    async def break_connection(self, backend: QueueBackend) -> None:
        """What another host does that takes this one for dead, in the same two steps."""
        assert isinstance(backend, FileBackend)
        own = backend._claims._own
        own.rename(own.with_name(f".dead-{own.name}"))
        backend._claims.sweep()


class RabbitmqHarness(QueueHarness):
    """A vhost of a real broker, and a user who sees no other; the connections run through a proxy that can cut them."""

    delays = False

    def __init__(self, server: RabbitmqServer, way: Proxy) -> None:
        self.server = server
        self.way = way
        self.vhost = self.user = f"contract-{uuid.uuid4().hex[:12]}"
        server.add_vhost(self.vhost)
        server.add_user(self.user, "secret", tags="management", vhost=self.vhost)

    def connect(self) -> QueueBackend:
        url = f"amqp://{self.user}:secret@127.0.0.1:{self.way.port}/{self.vhost}"
        return RabbitmqBackend(url, self.server.management_url, account="account")

    async def declare(self, name: str) -> QueueRef:
        await asyncio.to_thread(self.server.declare, name, durable=True, vhost=self.vhost)
        return QueueRef(account="account", name=name, vhost=self.vhost)

    async def delete(self, queue: QueueRef) -> None:
        await asyncio.to_thread(self.server.delete, queue.name, vhost=self.vhost)

    async def depth(self, queue: QueueRef) -> int:
        return await asyncio.to_thread(self.server.depth, queue.name, vhost=self.vhost)

    async def break_connection(self, backend: QueueBackend) -> None:
        assert isinstance(backend, RabbitmqBackend)
        self.way.cut()

    def remove(self) -> None:
        self.server.api("DELETE", f"/api/vhosts/{self.vhost}")
        self.server.api("DELETE", f"/api/users/{self.user}")


class PubsubHarness(QueueHarness):
    """A project of its own, reached through a proxy. A hold is lost by a network that is away for longer than the lease."""

    #: Renewed after six seconds, and so kept by a machine that stands still for five.
    TIMES = PubsubTimes(lease_secs=12)
    limit_secs = FIRST_LEASE_SECS

    def __init__(self, port: int, way: Proxy, *, exactly_once: bool) -> None:
        self.server = PubsubServer(port, project=f"contract-{uuid.uuid4().hex[:12]}")
        self.way = way
        self.exactly_once = exactly_once

    def connect(self) -> QueueBackend:
        address = f"127.0.0.1:{self.way.port}"
        account = PubsubAccount(label="account", project=self.server.project, emulator=address)
        return PubsubBackend(account, times=self.TIMES)

    async def declare(self, name: str) -> QueueRef:
        """Counted: one backend learns only so that another one had a message."""
        name = name.replace(" ", "-")  # no name of Pub/Sub's has a space
        await asyncio.to_thread(self.server.declare, name, exactly_once=self.exactly_once, counted=True)
        return QueueRef(account="account", name=name)

    async def delete(self, queue: QueueRef) -> None:
        await asyncio.to_thread(self.server.delete, queue.name)

    async def depth(self, queue: QueueRef) -> int:
        return await asyncio.to_thread(self.server.ready, queue.name)

    async def break_connection(self, backend: QueueBackend) -> None:
        assert isinstance(backend, PubsubBackend)
        held = tuple(backend._ledger.held.values())
        for delivery in held:
            await delivery._renewed.wait()
        self.way.blackhole()
        for delivery in held:
            await delivery.lost.wait()
        self.way.resume()


class SqsHarness(QueueHarness):
    """SQS over a proxy. A "broken connection" is a network that is away for longer than a message is held unrenewed."""

    TIMING = SqsTiming(poll_secs=2, visibility_secs=12, confirm_secs=0.5, retry_secs=0.5)
    any_bytes = False
    limit_secs = 12.0

    def __init__(self, server: SqsServer, way: Proxy, keep: Path) -> None:
        self.server = server
        self.way = way
        self.keep = keep

    def connect(self) -> QueueBackend:
        return SqsBackend(self.server.account(port=self.way.port), keep=self.keep, timing=self.TIMING)

    async def declare(self, name: str) -> QueueRef:
        name = name.replace(" ", "-")
        await asyncio.to_thread(self.server.create, name)
        return QueueRef(account="account", name=name)

    async def delete(self, queue: QueueRef) -> None:
        await asyncio.to_thread(self.server.delete, queue.name)

    async def depth(self, queue: QueueRef) -> int:
        return await asyncio.to_thread(self.server.depth, queue.name)

    async def break_connection(self, backend: QueueBackend) -> None:
        assert isinstance(backend, SqsBackend)
        self.way.refuse()
        self.way.cut()
        while await asyncio.to_thread(self.server.held, "rmq_contract"):
            await asyncio.sleep(0.1)
        self.way.listen()


@contextlib.asynccontextmanager
async def memory(_request: pytest.FixtureRequest) -> AsyncIterator[QueueHarness]:
    yield MemoryHarness()


@contextlib.asynccontextmanager
async def filequeue(request: pytest.FixtureRequest) -> AsyncIterator[QueueHarness]:
    root: Path = request.getfixturevalue("tmp_path") / "queues"
    root.mkdir()
    yield FileHarness(root)


@contextlib.asynccontextmanager
async def rabbitmq(request: pytest.FixtureRequest) -> AsyncIterator[QueueHarness]:
    server: RabbitmqServer = request.getfixturevalue("rabbitmq")
    with proxy(server.host, server.port) as way:
        harness = RabbitmqHarness(server, way)
        yield harness
        await asyncio.to_thread(harness.remove)


@contextlib.asynccontextmanager
async def pubsub(
    request: pytest.FixtureRequest, *, exactly_once: bool = False
) -> AsyncIterator[QueueHarness]:
    server: PubsubServer = request.getfixturevalue("pubsub")
    # What is on its way when nobody waits any more is waited for, however slow the service: else it comes ten seconds
    # later, marked, and out of its order.
    request.getfixturevalue("monkeypatch").setattr(pubsub_stream, "FINISH_SECS", 30.0)
    with proxy(server.host, server.port) as way:
        harness = PubsubHarness(server.port, way, exactly_once=exactly_once)
        with contextlib.closing(harness.server):
            yield harness


@contextlib.asynccontextmanager
async def sqs(request: pytest.FixtureRequest) -> AsyncIterator[QueueHarness]:
    server: SqsServer = request.getfixturevalue("sqs_server")
    with proxy("127.0.0.1", server.port) as way:
        yield SqsHarness(server, way, request.getfixturevalue("tmp_path") / "kept")
        await asyncio.to_thread(server.clear)


@dataclasses.dataclass(frozen=True)
class Entry:
    factory: Callable[[pytest.FixtureRequest], AbstractAsyncContextManager[QueueHarness]]
    marks: tuple[pytest.MarkDecorator, ...] = ()  # e.g. pytest.mark.service


#: every backend that keeps the contract
BACKENDS: dict[str, Entry] = {
    "memory": Entry(memory),
    "filequeue": Entry(filequeue),
    "rabbitmq": Entry(rabbitmq, (pytest.mark.service,)),
    "sqs": Entry(sqs, (pytest.mark.service,)),
    "pubsub": Entry(pubsub, (pytest.mark.service,)),
    "pubsub-exactly-once": Entry(functools.partial(pubsub, exactly_once=True), (pytest.mark.service,)),
}
