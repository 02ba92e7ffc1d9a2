"""Consuming one Pub/Sub subscription: a stream stands only while somebody waits for a message."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from typing import TYPE_CHECKING

import structlog

from runner.errors import QueueUnavailable
from runner.queues import base, pubsub_delivery
from runner.queues import pubsub_wire as wire

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from runner.queues.pubsub_client import Client
    from runner.queues.pubsub_stream import Stream

log = structlog.get_logger(__name__)


class PubsubConsumer(base.Consumer):
    """One queue's streams, one at a time. What arrived and was not handed out is held until `next` or `pause` takes it."""

    def __init__(
        self,
        queue: base.QueueRef,
        client: Callable[[], Awaitable[Client]],
        ledger: pubsub_delivery.Ledger,
        *,
        lease_secs: int,
        on_close: Callable[[PubsubConsumer], None],
    ) -> None:
        """`client` raises `QueueUnavailable` while there is none."""
        self._queue = queue
        self._client = client
        self._ledger = ledger
        self._lease_secs = lease_secs
        self._on_close = on_close
        self._arrived: collections.deque[pubsub_delivery.PubsubDelivery] = collections.deque()
        self._wanted = False  #: somebody is in `next`, and nothing has arrived for them
        self._news = asyncio.Event()
        self._gone = False
        self._failure: QueueUnavailable | None = None
        self._closed = False
        self._stream: Stream | None = None
        self._pulling: asyncio.Task[None] | None = None

    async def next(self) -> base.Delivery:
        """As the contract says. Raises `errors.QueueUnavailable` only when the account is closed under it."""
        while True:
            if self._failure is not None:
                raise self._failure
            while self._arrived:
                delivery = self._arrived.popleft()
                if not delivery.lost.is_set():
                    return delivery
            if self._gone:
                self._gone = False
                raise base.QueueGone(str(self._queue))
            assert not self._closed, "next() after close()"
            await self._ask()

    async def pause(self) -> None:
        """As the contract says; waits for what is on its way, for two seconds at most."""
        self._wanted = False
        if self._pulling is not None and not self._pulling.done():
            if self._stream is None:
                self._pulling.cancel()
            else:
                self._stream.finish()
            await asyncio.wait((self._pulling,))
        arrived, self._arrived = self._arrived, collections.deque()
        await asyncio.gather(*(delivery.requeue() for delivery in arrived))

    async def close(self) -> None:
        """As the contract says."""
        if not self._closed:
            self._closed = True
            self._on_close(self)
            await self.pause()

    def fail(self, error: QueueUnavailable) -> None:
        """The account is closed: whoever waits in `next` gets this error."""
        self._failure = error
        self._wanted = False
        self._news.set()
        if self._pulling is not None:
            self._pulling.cancel()

    async def _ask(self) -> None:
        """Wait until there is news."""
        self._wanted = True
        self._news.clear()
        if self._pulling is None or self._pulling.done():
            self._pulling = asyncio.create_task(self._pull(), name=f"pull {self._queue}")
        try:
            await self._news.wait()
        except asyncio.CancelledError:
            self._settle()
            raise

    def _settle(self) -> None:
        """Nobody waits any more: the stream ends as soon as it can without loss."""
        self._wanted = False
        if self._stream is not None:
            self._stream.finish()

    async def _pull(self) -> None:
        """Open streams, one after the other, while somebody waits."""
        failures = 0
        while self._wanted:
            try:
                await self._pull_once(await self._client())
                failures = 0
            except wire.Missing:
                self._gone = True
                self._settle()
                self._news.set()
            except (wire.WireError, QueueUnavailable) as error:
                refused = isinstance(error, wire.Away) and error.refused
                # The service ends streams now and then, with an error: that is no news.
                emit = log.warning if refused and failures == 0 else log.debug
                emit("stream ended", queue=str(self._queue), error=str(error), failures=failures)
                self._trouble = str(error) if refused or failures else ""
                await asyncio.sleep(wire.backoff(failures, refused=refused))
                self._trouble = ""
                failures += 1

    async def _pull_once(self, client: Client) -> None:
        self._stream = stream = client.stream(self._queue.name + wire.SUFFIX)
        try:
            async with contextlib.aclosing(stream.messages()) as batches:
                async for batch in batches:
                    stream.finish()
                    for received in batch:
                        await self._take(client, received)
        finally:
            self._stream = None

    async def _take(self, client: Client, received: wire.Received) -> None:
        delivery = pubsub_delivery.PubsubDelivery(
            self._queue,
            received,
            client,
            lease_secs=self._lease_secs,
            redelivered=self._ledger.note(self._queue, received),
            on_end=self._ledger.drop,
        )
        self._ledger.add(delivery)
        if await delivery.hold(confirmed=received.exactly_once):
            self._arrived.append(delivery)
            self._wanted = False
            self._news.set()
