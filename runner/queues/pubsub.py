"""Google Pub/Sub (INTEROP.md 2.6, DESIGN.md 5.1): one project, opened by one service account.

A queue `x` is the subscription `x_sub`, and what is published to it goes to the topic `x`: that is what every StudioML
client makes, and deletes to cancel. Other subscriptions (another suffix, push, detached) hold no work for runners.

Two facts shape this backend. A message is held by a lease of at most ten minutes, which is renewed for as long as its
run lives. And Pub/Sub says that a message was delivered before only where the subscription has a dead-letter policy;
elsewhere a redelivery is recognised by its message id, in the process that saw it first.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from runner.errors import QueueUnavailable
from runner.queues import base, pubsub_delivery
from runner.queues import pubsub_wire as wire
from runner.queues.pubsub_account import PubsubTimes
from runner.queues.pubsub_consumer import PubsubConsumer

if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

    from runner.queues.pubsub_account import PubsubAccount
    from runner.queues.pubsub_client import Client

CLOSE_SECS = 5.0
ASK_AGAIN_SECS = 0.5  #: a subscription is gone when it is missing twice, so long apart

#: Beside the body: Pub/Sub takes no message that has neither a body nor an attribute.
ATTRIBUTES = {"content_type": "application/json"}


class PubsubBackend(base.QueueBackend):
    """One project: discovers its subscriptions, pulls from them, publishes to its topics."""

    kind = "pubsub"

    def __init__(self, account: PubsubAccount, *, times: PubsubTimes | None = None) -> None:
        self.account = account.label
        self._account = account
        self._times = times or PubsubTimes()
        self._client: asyncio.Task[Client] | None = None
        self._consumers: set[PubsubConsumer] = set()
        self._ledger = pubsub_delivery.Ledger()
        self._closed = False

    @property
    def identity(self) -> str:
        """The project, and where it is when that is not Google."""
        return f"pubsub://{self._account.emulator or self._account.endpoint}/{self._account.project}"

    async def open(self) -> None:
        """Begin to load Google's library, in a thread. Connections are opened when they are first needed."""
        self._client = asyncio.create_task(self._load(), name=f"load {self.account}")

    async def aclose(self) -> None:
        """Give back what is held, and close the connections. A put-back with a delay keeps its delay."""
        if self._client is None or self._closed:
            return
        self._closed = True
        for consumer in tuple(self._consumers):
            consumer.fail(self._unavailable("the account was closed"))
        held = tuple(self._ledger.held.values())
        giving_back = [asyncio.ensure_future(delivery.requeue()) for delivery in held]
        if giving_back:
            await asyncio.wait(giving_back, timeout=CLOSE_SECS)
        for delivery in held:
            delivery.lose("the account was closed")
        await asyncio.wait((self._client,), timeout=CLOSE_SECS)
        if self._client.done() and not self._client.cancelled() and self._client.exception() is None:
            await self._client.result().close()
        self._client.cancel()

    async def discover(self) -> list[base.QueueInfo]:
        """As the contract says: one request per thousand subscriptions. The depth is not told."""
        client = await self._connected()
        try:
            names = await client.work_subscriptions()
        except wire.WireError as error:
            raise self._unavailable(f"its subscriptions cannot be listed: {error}") from error
        queues = [name.removesuffix(wire.SUFFIX) for name in names if name.endswith(wire.SUFFIX)]
        return [
            base.QueueInfo(ref=base.QueueRef(account=self.account, name=name))
            for name in queues
            if name and not name.endswith("_response")
        ]

    async def consumer(self, queue: base.QueueRef) -> PubsubConsumer:
        """As the contract says; a stream is opened by `next`, and by each `next` anew."""
        consumer = PubsubConsumer(
            queue,
            self._connected,
            self._ledger,
            lease_secs=self._times.lease_secs,
            on_close=self._consumers.discard,
        )
        self._consumers.add(consumer)
        return consumer

    async def existence(self, queue: base.QueueRef) -> base.Existence:
        """GONE when the subscription is missing twice. Subscriptions outlive every restart, so that missing is deleted."""
        try:
            client = await self._connected()
            if await client.has_subscription(queue.name + wire.SUFFIX):
                return base.Existence.HERE
            await asyncio.sleep(ASK_AGAIN_SECS)
            there = await client.has_subscription(queue.name + wire.SUFFIX)
        except (wire.WireError, QueueUnavailable):
            return base.Existence.UNKNOWN
        return base.Existence.HERE if there else base.Existence.GONE

    async def publish(self, queue: base.QueueRef, body: bytes) -> None:
        """As the contract says. A topic without a subscription takes messages, and forgets them."""
        client = await self._connected()
        try:
            await client.publish(queue.name, body, ATTRIBUTES)
        except wire.Missing as error:
            raise base.QueueGone(str(queue)) from error
        except wire.WireError as error:
            raise self._unavailable(f"publishing to {queue}: {error}") from error

    async def _load(self) -> Client:
        def load() -> tuple[ModuleType, Any]:
            from runner.queues import pubsub_client

            return pubsub_client, pubsub_client.load(self._account)

        module, key = await asyncio.to_thread(load)
        client: Client = module.Client(self._account, key, self._times)
        return client

    async def _connected(self) -> Client:
        assert self._client is not None, "open() comes first"
        if self._closed:
            raise self._unavailable("the account was closed")
        if self._client.done() and self._client.exception() is not None:  # the key may be a good one by now
            self._client = asyncio.create_task(self._load(), name=f"load {self.account}")
        try:
            return await asyncio.shield(self._client)
        except wire.Away as error:
            raise self._unavailable(str(error)) from error

    def _unavailable(self, text: str) -> QueueUnavailable:
        return QueueUnavailable(f"{self.account}: {text}", endpoint=self.account)
