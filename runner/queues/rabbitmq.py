"""RabbitMQ (INTEROP.md 2.2-2.4, DESIGN.md 5.1): one account of one broker, all of its vhosts.

Everything of pika happens in one thread (`rabbitmq_connection`); this module is the daemon's side of it. Nothing in it
declares, alters or deletes a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy

import pika
import structlog
from pika import exceptions

from runner import errors
from runner.queues import (
    base,
    rabbitmq_channels,
    rabbitmq_connection,
    rabbitmq_consumer,
    rabbitmq_management,
    rabbitmq_publishing,
)

log = structlog.get_logger(__name__)

EXISTENCE_SECS = 10.0
PUBLISH_SECS = 15.0
CLOSE_SECS = 5.0
LEARNING_AT_ONCE = 2  #: how many questions about single queues the management API gets at a time


class RabbitmqBackend(base.QueueBackend):
    """One account of one broker: discovers the queues of all its vhosts, consumes them, publishes to them."""

    kind = "rabbitMQ"

    def __init__(self, url: str, management_url: str | None = None, *, account: str | None = None) -> None:
        """`url` is amqp or amqps with pika's parameters in its query, credentials percent-encoded once.

        `management_url` defaults to port 15672 (15671 with TLS) of the same host, and to the same credentials.
        Raises `errors.UsageError`, without the URL in its text.
        """
        self._parameters = parameters(url)
        host = rabbitmq_management.bracket(self._parameters.host)
        options = self._parameters.ssl_options
        self.account = account or f"{'amqps' if options else 'amqp'}://{host}:{self._parameters.port}"
        self._management = rabbitmq_management.Management(
            management_url or (f"https://{host}:15671" if options else f"http://{host}:15672"),
            user=self._parameters.credentials.username,
            password=self._parameters.credentials.password,
            tls=options.context if options else None,
        )
        self._lane = rabbitmq_connection.Lane(f"rabbitmq {host}")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._consuming: dict[str, rabbitmq_connection.Link] = {}
        self._publishing: dict[str, rabbitmq_publishing.Publisher] = {}
        self._consumers: set[rabbitmq_consumer.RabbitmqConsumer] = set()
        self._durable: dict[base.QueueRef, bool] = {}
        self._learning: set[asyncio.Task[None]] = set()
        self._learners = asyncio.Semaphore(LEARNING_AT_ONCE)

    async def open(self) -> None:
        """Start the thread. Connections are opened when they are first needed."""
        self._loop = asyncio.get_running_loop()
        await self._lane.start()

    async def aclose(self) -> None:
        """Close the connections, which gives back what is still held, and end the thread."""
        for task in self._learning:
            task.cancel()
        for consumer in tuple(self._consumers):
            consumer.fail(self._unavailable("the account was closed"))
        links = [*self._consuming.values(), *(publisher.link for publisher in self._publishing.values())]
        with contextlib.suppress(TimeoutError, rabbitmq_connection.Closed):
            await self._lane.call(rabbitmq_connection.close_all, links, limit=CLOSE_SECS)
        await self._lane.stop()

    async def discover(self) -> list[base.QueueInfo]:
        """As the contract says: one `GET /api/bindings` for all vhosts and queues. The depth is not told."""
        return [
            base.QueueInfo(ref=self._ref(vhost, name)) for vhost, name in await self._management.work_queues()
        ]

    async def consumer(self, queue: base.QueueRef) -> rabbitmq_consumer.RabbitmqConsumer:
        """As the contract says; it gets a channel of its own at its first `next`."""
        assert self._loop is not None, "open() comes first"
        consumer = rabbitmq_consumer.RabbitmqConsumer(
            queue,
            rabbitmq_consumer.Crossing(lane=self._lane, loop=self._loop),
            self._consuming_link(queue.vhost),
            on_first=self._learn_soon,
            on_close=self._consumers.discard,
        )
        self._consumers.add(consumer)
        return consumer

    async def existence(self, queue: base.QueueRef) -> base.Existence:
        """Asked by a passive declare on the vhost's consuming connection.

        GONE when the queue was known to be durable, or was seen on that very connection (DESIGN.md rule 11).
        """
        link = self._consuming_link(queue.vhost)
        try:
            there, seen = await self._lane.call(
                rabbitmq_channels.look, link, queue.name, limit=EXISTENCE_SECS
            )
        except (exceptions.AMQPError, TimeoutError, rabbitmq_connection.Closed):
            return base.Existence.UNKNOWN
        if there:
            if queue not in self._durable:
                await self._learn(queue)
            return base.Existence.HERE
        if there is False and (seen or self._durable.get(queue, False)):
            return base.Existence.GONE
        return base.Existence.UNKNOWN

    async def publish(self, queue: base.QueueRef, body: bytes) -> None:
        """As a client publishes (INTEROP.md 2.2), or by the default exchange where the queue is not bound (2.4)."""
        if queue not in self._durable:
            await self._learn(queue)
        vhost = queue.vhost or self._parameters.virtual_host
        if vhost not in self._publishing:
            self._publishing[vhost] = rabbitmq_publishing.Publisher(self._link(vhost, "publish"))
        publisher = self._publishing[vhost]
        routes = [
            (rabbitmq_management.EXCHANGE, rabbitmq_management.KEY_PREFIX + queue.name),
            ("", queue.name),
        ]
        properties = pika.BasicProperties(
            content_type="application/json",
            app_id="studioml",
            delivery_mode=2 if self._durable.get(queue, False) else 1,
        )
        try:
            routed = await self._lane.call(publisher.publish, routes, body, properties, limit=PUBLISH_SECS)
        except TimeoutError as error:
            why = publisher.link.failure or "no confirmation; is the broker out of memory or disk?"
            raise self._unavailable(
                f"publishing to {queue} took longer than {PUBLISH_SECS:g} s: {why}"
            ) from error
        except (exceptions.AMQPError, rabbitmq_connection.Closed) as error:
            raise self._unavailable(
                f"publishing to {queue}: {rabbitmq_connection.describe(error)}"
            ) from error
        if not routed:
            raise base.QueueGone(str(queue))

    def _ref(self, vhost: str, name: str) -> base.QueueRef:
        return base.QueueRef(account=self.account, name=name, vhost=vhost)

    def _unavailable(self, text: str) -> errors.QueueUnavailable:
        return errors.QueueUnavailable(f"{self.account}: {text}", endpoint=self.account)

    def _link(self, vhost: str, purpose: str) -> rabbitmq_connection.Link:
        own = copy.copy(self._parameters)
        own.virtual_host = vhost
        return rabbitmq_connection.Link(own, f"{self.account} {vhost} {purpose}")

    def _consuming_link(self, vhost: str) -> rabbitmq_connection.Link:
        vhost = vhost or self._parameters.virtual_host
        if vhost not in self._consuming:
            self._consuming[vhost] = self._link(vhost, "consume")
        return self._consuming[vhost]

    def _learn_soon(self, queue: base.QueueRef) -> None:
        """The queue may be another one of the same name: forget what is known of it, and ask again beside the work."""
        self._durable.pop(queue, None)
        task = asyncio.create_task(self._learn(queue), name=f"learn {queue}")
        self._learning.add(task)
        task.add_done_callback(self._learning.discard)

    async def _learn(self, queue: base.QueueRef) -> None:
        """Ask whether the queue is durable. Not to know is no failure: a user without the tag can never know."""
        vhost = queue.vhost or self._parameters.virtual_host
        try:
            async with self._learners:
                durable = await self._management.durable(vhost, queue.name)
        except errors.QueueUnavailable as error:
            log.debug("whether a queue is durable is not known", queue=str(queue), error=str(error))
            return
        if durable is not None:
            self._durable[queue] = durable


def parameters(url: str) -> pika.URLParameters:
    """What pika makes of the URL. Raises `errors.UsageError`, which does not show the URL: it holds a password."""
    if not url.startswith(("amqp://", "amqps://")):
        raise errors.UsageError("the AMQP URL must begin with amqp:// or amqps://")
    try:
        return pika.URLParameters(url)
    except (ValueError, TypeError, SyntaxError, OSError) as error:
        raise errors.UsageError(
            f"the AMQP URL cannot be used: {type(error).__name__} in its port or parameters"
        ) from error
