"""RabbitMQ (INTEROP.md 2.2-2.4, DESIGN.md 5.1): one account of one broker, all of its vhosts.

Everything of pika happens in one thread (`rabbitmq_connection`); this module is the daemon's side of it. Nothing in it
declares, alters or deletes a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import secrets
import socket

import pika
import structlog
from pika import exceptions

from runner import config, errors
from runner.queues import (
    base,
    rabbitmq_channels,
    rabbitmq_connection,
    rabbitmq_consumer,
    rabbitmq_leases,
    rabbitmq_management,
    rabbitmq_places,
    rabbitmq_publishing,
)

log = structlog.get_logger(__name__)

EXISTENCE_SECS = 10.0
PUBLISH_SECS = 15.0
RECLAIM_SECS = 10.0
CLOSE_SECS = 5.0
LEASE = config.RmqLease()
LEARNING_AT_ONCE = 2  #: how many questions about single queues the management API gets at a time


class RabbitmqBackend(base.QueueBackend):
    """One account of one broker: discovers the queues of all its vhosts, consumes them, publishes to them."""

    kind = "rabbitMQ"

    def __init__(
        self,
        url: str,
        management_url: str | None = None,
        *,
        account: str | None = None,
        lease: config.RmqLease | None = LEASE,
        owner: str | None = None,
        standing: int = rabbitmq_places.STANDING,
    ) -> None:
        """`owner` names this daemon in leases, the same after a restart; without `lease` messages are held by channels only.

        `url` is amqp or amqps with pika's parameters in its query, credentials percent-encoded once.

        Of `standing` queues at the most it has a consumer at a time; others are watched (docs/performance.md).
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
        self._gates: dict[rabbitmq_connection.Link, asyncio.Semaphore] = {}
        self._places = rabbitmq_places.Places(standing, self._count)
        self._consumers: set[rabbitmq_consumer.RabbitmqConsumer] = set()
        self._durable: dict[base.QueueRef, bool] = {}
        self._quorum: set[tuple[str, str]] = set()
        self._terms = lease
        self._owner = owner or f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._leases: dict[str, rabbitmq_leases.Leases] = {}
        self._unknown: set[base.QueueRef] = set()  # the next list of all queues tells of these
        self._learning: set[asyncio.Task[None]] = set()
        self._learners = asyncio.Semaphore(LEARNING_AT_ONCE)

    @property
    def identity(self) -> str:
        """The broker, by host and port; what its user sees of it does not matter."""
        host = rabbitmq_management.bracket(self._parameters.host.lower())
        return f"amqp://{host}:{self._parameters.port}"

    async def open(self) -> None:
        """Start the thread. Connections are opened when they are first needed."""
        self._loop = asyncio.get_running_loop()
        await self._lane.start()

    async def aclose(self) -> None:
        """Close the connections, which gives back what is still held, and end the thread."""
        for task in self._learning:
            task.cancel()
        await self._places.aclose()
        self._management.close()
        for consumer in tuple(self._consumers):
            consumer.fail(self._unavailable("the account was closed"))
        for leases in self._leases.values():
            with contextlib.suppress(TimeoutError, rabbitmq_connection.Closed):
                await self._lane.call(leases.close, limit=CLOSE_SECS)
        links = [*self._consuming.values(), *(publisher.link for publisher in self._publishing.values())]
        links += [leases.publishing for leases in self._leases.values()]
        with contextlib.suppress(TimeoutError, rabbitmq_connection.Closed):
            await self._lane.call(rabbitmq_connection.close_all, links, limit=CLOSE_SECS)
        await self._lane.stop()

    async def discover(self) -> list[base.QueueInfo]:
        """As the contract says: one `GET /api/bindings` for all vhosts and queues. The depth is not told."""
        return [
            base.QueueInfo(ref=self._ref(vhost, name)) for vhost, name in await self._management.work_queues()
        ]

    async def consumer(self, queue: base.QueueRef) -> rabbitmq_consumer.RabbitmqConsumer:
        """As the contract says; it gets a channel of its own at its first `next`, or when its queue has messages."""
        link = self._consuming_link(queue.vhost)
        consumer = rabbitmq_consumer.RabbitmqConsumer(
            queue,
            self._crossing(),
            link,
            self._gates.setdefault(link, asyncio.Semaphore(rabbitmq_channels.OPENING_AT_ONCE)),
            places=self._places,
            key=self._key(queue),
            leases=self._leases_of(queue.vhost),
            is_quorum=functools.partial(self._is_quorum, queue.vhost),
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

    async def reclaim(self, queue: base.QueueRef, body: bytes) -> rabbitmq_consumer.RabbitmqDelivery | None:
        """As the contract says: the lease that an earlier process of the same `owner` held."""
        if (leases := self._leases_of(queue.vhost)) is None:
            return None
        try:
            found = await self._lane.call(leases.reclaim, queue.name, body, limit=RECLAIM_SECS)
        except (exceptions.AMQPError, TimeoutError, rabbitmq_connection.Closed) as error:
            log.warning(
                "a lease of before the restart was not reclaimed; its message returns when it ends",
                queue=str(queue),
                error=rabbitmq_connection.describe(error),
            )
            return None
        if found is None:
            return None
        hold, before = found
        log.info("reclaimed a lease of before the restart", queue=str(queue), attempts=hold.attempt)
        return rabbitmq_consumer.RabbitmqDelivery(
            queue, hold, before.properties.headers, self._crossing(), redelivered=True
        )

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

    def _crossing(self) -> rabbitmq_consumer.Crossing:
        assert self._loop is not None, "open() comes first"
        return rabbitmq_consumer.Crossing(lane=self._lane, loop=self._loop)

    def _leases_of(self, vhost: str) -> rabbitmq_leases.Leases | None:
        """What holds the long runs of a vhost. Its connection is opened by the first of them."""
        vhost = vhost or self._parameters.virtual_host
        if self._terms is not None and vhost not in self._leases:
            self._leases[vhost] = rabbitmq_leases.Leases(
                self._terms,
                self._owner,
                self._link(vhost, "lease"),
                self._consuming_link(vhost),
                is_quorum=functools.partial(self._is_quorum, vhost),
            )
        return self._leases.get(vhost)

    def _is_quorum(self, vhost: str, queue: str) -> bool:
        return (vhost or self._parameters.virtual_host, queue) in self._quorum

    def _learn_soon(self, queue: base.QueueRef) -> None:
        """The queue may be another one of the same name: forget what is known of it, and ask again beside the work."""
        self._durable.pop(queue, None)
        if self._places.looking:  # a request for each of thousands would cost far more than what it tells
            self._unknown.add(queue)
            return
        task = asyncio.create_task(self._learn(queue), name=f"learn {queue}")
        self._learning.add(task)
        task.add_done_callback(self._learning.discard)

    async def _learn(self, queue: base.QueueRef) -> None:
        """Ask whether the queue is durable, and of what type. Not to know is no failure: a user without the tag can never know."""
        try:
            async with self._learners:
                found = await self._management.queue(*self._key(queue))
        except errors.QueueUnavailable as error:
            log.debug(
                "whether a queue is durable, and of what type, is not known",
                queue=str(queue),
                error=str(error),
            )
            return
        if found is not None:
            self._learnt(queue, found)

    def _learnt(self, queue: base.QueueRef, facts: rabbitmq_management.QueueFacts) -> None:
        self._durable[queue] = facts.durable
        (self._quorum.add if facts.quorum else self._quorum.discard)(self._key(queue))

    async def _count(self) -> dict[rabbitmq_places.Key, int | None]:
        """The messages that wait in each queue. What is known of queues is brought up to date on the way."""
        unknown, self._unknown = self._unknown, set()
        try:
            listed = await self._management.queues()
        except errors.QueueUnavailable:
            self._unknown |= unknown
            raise
        for queue in unknown:
            if (one := listed.get(self._key(queue))) is not None and one.facts is not None:
                self._learnt(queue, one.facts)
        return {key: one.ready for key, one in listed.items()}

    def _key(self, queue: base.QueueRef) -> rabbitmq_places.Key:
        return queue.vhost or self._parameters.virtual_host, queue.name


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
