"""What is done on the channels of RabbitMQ: asking for one message, holding it, looking whether a queue is there.

All of it runs in the thread of `rabbitmq_connection.Lane`, on that thread's loop; callbacks to the outside run there too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from typing import TYPE_CHECKING

import structlog
from pika import exceptions, spec

from runner.queues import rabbitmq_connection as wire

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pika.channel import Channel

log = structlog.get_logger(__name__)

CONSUMER_TIMEOUT_FROM = (4, 3)
CONSUMER_TIMEOUT_MS = 30 * 24 * 3600 * 1000
OPENING_AT_ONCE = (
    32  #: channels of one connection: hundreds are opened at the start, and after each broken connection
)

_LIMIT = re.compile(r"acknowledgement .*timed out\. Timeout value used: (\d+) ms")


class Held:
    """One message that the broker has handed to us and waits to hear about."""

    def __init__(
        self,
        owner: Subscription,
        channel: Channel,
        method: spec.Basic.Deliver,
        properties: spec.BasicProperties,
        body: bytes,
    ) -> None:
        self.properties = properties
        self.headers: Mapping[str, object] = properties.headers or {}
        self.redelivered: bool = bool(method.redelivered)
        self.body = body
        self.on_lost: Callable[[], None] | None = (
            None  #: called once, when the channel closes under the message
        )
        self.first = False  #: the first message on its channel
        self._owner = owner
        self._channel = channel
        self._tag = method.delivery_tag

    async def ack(self) -> bool:
        """Hand the acknowledgement to the connection. False when the hold was lost before."""
        if not self._owner.release(self):
            return False
        self._channel.basic_ack(self._tag)
        self._owner.close_if_done()
        return True

    async def requeue(self) -> bool:
        """Give the message back. False when the hold was lost before."""
        if not self._owner.release(self):
            return False
        self._channel.basic_nack(self._tag, requeue=True)
        self._owner.close_if_done()
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Events:
    """Whom a subscription tells; all called in the thread."""

    message: Callable[[Held], None]
    gone: Callable[[], None]
    limit: Callable[
        [float], None
    ]  #: the broker lets a message be held for so many seconds: it has just enforced it
    crowded: Callable[[int], None]  #: the connection has as many channels as it may: so many


class Subscription:
    """A channel of its own on which one message at a time is asked for.

    The channel stays open between the questions, so a question costs one basic.consume and its answer one push. With a
    prefetch of one, and the tag cancelled as the message arrives, the broker sends nothing that nobody has asked for,
    also after the message is acknowledged. Messages held keep the channel open, also after `close`.
    """

    def __init__(
        self,
        link: wire.Link,
        gate: asyncio.Semaphore,
        queue: str,
        events: Events,
        is_quorum: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """`gate` is shared by the subscriptions of `link`; `is_quorum` tells whether a queue is known to be one."""
        self._link = link
        self._gate = gate
        self._is_quorum = is_quorum
        self._queue = queue
        self._events = events
        self._wanted = False
        self._closed = False
        self._retired = False  # it has no place: its channel is not kept for the next question
        self._channel: Channel | None = None
        self._fresh = True  # nothing has come on this channel yet
        self._tag: str | None = None  # from basic.consume until its cancel is confirmed
        self._cancelling = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._held: set[Held] = set()
        self._failures = 0
        self._refusal = ""  # what the broker said when it closed the channel, until it lets us consume
        self._task: asyncio.Task[None] | None = None  # opens the channel, or looks whether the queue is there

    @property
    def trouble(self) -> str:
        """Why nothing can come now, in words; empty when nothing is known against it. May be read from any thread."""
        return self._link.trouble or self._refusal

    def want(self) -> None:
        """Ask for one message; `Events.message` or `Events.gone` answers. Goes on through broken connections."""
        self._wanted = True
        self._retired = False
        self._advance()

    def retire(self) -> None:
        """`unwant`, and close the channel once it holds no message. A message that is on its way still arrives."""
        self._retired = True
        self.unwant()
        self.close_if_done()

    def unwant(self) -> None:
        """Ask no more. A message that is on its way still arrives."""
        self._wanted = False
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._cancel_tag()

    async def rest(self) -> None:
        """`unwant`, and wait until the broker has confirmed it: nothing arrives any more."""
        self.unwant()
        await self._idle.wait()

    async def close(self) -> None:
        """`rest`, for good; the channel closes once it holds no message."""
        self._closed = True
        await self.rest()
        self.close_if_done()

    def release(self, held: Held) -> bool:
        """Take the message off the books; False when the channel closed under it."""
        if held not in self._held or self._channel is None or not self._channel.is_open:
            return False  # or it is closing: `_on_closed` will say so
        self._held.discard(held)
        return True

    def close_if_done(self) -> None:
        """Close the channel when nobody needs it any more."""
        unneeded = self._closed or self._retired
        if unneeded and not self._held and self._channel is not None and self._tag is None:
            wire.discard(self._channel)

    def _advance(self) -> None:
        if not self._wanted or self._closed or self._task is not None or self._tag is not None:
            return  # whatever is under way comes back here when it ends
        if self._channel is not None and self._channel.is_open:
            self._idle.clear()
            self._tag = self._channel.basic_consume(
                self._queue,
                self._on_message,
                arguments=consume_arguments(self._link.broker_version, quorum=self._is_quorum(self._queue)),
                callback=lambda _frame: self._on_consuming(),
            )
        else:
            self._task = asyncio.create_task(self._open())

    async def _open(self) -> None:
        while True:
            if self._failures:
                await asyncio.sleep(wire.backoff(self._failures - 1, wire.REFUSED_DELAY_SECS))
            try:
                async with self._gate:
                    channel = await self._link.channel()
            except exceptions.AMQPError as error:
                if isinstance(error, exceptions.NoFreeChannels):
                    self._events.crowded(self._link.channel_max)
                self._note_failure(error)
                continue
            break
        channel.add_on_close_callback(self._on_closed)
        channel.add_on_cancel_callback(self._on_broker_cancel)
        channel.basic_qos(prefetch_count=1)
        self._channel = channel
        self._fresh = True
        self._task = None
        self._advance()

    def _on_consuming(self) -> None:
        self._failures, self._refusal = 0, ""
        self._link.saw(self._queue)

    def _on_message(
        self, channel: Channel, method: spec.Basic.Deliver, properties: spec.BasicProperties, body: bytes
    ) -> None:
        held = Held(self, channel, method, properties, body)
        held.first, self._fresh = self._fresh, False
        self._held.add(held)
        self._link.saw(self._queue)
        self._wanted = False
        self._cancel_tag()
        self._events.message(held)

    def _cancel_tag(self) -> None:
        if self._tag is None or self._cancelling or self._channel is None or not self._channel.is_open:
            return
        self._cancelling = True
        tag = self._tag
        self._channel.basic_cancel(tag, callback=lambda _frame: self._on_tag_ended(tag))
        # pika rejects what arrives between a cancel and its confirmation. A put-back counts against the delivery limit
        # of a quorum queue and marks the message; ours is kept for the next question instead.
        self._channel._cancelled.discard(tag)  # noqa: SLF001 - there is no other way to say so

    def _on_tag_ended(self, tag: str) -> None:
        if tag == self._tag:
            self._tag, self._cancelling = None, False
            self._idle.set()
            self.close_if_done()
            self._advance()

    def _on_broker_cancel(self, frame: object) -> None:
        """The queue was deleted, or moved: only looking tells."""
        if self._tag is None:
            return
        self._tag, self._cancelling = None, False
        self._fresh = True
        self._idle.set()
        log.debug("the broker cancelled a consumer", queue=self._queue, frame=str(frame))
        if self._wanted:
            self._task = asyncio.create_task(self._confirm_gone())

    async def _confirm_gone(self) -> None:
        try:
            there = await probe(self._link, self._queue)
        except exceptions.AMQPError as error:
            self._note_failure(error)
            there = None
        self._task = None
        if there is False:
            self._wanted = False
            self._events.gone()
        else:
            self._advance()

    def _on_closed(self, channel: Channel, reason: BaseException) -> None:
        if channel is not self._channel:
            return
        self._channel = self._tag = None
        self._cancelling = False
        self._idle.set()
        lost, self._held = self._held, set()
        for held in lost:
            if held.on_lost is not None:
                held.on_lost()
        if self._wanted and wire.is_missing_queue(reason):
            self._wanted = False
            self._events.gone()
            return
        if isinstance(reason, exceptions.ChannelClosedByBroker):
            self._note_failure(reason)
            if (used := _LIMIT.search(reason.reply_text)) is not None:
                self._events.limit(int(used[1]) / 1000)
        self._advance()

    def _note_failure(self, error: BaseException) -> None:
        self._failures += 1
        # What concerns all queues of the connection has been said once: by the link, and by who hears `crowded`.
        own = isinstance(error, exceptions.ChannelClosedByBroker)
        self._refusal = wire.describe(error) if own else ""
        emit = log.warning if own and self._failures == 1 else log.debug
        emit("a queue's channel failed", link=self._link.label, queue=self._queue, error=wire.describe(error))


def consume_arguments(broker_version: tuple[int, ...], *, quorum: bool) -> dict[str, int] | None:
    """Asks to be allowed to hold messages for long, where a broker heeds that of a consumer.

    Quorum queues do from 4.3 on. Before that the argument was ignored (but for some releases of 3.11); with other kinds
    of queues it may be an error.
    """
    if quorum and broker_version >= CONSUMER_TIMEOUT_FROM:
        return {"x-consumer-timeout": CONSUMER_TIMEOUT_MS}
    return None


async def probe(link: wire.Link, queue: str) -> bool | None:
    """Whether the queue is there, by a passive declare on a channel of its own; None when the broker's answer is neither.

    Raises pika's AMQPError when the connection breaks; waits while it is down.
    """
    channel = await link.channel()
    try:
        await wire.rpc(channel, channel.queue_declare, queue=queue, passive=True)
    except exceptions.ChannelClosedByBroker as error:
        return False if wire.is_missing_queue(error) else None
    finally:
        wire.discard(channel)
    link.saw(queue)
    return True


async def look(link: wire.Link, queue: str) -> tuple[bool | None, bool]:
    """`probe`, and whether a queue that is not there has been seen on this very connection. Raises as `probe`."""
    there = await probe(link, queue)
    return there, link.unbroken_since_seen(queue)
